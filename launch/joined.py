"""Part of a Ray cluster: this process, and `python -m launch.joined NAME ...` waits until every named node is.

A node says that it is there by a custom resource of that name.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from configs.errors import PreflightError

POLL_S = 1.0
CONNECT_S = 10.0  # for a head's port to be reached
MISSING = 4  # DESIGN.md: resources


def missing_after(
    names: Sequence[str],
    within_s: float,
    *,
    present: Callable[[], set[str]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """The names that are still absent when all have come or the time is up; present is asked every second."""
    deadline = clock() + within_s
    while absent := sorted(set(names) - present()):
        if clock() >= deadline:
            return absent
        sleep(POLL_S)
    return []


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 when all are there, 4 when the time is up; who is missing stands on stderr."""
    parser = argparse.ArgumentParser(prog="launch.joined")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if not _connect(options.within):
        print(f"paceline: no Ray head answers after {options.within:.0f} s; is its node up?", file=sys.stderr)
        return MISSING
    import ray

    left = options.within - (time.monotonic() - began)
    absent = missing_after(options.names, left, present=lambda: set(ray.cluster_resources()))
    ray.shutdown()
    if absent:
        print(
            f"paceline: {len(absent)} of {len(options.names)} nodes have not joined after {options.within:.0f} s: "
            f"{', '.join(absent)}",
            file=sys.stderr,
        )
        return MISSING
    print(f"paceline: all {len(options.names)} nodes have joined", file=sys.stderr)
    return 0


def join(address: str) -> None:
    """Become a driver of the cluster at an address; "local" starts one on this machine. Raises PreflightError.

    What SIGTERM does stays as it is: Ray would have it end this process with code 15.
    """
    import ray

    told = signal.getsignal(signal.SIGTERM)
    try:
        _reach(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        said = str(error).strip().partition("\n")[0].partition(". ")[0]
        if address == "local":
            raise PreflightError(
                f"Ray does not start on this machine ({said}); see /tmp/ray/session_latest/logs"
            ) from error
        raise PreflightError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({said}); start it, give its token (RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS"
        ) from error
    except SystemExit:  # SIGTERM came meanwhile
        signal.signal(signal.SIGTERM, told)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, told)


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try again for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "//" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _connect(within_s: float) -> bool:
    """Join the cluster of RAY_ADDRESS as soon as its head answers."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            join(os.environ.get("RAY_ADDRESS", "auto"))
            return True
        except PreflightError:  # the head has not come so far
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
