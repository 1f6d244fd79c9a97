"""Serving a run's hub: where it listens, who may come in, and the process that does it beside a run."""

import argparse
import ctypes
import errno
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, PacelineError, PreflightError
from launch.monitor.guard import LOGIN, LOOPBACK, Guard, own_names

TOKEN = "PACELINE_MONITOR_TOKEN"
DEFAULT_PORT = 8470
LOOPBACK_ADDRESS = "127.0.0.1"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Door:
    """How a hub is reached. token "": by whoever is on this machine."""

    address: str
    hosts: frozenset[str]
    any_address: bool
    token: str
    is_new: bool = False  # the token was made here, and nobody knows it yet

    def url(self, port: int) -> str:
        """What to open in a browser; a token that was given by its environment variable is not shown."""
        host = socket.gethostname() if self.address in ("0.0.0.0", "::") else self.address
        origin = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if not self.token:
            return f"{origin}/"
        return f"{origin}{LOGIN}?token={self.token if self.is_new else f'${TOKEN}'}"


def open_door(listen: str, hosts: Iterable[str] = ()) -> Door:
    """On loopback, or where asked to listen, with a token then: PACELINE_MONITOR_TOKEN's, or a new one."""
    token = os.environ.get(TOKEN, "")
    if token and len(token) < 16:
        raise ConfigError(f"{TOKEN} has {len(token)} characters; give at least 16, as `openssl rand -hex 16` does")
    if not listen or listen in LOOPBACK:
        address = listen if listen not in ("", "localhost") else LOOPBACK_ADDRESS
        return Door(address, LOOPBACK | frozenset(hosts), any_address=False, token=token)
    names = frozenset({*own_names(), listen, *hosts})
    return Door(listen, names, any_address=True, token=token or secrets.token_urlsafe(24), is_new=not token)


def bind(address: str, ports: Sequence[int]) -> socket.socket:
    """A socket that listens there, on the first of the ports that is free; 0 is any. Raises PreflightError."""
    reason = ""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PreflightError(
            f"cannot listen on {address}: {error.strerror}; name an address of this machine"
        ) from error
    for port in ports:
        try:
            where = (place[0], port, *place[2:])
            with ExitStack() as stack:
                listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(where)
                listener.listen(64)
                stack.pop_all()
                return listener
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise PreflightError(f"{address} is no address of this machine; name one that is") from error
            reason = error.strerror or str(error)
    asked = f"port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
    raise PreflightError(f"cannot listen on {address} {asked}: {reason}; choose another port")


def serve(path: Path, listener: socket.socket, door: Door) -> None:
    """Serve the run's hub on the socket until SIGTERM or Ctrl-C. Raises PreflightError where there is no run."""
    import uvicorn

    from launch.monitor.hub import make_app

    app = Guard(make_app(path), hosts=door.hosts, any_address=door.any_address, token=door.token)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # it would hold the token of the login URL
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=1,  # pages listen for ever
        limit_concurrency=256,
    )
    uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    """The process beside a run (launch/monitor/beside.py): its page, its sinks, or both, as long as the run's lives."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("path", type=Path)
    arguments.add_argument("--parent", type=int, required=True)
    arguments.add_argument("--fd", type=int, default=-1)
    arguments.add_argument("--sink", action="append", default=[])
    given = arguments.parse_args()
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    # SIGTERM rather than SIGKILL when the run's process ends: the sinks write what is still to be written
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != given.parent:
        return
    os.nice(10)  # the run comes first
    if given.sink:
        for name in given.sink:  # each by itself: one that fails leaves the others
            threading.Thread(target=_feed, args=(given.path, name, over), name=name).start()
    if given.fd >= 0:
        with socket.socket(fileno=given.fd) as listener:
            serve(
                given.path, listener, open_door("")
            )  # uvicorn takes SIGTERM for itself, and raises it again at its end
    else:
        over.wait()
    over.set()


def _feed(path: Path, name: str, over: threading.Event) -> None:
    """Feed a sink; what the user can mend is a line in the log, anything else its traceback."""
    from launch.monitor.sinks import feed

    try:
        feed(path, [name], over)
    except PacelineError as error:
        print(f"the {name} sink holds nothing of this run: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
