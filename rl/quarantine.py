"""Where bad rows go: a JSONL file with the place and the reason of each, and a limit on their share."""

import json
from pathlib import Path

from configs.errors import DataError, StorageError


class BadRowError(ValueError):
    """A row cannot become a prompt; the message is the reason, without its place."""


class Quarantine:
    """Counts bad rows and appends each, once, to a file."""

    def __init__(self, path: Path | None) -> None:
        """path None keeps the count and writes nothing. A resumed run's file keeps its lines and repeats none."""
        self._path = path
        self._written: set[str] = set()
        self.num_bad = 0
        self.first = ""
        try:
            if path is not None and path.exists():
                self._written = set(path.read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error

    def add(self, file: str, line: int, reason: str) -> None:
        """One bad row. Raises StorageError when it cannot be written down."""
        self.num_bad += 1
        self.first = self.first or f"{file}:{line}: {reason}"
        text = json.dumps({"file": file, "line": line, "reason": reason})
        if self._path is None or text in self._written:
            return
        self._written.add(text)
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(text + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}; free space or choose run.dir") from error

    def check(self, *, num_rows: int, num_allowed: float, max_bad_fraction: float) -> None:
        """Raises DataError when more than num_allowed of num_rows are bad."""
        if self.num_bad <= num_allowed:
            return
        where = f"; all are listed in {self._path}" if self._path else ""
        raise DataError(
            f"{self.num_bad} of {num_rows} rows are bad, data.max_bad_fraction={max_bad_fraction:g} allows "
            f"{max_bad_fraction * num_rows:.0f}; first: {self.first}; mend the rows or raise that share{where}"
        )
