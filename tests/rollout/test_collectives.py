"""Processes meet at one address, and nobody else finds them."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rollout.collectives import listening_store

LIMIT = timedelta(seconds=30)


def test_a_store_listens_to_its_own_address_alone() -> None:
    store = listening_store("127.0.0.1")
    store.set("said", "here")
    assert TCPStore(store.host, store.port, is_master=False, timeout=LIMIT).get("said") == b"here"
    with pytest.raises(dist.DistError):  # another address of this machine, as it has in every network
        TCPStore("127.0.0.2", store.port, is_master=False, timeout=timedelta(seconds=1))


def test_a_store_of_torchs_own_would_listen_to_all() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("said", "here")
    assert TCPStore("127.0.0.2", store.port, is_master=False, timeout=LIMIT).get("said") == b"here"
