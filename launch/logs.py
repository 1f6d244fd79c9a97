"""What the process says, and where: our messages on the terminal, everything else in the attempt's run.log; and how
that is read again."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from configs.errors import PreflightError
from configs.redact import redact

RUN_LOG = "run.log"
OURS = ("configs", "kernels", "drafter", "rollout", "rl", "launch")
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its warning about forks; reward workers do not tokenize
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONWARNINGS": "ignore",  # of child processes; this one's go to run.log
}


def quiet_libraries() -> None:
    """Keep libraries from writing over the display. Before they are imported: most read this only once."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    # DeepSpeed gives its logger a handler for stdout and stops propagation, but leaves filters alone.
    logging.getLogger("DeepSpeed").addFilter(_to_root)


def log_run(path: Path, *, show: Callable[[str], None]) -> None:
    """Log everything from INFO up into the file; warnings of ours are shown as well."""
    logging.raiseExceptions = False  # a full disk is reported by what needs it, not by every log line
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [to_file, _Shown(show)]
    disable_progress_bars()


def check_kernels() -> None:
    """Raise PreflightError when Hugging Face's package `kernels` stands where ours should."""
    ours = Path(__file__).resolve().parents[1] / "kernels"
    spec = find_spec("kernels")
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    try:
        theirs = Path(str(metadata.distribution("kernels").locate_file("kernels"))).resolve()
    except metadata.PackageNotFoundError:
        theirs = None
    if found != ours or theirs == ours:
        raise PreflightError(
            f"Hugging Face's package `kernels` ({found}) shadows Paceline's; "
            "run `pip uninstall -y kernels`, then install Paceline again"
        )


def attempts(run: Path) -> list[int]:
    """The attempts that left logs, in order."""
    return sorted(int(folder.name.removeprefix("attempt_")) for folder in (run / "logs").glob("attempt_*"))


def log_files(run: Path, attempt: int | None) -> list[Path]:
    """An attempt's logs, run.log first; of the last attempt where none is named. Raises PreflightError."""
    known = attempts(run)
    if attempt is None and known:
        attempt = known[-1]
    files = sorted((run / "logs" / f"attempt_{attempt}").glob("*.log"), key=lambda file: (file.name != RUN_LOG, file))
    if not files:
        if attempt in known:
            raise PreflightError(
                f"attempt {attempt} of {run} has logged nothing; `paceline status {run}` says what it does"
            )
        have = ", ".join(map(str, known)) or "none"
        raise PreflightError(f"{run} has no logs of attempt {attempt}; attempts: {have}")
    return files


def follow(log: Path, is_over: Callable[[], bool], *, poll_s: float = 0.5) -> Iterator[str]:
    """What the log holds and what is added to it, until it is over."""
    with log.open(encoding="utf-8", errors="replace") as file:
        while True:
            over = is_over()  # before the last look: nothing comes after that
            while text := file.read(1 << 16):
                yield text
            if over:
                return
            time.sleep(poll_s)


class _Redacting(logging.Formatter):
    """Lines without secrets, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        return redact(super().format(record))


class _Shown(logging.Handler):
    """Shows a person the warnings of our own packages."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one message on."""
        if record.name.partition(".")[0] in OURS:
            self._show(f"{record.levelname.lower()}: {record.getMessage()}")


def _to_root(record: logging.LogRecord) -> bool:
    """Hand a record to the root logger's handlers and to no other."""
    logging.getLogger().handle(record)
    return False


def disable_progress_bars() -> None:
    """From here on the display is the only thing that redraws."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    hub.disable_progress_bars()  # type: ignore[attr-defined]
    transformers_logging.disable_progress_bar()
