"""`python -m launch.joined NAME ...`: wait until every named node is part of the Ray cluster, or say which is missing.

A node says that it is there by a custom resource of that name.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

POLL_S = 1.0
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


def _connect(within_s: float) -> bool:
    """Join the cluster of RAY_ADDRESS as soon as its head answers."""
    import ray

    deadline = time.monotonic() + within_s
    while True:
        try:
            ray.init(address="auto", include_dashboard=False, log_to_driver=False, configure_logging=False)
            return True
        except (ConnectionError, RuntimeError, ValueError):  # by version and by how far the head has come
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
