"""The web side of a run: metrics, JSON, server-sent events and the page, all read from the run's files."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from launch.monitor.drawing import curve_columns, lane_spans, step_columns
from launch.monitor.exposition import expose
from launch.monitor.reader import RunReader
from launch.monitor.samples import ORDERS, find_tokenizer, sample, sample_page
from launch.monitor.summary import summary

POLL_S = 0.25
BEAT_S = 15.0  # between words to a page when nothing happens: a proxy keeps the line open, and the clock goes on
MAX_LISTENERS = 32
PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}

log = logging.getLogger(__name__)


class Hub:
    """One run's reader, and the pages that listen to it."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises PreflightError where there is no run directory."""
        self.reader = RunReader(path)
        self.reader.poll()
        self._listeners: set[asyncio.Queue[str]] = set()
        self._tokenizers: dict[str, Any] = {}
        self._trouble = ""

    async def watch(self) -> None:
        """Look at the files for ever, and tell the pages what is new."""
        more = False
        while True:
            await asyncio.sleep(0 if more else POLL_S)
            try:
                # in a thread: a disk that does not answer keeps no page waiting
                news = await asyncio.to_thread(self.reader.look)
            except OSError as error:  # a file system that is away for a while: what was known stands
                if str(error) != self._trouble:
                    log.warning("cannot read %s: %s", self.reader.path, error)
                self._trouble = str(error)
                continue
            self._trouble, more = "", news.more
            changed, cut = self.reader.take(news)
            if changed and self._listeners:
                self.tell(changed, cut=cut)

    def tell(self, changed: set[str], *, cut: bool) -> None:
        """Send every page the summary and what changed; a page too slow to take it in is let go, and comes back."""
        message = self._message(changed, cut=cut)
        for queue in list(self._listeners):
            try:
                queue.put_nowait(message)
            except asyncio.QueueFull:
                self._listeners.discard(queue)

    async def listen(self) -> AsyncGenerator[str]:
        """Server-sent events for one page, beginning with where the run stands."""
        if self.is_full:  # others came since this one was let in
            return
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=64)
        self._listeners.add(queue)
        try:
            yield self._message(set(), cut=False)
            while queue in self._listeners:
                try:
                    yield await asyncio.wait_for(queue.get(), BEAT_S)
                except TimeoutError:
                    yield self._message(set(), cut=False)
        finally:
            self._listeners.discard(queue)

    @property
    def is_full(self) -> bool:
        """Whether as many pages listen as may."""
        return len(self._listeners) >= MAX_LISTENERS

    def tokenizer(self) -> Any:
        """The run's tokenizer, or None; looked for once."""
        model = str(self.reader.config.get("model", ""))
        if model not in self._tokenizers:
            self._tokenizers[model] = find_tokenizer(model)
        return self._tokenizers[model]

    def _message(self, changed: set[str], *, cut: bool) -> str:
        data = {"changed": sorted(changed), "cut": cut, "state": summary(self.reader)}
        return f"data: {json.dumps(data)}\n\n"


def make_app(path: Path) -> Starlette:
    """The routes of a run's hub. Whoever serves it puts launch.monitor.guard before it."""
    hub = Hub(path)
    reader = hub.reader

    async def metrics(request: Request) -> Response:
        body, content_type = expose(reader, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def state(request: Request) -> Response:
        return JSONResponse(summary(reader))

    async def steps(request: Request) -> Response:
        if "step" in request.query_params:
            record = reader.record(_number(request, "step"))
            return JSONResponse(record) if record else _missing("no such step is finished")
        return JSONResponse(step_columns(reader, after=_number(request, "after", default=0)))

    async def events(request: Request) -> Response:
        return JSONResponse({"events": reader.events[-_number(request, "last", default=200) :]})

    async def curve(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(lambda: curve_columns(reader.curve(_number(request, "step")))))

    async def lanes(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(lambda: lane_spans(reader.lanes(_number(request, "step")))))

    async def samples(request: Request) -> Response:
        file = await run_in_threadpool(reader.samples, _number(request, "step"))
        if file is None:  # of a step under way there are none yet: no fault of who asks
            return JSONResponse({"total": 0, "offset": 0, "rows": []})
        if "row" in request.query_params:
            row = _number(request, "row")
            record = await run_in_threadpool(lambda: sample(file, row, hub.tokenizer()))
            return JSONResponse(record) if record else _missing("no such sample")
        order = request.query_params.get("order", "prompt")
        if order not in ORDERS:
            return PlainTextResponse(f"order={order!r} is none of {', '.join(ORDERS)}", 400)
        offset, limit = _number(request, "offset", default=0), _number(request, "limit", default=50)
        return JSONResponse(await run_in_threadpool(sample_page, file, offset=offset, limit=limit, order=order))

    async def stream(request: Request) -> Response:
        if hub.is_full:
            return PlainTextResponse(f"{MAX_LISTENERS} pages are open already", 503)
        return StreamingResponse(hub.listen(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(hub.watch())
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/api/state", state),
            Route("/api/steps", steps),
            Route("/api/events", events),
            Route("/api/curve", curve),
            Route("/api/lanes", lanes),
            Route("/api/samples", samples),
            Route("/events", stream),
            *(Route(url, _file(file)) for url, file in static_files().items()),
        ],
        exception_handlers={BadNumberError: lambda _, error: PlainTextResponse(str(error), 400)},
        lifespan=lifespan,
    )


def static_files() -> Mapping[str, Path]:
    """Every file of the page by its URL. Each has its route, and no path is ever built from a request."""
    files = {f"/{file.relative_to(PAGE).as_posix()}": file for file in PAGE.rglob("*") if file.suffix in _TYPES}
    return files | {"/": PAGE / "index.html"}


class BadNumberError(ValueError):
    """A query's value that should be a whole number is none."""


def _file(file: Path) -> Any:
    async def serve(request: Request) -> Response:
        return FileResponse(file, headers={"content-type": _TYPES[file.suffix]})

    return serve


def _number(request: Request, name: str, *, default: int | None = None) -> int:
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or len(text) > 9:
        raise BadNumberError(f"{name}={text!r} is not a whole number")
    return int(text)


def _missing(text: str) -> Response:
    return PlainTextResponse(text, 404)
