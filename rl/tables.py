"""Rows somebody else wrote, from JSONL, Parquet or the hub, as a source of prompts: checked once, kept as columns."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ConfigError, DataError, PreflightError
from configs.schema import DataConfig
from rl.plain import to_plain
from rl.quarantine import BadRowError, Quarantine
from rl.template import Problem, Template
from rollout.types import Prompt

HUB_OPTIONS = ("name", "revision")
SCHEMA = pa.schema([(name, pa.large_string()) for name in ("id", "question", "answer", "task")])
CHUNK_ROWS = 4096
HELDOUT_SHARE = 10  # one row in ten at most is held out

Row = dict[str, Any]
Rows = Iterable[tuple[int, Row | BadRowError]]  # line or row number from 1, and the row or why there is none


class StoredPrompts:
    """The good rows of a table, tokenised when they are drawn.

    Rows with the smallest hashes of their questions are held out, so that a row's side depends neither on the order
    of the rows nor on the run's seed, and no held-out question is trained on.
    """

    def __init__(self, config: DataConfig, template: Template, *, num_heldout: int, quarantine: Quarantine) -> None:
        """Reads every row, at most data.size good ones. Raises ConfigError, PreflightError or DataError."""
        label, rows = open_rows(config)
        self._label = label
        self._template = template
        reader = _Reader(config, template, Path(label).name)
        chunks: list[pa.RecordBatch] = []
        pending: list[Problem] = []
        hashes: list[int] = []
        for line, row in rows:
            try:
                pending.append(reader.problem(line, row))
            except BadRowError as error:
                quarantine.add(label, line, str(error))
                continue
            hashes.append(_question_hash(pending[-1].question))
            if len(pending) == CHUNK_ROWS:
                chunks.append(_columns(pending))
                pending = []
            if len(hashes) == config.size:
                break
        chunks.append(_columns(pending))
        self._table = pa.Table.from_batches(chunks).combine_chunks()
        num_rows = len(hashes) + quarantine.num_bad
        allowed = config.max_bad_fraction
        quarantine.check(num_rows=num_rows, num_allowed=allowed * num_rows, max_bad_fraction=allowed)
        self._train, self._held = _split(np.array(hashes, dtype=np.uint64), num_heldout)
        if not len(self._train):
            raise DataError(f"{label} has no rows to train on ({num_rows} read, {quarantine.num_bad} bad); add some")
        if num_heldout and not len(self._held):
            raise ConfigError(
                f"{label} has {len(hashes)} rows, too few to hold out one in {HELDOUT_SHARE}; "
                "add rows or set eval.every=0"
            )

    def __len__(self) -> int:
        """Rows to train on."""
        return len(self._train)

    def heldout(self) -> list[Prompt]:
        """The rows held out, of distinct questions: as many as asked for, within a tenth of the table."""
        return [self._prompt(int(row)) for row in self._held]

    def prompt(self, index: int) -> Prompt:
        """Training row `index`, tokenised."""
        return self._prompt(int(self._train[index]))

    def _prompt(self, row: int) -> Prompt:
        values = {name: self._table[name][row].as_py() for name in SCHEMA.names}
        problem = Problem(**{**values, "task": json.loads(values["task"])})
        try:
            return self._template.prompt(problem)
        except BadRowError as error:
            # only a tokenizer that spends several tokens on a byte passes the check at load and ends here
            raise DataError(f"{self._label}, row {problem.id!r}: {error}") from error


class _Reader:
    """Turns raw rows into problems; raises BadRowError with the reason where it cannot."""

    def __init__(self, config: DataConfig, template: Template, name: str) -> None:
        self._config = config
        self._template = template
        self._name = name
        self._ids: set[str] = set()

    def problem(self, line: int, row: Row | BadRowError) -> Problem:
        if isinstance(row, BadRowError):
            raise row
        config = self._config
        question = _text(row, config.prompt_field, "data.prompt_field")
        if not question.strip():
            raise BadRowError(f"field {config.prompt_field!r} is empty")
        # "" declares that the rows have no reference answer
        answer = _text(row, config.answer_field, "data.answer_field") if config.answer_field else ""
        task: Row = {}
        if row.get(config.solution_field) is not None:
            task["solution"] = _text(row, config.solution_field, "data.solution_field")
        if isinstance(row.get("metadata"), dict):
            try:
                task["metadata"] = to_plain(row["metadata"])
            except TypeError as error:
                raise BadRowError(f"field 'metadata': {error}") from error
        if row.get("tests") is not None:  # what the reward "code" runs; others may call other things so
            try:
                task["tests"] = to_plain(row["tests"])
            except TypeError as error:
                raise BadRowError(f"field 'tests': {error}") from error
        row_id = f"{self._name}:{line}" if row.get("id") is None else _text(row, "id", "")
        if row_id in self._ids:
            raise BadRowError(f"id {row_id!r} was seen before")
        self._template.check_length(question)
        self._ids.add(row_id)
        return Problem(id=row_id, question=question, answer=answer, task=task)


def open_rows(config: DataConfig) -> tuple[str, Rows]:
    """The source's label in messages, and its rows. Raises ConfigError or PreflightError when it cannot be read."""
    if not config.name:
        raise ConfigError(f"data.name is empty; name the {config.source} to read")
    if config.source == "hub":
        return config.name, _hub_rows(config)
    if config.options:
        raise ConfigError(f"data.options={config.options} have no meaning for a file; remove them")
    path = Path(config.name).expanduser()
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise ConfigError(f"data.name={config.name!r} must end in one of {', '.join(readers)}")
    if not path.is_file():
        raise PreflightError(f"data file {path} does not exist; mend data.name (relative to {Path.cwd()})")
    return str(path), readers[path.suffix](path, config)


def _jsonl_rows(path: Path, config: DataConfig) -> Iterator[tuple[int, Row | BadRowError]]:
    try:
        with path.open("rb") as stream:
            for line, data in enumerate(stream, start=1):
                if data.strip():
                    yield line, _parse_json(data)
    except OSError as error:
        raise PreflightError(f"cannot read {path}: {error.strerror}") from error


def _parse_json(data: bytes) -> Row | BadRowError:
    try:
        row = json.loads(data.decode())
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRowError(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRowError("JSON nested too deeply")
    return row if isinstance(row, dict) else BadRowError(f"a JSON {type(row).__name__}, not an object")


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple[int, Row | BadRowError]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _needed_columns(file.schema_arrow.names, str(path), config)
            line = 0
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
                for row in _batch_rows(batch):
                    line += 1
                    yield line, row
    except (pa.ArrowException, OSError) as error:
        raise PreflightError(f"cannot read {path} as Parquet: {_one_line(error)}") from error


def _batch_rows(batch: pa.RecordBatch) -> list[Row | BadRowError]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        pass
    # Parquet does not check its strings: find the rows that hold the bad ones
    rows: list[Row | BadRowError] = []
    for index in range(batch.num_rows):
        try:
            rows += batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            rows.append(BadRowError(f"not UTF-8 at byte {error.start}"))
    return rows


def _hub_rows(config: DataConfig) -> Iterator[tuple[int, Row | BadRowError]]:
    unknown = set(config.options) - set(HUB_OPTIONS)
    if unknown:
        raise ConfigError(f"data.options.{min(unknown)} is unknown for the hub; it takes {', '.join(HUB_OPTIONS)}")
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise PreflightError('data.source=hub needs one more package: pip install "paceline[hub]"') from error
    try:
        table = datasets.load_dataset(config.name, split=config.split, **config.options)
    # the library raises its own, huggingface_hub's, requests' and builtin errors for one and the same cause
    except Exception as error:
        raise PreflightError(
            f"cannot load {config.name!r} split {config.split!r} from the hub: {_one_line(error)}; check data.name, "
            "data.split and the network, or use a local file"
        ) from error
    table = table.select_columns(_needed_columns(table.column_names, config.name, config))
    return enumerate(table, start=1)


def _needed_columns(present: list[str], label: str, config: DataConfig) -> list[str]:
    """The columns worth reading. Raises ConfigError when one that every row must have is not there."""
    for key, name in (("prompt_field", config.prompt_field), ("answer_field", config.answer_field)):
        if name and name not in present:
            close = get_close_matches(name, present, n=1, cutoff=0)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"data.{key}={name!r} is not a column of {label} ({', '.join(present)}){hint}")
    wanted = (config.prompt_field, config.answer_field, config.solution_field, "id", "metadata", "tests")
    return [name for name in present if name in wanted]


def _text(row: Row, name: str, key: str) -> str:
    """A field as text; numbers as JSON writes them."""
    value = row.get(name)
    if value is None:
        remedy = f"; set {key}" if key else ""
        raise BadRowError(f"no field {name!r} among {', '.join(map(repr, row))}{remedy}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(f"field {name!r} holds half a surrogate pair at character {error.start}") from error
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise BadRowError(f"field {name!r} is a {type(value).__name__}, not text")


def _columns(problems: list[Problem]) -> pa.RecordBatch:
    rows = [(p.id, p.question, p.answer, json.dumps(p.task)) for p in problems]
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    return pa.record_batch([pa.array(column, pa.large_string()) for column in columns], schema=SCHEMA)


def _question_hash(question: str) -> int:
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little")


def _split(hashes: np.ndarray, num_heldout: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on, and to hold out: the first row of each of the smallest distinct hashes [N] uint64."""
    values, first = np.unique(hashes, return_index=True)
    count = min(num_heldout, len(hashes) // HELDOUT_SHARE)
    train = np.flatnonzero(~np.isin(hashes, values[:count]))
    return train, first[:count]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
