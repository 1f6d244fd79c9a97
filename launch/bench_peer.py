"""A peer in a child process of its own Python, beside us on the same machine: told what to generate, line by line."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from configs.errors import PreflightError

if TYPE_CHECKING:
    from launch.geometry import Subject

PATIENCE_S = 20.0  # for a peer whose input has ended


@dataclass(frozen=True, slots=True)
class PeerChoice:
    """Which peer to measure, the Python that has it, and the share of the GPU's memory it may take."""

    name: str
    python: Path
    memory: float


class Peer:
    """A running peer, as a contender: launch/bench_vllm.py, or what speaks its language.

    ready: what it said of itself when its engine stood. Raises PreflightError, with its last word, when it ends.
    """

    name = "vllm"

    def __init__(self, python: Path, job: dict[str, Any], *, environment: Mapping[str, str] | None = None) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("bench_vllm.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.ready = self._ask(job)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def seconds(self, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
        """As launch.bench_rollout.Contender says."""
        order = {"batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens, "seed": seed}
        return float(self._ask(order)["seconds"])

    def close(self) -> None:
        """End the process: by the end of its input, and if that does not move it, by force."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the answer that is missing says so
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read()
            sys.stderr.write(said)
            raise PreflightError(f"the peer {self.name} ended with {code}: {last_line(said)}")
        result: dict[str, Any] = json.loads(answer)
        return result


@contextlib.contextmanager
def running(
    choice: PeerChoice | None,
    subject: "Subject",
    *,
    max_len: int,
    max_num_seqs: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Peer | None]:
    """The chosen peer with the same model until the block ends; None where none was chosen."""
    if choice is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="paceline-peer-") as folder:
        if subject.folder is None:
            subject.model.config.save_pretrained(folder)
        job = {
            "model": folder if subject.folder is None else str(subject.folder),
            "load_format": "dummy" if subject.folder is None else "auto",
            "max_len": max_len,
            "max_num_seqs": max_num_seqs,
            "memory": choice.memory,
        }
        with Peer(choice.python, job, environment=environment) as peer:
            yield peer


def require_peer(python: Path, peer: str) -> None:
    """Raise PreflightError when the peer's Python lacks it."""
    look = f"import sys, importlib.util as found; sys.exit(found.find_spec({peer!r}) is None)"
    try:
        done = subprocess.run([str(python), "-c", look], capture_output=True, text=True)
    except OSError as error:
        raise PreflightError(f"--peer-python {python} does not run ({error}); give the python of a venv") from error
    if done.returncode:
        raise PreflightError(
            f"--peer {peer}: {python} has no package {peer}; `{python} -m pip install {peer}` installs it, or give "
            "--peer-python PATH, the python of an environment that has it"
        )


def last_line(text: str) -> str:
    """What a failed process said last."""
    return text.strip().rpartition("\n")[2] or "it said nothing"
