"""Following files that another process appends to, cuts and replaces."""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

_MARK_BYTES = 64  # before the place reached, compared on every look: a file cut and grown again differs in them
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Line:
    """A whole line, parsed, and where it stands in its file."""

    record: Record
    begin: int
    end: int


class Tail:
    """The whole lines of a JSON-lines file, each once, from where the last look ended.

    A line is whole with its newline; one that is torn by a crash, or is no JSON object, is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode = 0
        self._mark = b""

    def look(self) -> tuple[bool, Iterator[Line]]:
        """What has been added, none where the file is missing; and whether that comes instead of all that was read.

        It does where the file was cut or replaced, as a resumed run does with steps that are to be done again.
        """
        file = _opened(self.path)
        if file is None:
            restarted, self._offset, self._inode, self._mark = self._offset > 0, 0, 0, b""
            return restarted, iter(())
        about = os.fstat(file.fileno())
        restarted = self._offset > 0 and not self._stands(file.fileno(), about)
        if restarted:
            self._offset, self._mark = 0, b""
        self._inode = about.st_ino
        return restarted, self._lines(file)

    def _stands(self, file: int, about: os.stat_result) -> bool:
        """Whether what was read is still there."""
        if about.st_ino != self._inode or about.st_size < self._offset:
            return False
        return os.pread(file, len(self._mark), self._offset - len(self._mark)) == self._mark

    def _lines(self, file: BinaryIO) -> Iterator[Line]:
        with file:
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(_CHUNK_BYTES):
                *whole, rest = (rest + chunk).split(b"\n")
                for text in whole:
                    begin, self._offset = self._offset, self._offset + len(text) + 1
                    self._mark = (self._mark + text + b"\n")[-_MARK_BYTES:]
                    if (record := parse(text)) is not None:
                        yield Line(record, begin, self._offset)


@dataclass(slots=True)
class StepIndex:
    """Where a step's lines stand in a file too long to keep in memory: byte ranges by step."""

    path: Path
    ranges: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, step: int, line: Line) -> None:
        """One more line of the step."""
        known = self.ranges.setdefault(step, [])
        if known and known[-1][1] == line.begin:
            known[-1] = (known[-1][0], line.end)
        else:
            known.append((line.begin, line.end))

    def read(self, step: int) -> list[Record]:
        """The step's lines, read anew. Others that have taken their place since are left out."""
        records = []
        ranges = list(self.ranges.get(step, ()))
        file = _opened(self.path)
        if file is None:
            return []
        with file:
            for begin, end in ranges:
                texts = os.pread(file.fileno(), end - begin, begin).split(b"\n")
                records += [record for text in texts if (record := parse(text)) is not None]
        return [record for record in records if record.get("step") == step]


def parse(text: bytes) -> Record | None:
    """The JSON object in a line, or None. A number that is not finite is null, as in the lines of a run."""
    try:
        record = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _opened(path: Path) -> BinaryIO | None:
    """The file to read; None where there is none, or a pipe or a device, which would be waited for or never end."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        return None
    return os.fdopen(file, "rb")
