"""Who gets in: what a browser led astray, a neighbour on the network or a curious path is answered."""

import http.client
import json
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from starlette.responses import RedirectResponse

from configs.errors import ConfigError
from launch.monitor.guard import Guard
from launch.monitor.hub import PAGE, static_files
from launch.monitor.serve import TOKEN, open_door

SECRET = "a-token-of-twenty-letters"


def ask(
    origin: str, path: str, *, method: str = "GET", host: str | None = None, **headers: str
) -> http.client.HTTPResponse:
    """One request exactly as given: nothing tidies the path or the Host header. The body is read."""
    where = urlsplit(origin).netloc
    connection = http.client.HTTPConnection(where, timeout=300)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", where if host is None else host)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


def login_cookie(token: str) -> str:
    """What a hub with this token has a browser keep."""
    guard = Guard(None, hosts=["localhost"], any_address=False, token=token)  # type: ignore[arg-type]
    scope = {
        "type": "http", "method": "GET", "path": "/login", "query_string": f"token={token}".encode(),
        "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    answer = guard._refusal(scope)
    assert isinstance(answer, RedirectResponse)
    return answer.headers["set-cookie"].partition(";")[0]


@pytest.fixture
def origin(written, serving: Callable[..., str]) -> str:
    written.step(1)
    return serving(written.path)


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:80", "[::1]:8470", "LOCALHOST"])
def test_own_names_are_served_whatever_the_port(origin: str, host: str) -> None:
    assert ask(origin, "/api/state", host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.5", "", "["]
)
def test_name_that_was_rebound_to_this_machine_is_refused(origin: str, host: str) -> None:
    assert ask(origin, "/api/state", host=host).status == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_reading_is_allowed(origin: str, method: str) -> None:
    answer = ask(origin, "/api/state", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        "/../hub.py",
        "/%2e%2e/hub.py",
        "/..%2fhub.py",
        "//etc/passwd",
        "/uplot/../../hub.py",
        "/page.js/../../hub.py",
        "/uplot",
        "/index.html%00.js",
        "/fonts/../../../../../../../../etc/passwd",
    ],
)
def test_paths_lead_to_the_files_of_the_page_and_nowhere_else(origin: str, path: str) -> None:
    assert ask(origin, path).status == 404


@pytest.mark.parametrize(
    "query",
    [
        "/api/samples?step=../../x",
        "/api/curve?step=1e3",
        "/api/lanes",
        "/api/samples?step=1&order=../x",
        "/api/curve?step=9999999999",
    ],
)
def test_values_that_are_no_numbers_are_refused(origin: str, query: str) -> None:
    assert ask(origin, query).status == 400


def test_every_answer_carries_the_security_headers(origin: str) -> None:
    for path in ("/", "/page.js", "/api/state", "/metrics", "/nothing", "/api/lanes"):
        headers = ask(origin, path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    for file in PAGE.iterdir():
        if file.suffix in (".html", ".js", ".css"):
            text = file.read_text(encoding="utf-8")
            assert "style=" not in text and "innerHTML" not in text and " onclick=" not in text
            assert text.replace("http://www.w3.org/2000/svg", "").count("//") == text.count("// ") + text.count(
                "https://"
            )
    assert "<script>" not in (PAGE / "index.html").read_text()


def test_licences_lie_beside_what_is_vendored_and_are_not_served(origin: str) -> None:
    for folder in ("uplot", "fonts"):
        assert (PAGE / folder / "LICENSE").is_file()
        assert f"/{folder}/LICENSE" not in static_files()


def test_without_its_token_nothing_is_told(written, serving: Callable[..., str]) -> None:
    origin = serving(written.path, token=SECRET)
    for path in ("/", "/metrics", "/api/state", "/events", "/page.js", "/login", "/login?token=wrong", "/login?token="):
        assert ask(origin, path).status == 401, path
    assert ask(origin, "/api/state", Authorization="Bearer wrong").status == 401
    assert ask(origin, "/api/state", Authorization=f"Basic {SECRET}").status == 401
    for name in (login_cookie(SECRET).partition("=")[0], "paceline_monitor"):
        assert ask(origin, "/api/state", Cookie=f"{name}={SECRET}").status == 401
        assert ask(origin, "/api/state", Cookie=f"{name}=").status == 401


def test_token_opens_by_header_and_by_the_cookie_of_the_login_url(written, serving: Callable[..., str]) -> None:
    origin = serving(written.path, token=SECRET)
    assert ask(origin, "/api/state", Authorization=f"Bearer {SECRET}").status == 200
    login = ask(origin, f"/login?token={SECRET}")
    assert (login.status, login.headers["location"]) == (303, "/")
    cookie = login.headers["set-cookie"]
    assert "httponly" in cookie.lower() and "samesite=lax" in cookie.lower() and SECRET not in cookie
    own = cookie.partition(";")[0]
    assert ask(origin, "/", Cookie=own).status == 200
    # what other programs on this host store, or another run's hub, is in nobody's way
    other = login_cookie(SECRET + "s")
    assert ask(origin, "/", Cookie=f'view={{"open": [1]}}; {other}; {own}').status == 200
    assert ask(origin, "/", Cookie=other).status == 401


def test_listening_elsewhere_always_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert open_door("").token == ""
    door = open_door("0.0.0.0")
    assert len(door.token) >= 32 and door.token in door.url(8470)
    assert open_door("0.0.0.0").token != door.token
    monkeypatch.setenv(TOKEN, SECRET)
    assert open_door("0.0.0.0").token == open_door("").token == SECRET
    assert SECRET not in open_door("0.0.0.0").url(8470)
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match="at least 16"):
        open_door("0.0.0.0")


def test_elsewhere_addresses_are_served_and_strange_names_are_not() -> None:
    door = open_door("0.0.0.0", ["runs.example"])
    guard = Guard(None, hosts=door.hosts, any_address=door.any_address, token=door.token)  # type: ignore[arg-type]
    assert guard.is_ours(["10.1.2.3:8470"]) and guard.is_ours(["[fe80::1]:8470"]) and guard.is_ours(["runs.example"])
    assert not guard.is_ours(["evil.example:8470"])
    assert not guard.is_ours(["localhost", "localhost"]) and not guard.is_ours([])


def test_hub_answers_with_what_the_files_hold(origin: str) -> None:
    def get(path: str) -> dict:
        return json.loads(ask(origin, path).body)  # type: ignore[attr-defined]

    assert (get("/api/state")["step"], get("/api/state")["state"]) == (1, "running")
    assert get("/api/steps")["columns"]["reward_mean"] == [0.1]
    assert get("/api/steps?step=1")["response_len_hist"]["counts"] == [2, 4, 2]
    assert get("/api/steps?after=1")["columns"] == {}
    curve = get("/api/curve?step=1")
    assert curve["running"] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    # after the last sequence nothing is drafted with anything: that is no switch
    assert curve["strategies"] == [[0, 0.0, 2.0, "off"], [0, 2.0, 4.0, "suffix d4 k1 v4"]]
    lanes = get("/api/lanes?step=1")
    assert lanes["workers"] == [0, 1] and lanes["seconds"]["train"] == 6.0
    assert get("/api/samples?step=1&limit=3")["total"] == 8
    assert get("/api/samples?step=1&row=3")["pieces"] == [["say", False], [" 3", True]]
    assert get("/api/samples?step=2")["total"] == 0
    assert get("/api/events")["events"][0]["event"] == "attempt"
    assert ask(origin, "/api/steps?step=2").status == 404
