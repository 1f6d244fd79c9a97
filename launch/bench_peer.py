"""A peer in a child process of its own Python, beside us on the same machine: told what to generate, line by line."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PretrainedConfig

from configs.errors import PreflightError

PATIENCE_S = 20.0  # for a peer whose input has ended


@dataclass(frozen=True, slots=True)
class PeerChoice:
    """Which peer to measure, the Python that has it, and the share of the GPU's memory it may take."""

    name: str
    python: Path
    memory: float


class Peer:
    """A peer in its process, as a contender: launch/bench_vllm.py, or what speaks its language.

    Its engine is being made once this one is; the first question waits for it. Raises PreflightError, with its last
    word, when it has ended.
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
        self._tell(job)

    @cached_property
    def ready(self) -> dict[str, Any]:
        """What it says of itself once its engine stands."""
        return self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def seconds(self, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
        """As launch.bench_rollout.Contender says."""
        assert self.ready
        order = {"batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens, "seed": seed}
        self._tell(order)
        return float(self._answer()["seconds"])

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

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer that is missing says so
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
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
    model: PretrainedConfig | Path,
    *,
    max_len: int,
    max_num_seqs: int,
    kv_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Peer | None]:
    """The chosen peer until the block ends; None where none was chosen.

    model: a folder, or a config, whose weights it draws at random. kv_bytes: of its KV cache; None is what the
    choice's share of memory leaves, which only one peer at a time can find out.
    """
    if choice is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="paceline-peer-") as folder:
        if not isinstance(model, Path):
            model.save_pretrained(folder)
        job = {
            "model": str(model) if isinstance(model, Path) else folder,
            "load_format": "auto" if isinstance(model, Path) else "dummy",
            "max_len": max_len,
            "max_num_seqs": max_num_seqs,
            "memory": choice.memory,
            "kv_bytes": kv_bytes,
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
