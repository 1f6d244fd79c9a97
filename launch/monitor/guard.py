"""Who may read the page: requests are checked before any route sees them."""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGIN = "/login"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SECURITY_HEADERS = {
    # everything from this server, nothing inline; uPlot sets styles through the object model, which needs no leave
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Guard:
    """Refuses other methods than reading, hosts that are not ours (DNS rebinding) and, with a token, who lacks it.

    hosts: names a Host header may carry, whatever the port: an SSH tunnel has its own. any_address: so may any IP
    address, which no name server can make point elsewhere. token "": none is asked for.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], any_address: bool, token: str) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._any_address = any_address
        self._token = token
        # what the cookie holds is not the token itself: a browser shows cookies to every port of a host
        self._session = hmac.new(token.encode(), b"paceline monitor session", hashlib.sha256).hexdigest()
        # named by the token: the hubs of other runs on this host, which a browser does not tell apart, have their own
        self._cookie = f"paceline_{hmac.new(token.encode(), b'name', hashlib.sha256).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with what is wrong."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that is not passed on; None lets it pass."""
        headers = Headers(scope=scope)
        if scope["type"] != "http":
            return PlainTextResponse("not HTTP", 400)
        if not self.is_ours(headers.getlist("host")):
            return PlainTextResponse("this name is not served here; `paceline monitor --host NAME` adds one", 421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("read-only", 405, {"allow": "GET, HEAD"})
        if not self._token:
            return None
        if scope["path"] == LOGIN:
            return self._login(scope)
        if not self._knows(headers):
            return PlainTextResponse("open the login URL that `paceline monitor` printed", 401)
        return None

    def is_ours(self, hosts: list[str]) -> bool:
        """Whether a request's Host header names this server."""
        if len(hosts) != 1:
            return False
        name = hosts[0].strip().lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        return name in self._hosts or (self._any_address and _is_address(name))

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), self._token):
            return True
        # unlike http.cookies this reads past what other programs on this host have stored
        return _same(cookie_parser(headers.get("cookie", "")).get(self._cookie, ""), self._session)

    def _login(self, scope: Scope) -> ASGIApp:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not _same(given, self._token):
            return PlainTextResponse("wrong token", 401)
        answer = RedirectResponse("/", 303)
        # lax: the link may be followed from another page, and nothing here changes anything
        answer.set_cookie(self._cookie, self._session, httponly=True, samesite="lax", path="/")
        return answer


def own_names() -> set[str]:
    """What this machine is called."""
    return {socket.gethostname(), socket.getfqdn()} | LOOPBACK


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
