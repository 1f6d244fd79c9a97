"""A process becomes part of a Ray cluster, or says at once why it cannot."""

import signal
import socket
import sys
from typing import Any

import pytest
import ray

from configs.errors import PreflightError
from launch.joined import join


def test_a_cluster_that_is_not_there_is_named_before_ray_tries_again_and_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PreflightError, match=f"RAY_ADDRESS=127.0.0.1:{port} .*refused.*start it") as caught:
        join(f"127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


def test_a_missing_token_is_the_users_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("no token was found. Ensure that\nit is there")

    monkeypatch.setattr(ray, "init", refused)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PreflightError, match=r"\(no token was found\).*RAY_AUTH_TOKEN_PATH"):
            join(address)


@pytest.mark.parametrize("comes", ["afterwards", "meanwhile"])
def test_sigterm_does_what_it_did_before_ray(comes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        if comes == "meanwhile":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        with pytest.raises(SystemExit) as ended:
            join("local")
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 75
    finally:
        signal.signal(signal.SIGTERM, before)
