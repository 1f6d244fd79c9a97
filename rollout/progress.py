"""Progress of a long preparation: a bar on a terminal, plain lines elsewhere, both on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Report = Callable[[float, str], None]  # the share done, 0 to 1, and what is being done now


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show how far a task is while the block runs, also where the block redirects standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _lines(title, sys.stderr)
        return
    columns = (TextColumn("{task.fields[title]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0, title=title)
        yield lambda share, doing: bar.update(task, completed=share, description=doing)


def _lines(title: str, stream: TextIO) -> Report:
    """A line whenever something else begins."""
    start = time.monotonic()
    last = ""

    def report(share: float, doing: str) -> None:
        nonlocal last
        if doing != last:
            print(f"{title}: {doing} ({time.monotonic() - start:.0f} s)", file=stream, flush=True)
        last = doing

    return report
