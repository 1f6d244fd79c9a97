"""The hub itself, without a server: that it goes on."""

import asyncio
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from launch.monitor import hub as module
from launch.monitor.hub import Hub
from launch.monitor.reader import News


def test_pages_that_come_all_at_once_are_no_more_than_may(written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LISTENERS", 3)
    hub = Hub(written.path)

    async def run() -> None:
        pages = [hub.listen() for _ in range(5)]  # let in before any of them listens
        heard = [await anext(page, None) for page in pages]
        assert [word is not None for word in heard] == [True] * 3 + [False] * 2
        for page in pages:
            await page.aclose()
        assert not hub.is_full

    asyncio.run(run())


def test_file_system_that_is_away_for_a_while_does_not_end_the_watch(
    written, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)
    hub = Hub(written.path)
    look, looks = hub.reader.look, 0

    def broken() -> News:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise OSError(116, "Stale file handle", str(Path("steps.jsonl")))
        return look()

    async def run() -> None:
        monkeypatch.setattr(hub.reader, "look", broken)
        watching = asyncio.create_task(hub.watch())
        written.step(1)
        while not hub.reader.steps:
            assert not watching.done()
            await asyncio.sleep(0)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    asyncio.run(run())
    assert [record.message for record in caplog.records if "Stale" in record.message] == [
        f"cannot read {written.path}: [Errno 116] Stale file handle: 'steps.jsonl'"
    ]


def test_disk_that_does_not_answer_keeps_no_page_waiting(written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)
    written.step(1)
    hub = Hub(written.path)
    look, asked, answers = hub.reader.look, threading.Event(), threading.Event()

    def slow() -> News:
        asked.set()
        assert answers.wait(300)
        return look()

    async def run() -> None:
        monkeypatch.setattr(hub.reader, "look", slow)
        watching = asyncio.create_task(hub.watch())
        while not asked.is_set():
            await asyncio.sleep(0.01)
        page = hub.listen()
        assert '"step": 1' in await anext(page), "what is known is told"
        written.step(2)
        answers.set()
        assert '"step": 2' in await anext(page)
        await page.aclose()
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    asyncio.run(run())
