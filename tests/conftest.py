"""Fixtures every test may use: a complete, tiny model folder made on the spot, so that no test needs a network."""

import gc
import itertools
import os
import random
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, here and in the processes that tests start: threads that spin at barriers are 10 to 20
# times slower as soon as anything else runs on the machine, and no faster on models as small as these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray starts its workers with the least claim to a processor but four; beside other tests they would get next to none.
os.environ.setdefault("RAY_worker_niceness", "0")

import torch

if not torch.cuda.is_available():
    # before triton is imported, by transformers too: its own library is decorated then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# on a shared machine time says nothing; and what a change is judged by are the same examples every time
settings.register_profile("paceline", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", parent=settings.get_profile("paceline"), derandomize=False)
settings.load_profile("paceline")

# readline, which pytest imports, leaves the size of no terminal to what pytest starts, such as the processes of xdist
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # which of pytest's processes this is
PORTS = range(30_000, 32_700)  # below what systems give out by themselves, above what Ray and rendered scripts take
WORKERS = 9  # that have ports of their own

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens: encodes any text, decodes it back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocab |= {symbol: index + 3 for index, symbol in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """The path of a program that is no Python package; without it the test skips, or fails in CI (PACELINE_CI=1)."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None and os.environ.get("PACELINE_CI") == "1":
            pytest.fail(f"{name} is not installed, and .ci/run should have installed it")
        if path is None:
            pytest.skip(f"{name} is not installed")
        assert path is not None
        return path

    return find


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port that nothing listens on and no other test has been given, also in another of pytest's processes.

    One that the system names and is told to forget may be given to any process before it is used.
    """
    share = PORTS[WORKER % WORKERS :: WORKERS]
    numbers = itertools.cycle(random.Random().sample(share, len(share)))  # sessions side by side differ

    def find() -> int:
        for port in itertools.islice(numbers, len(share)):
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("", port))
                return port
        pytest.fail(f"all of {len(share)} ports are taken")

    return find


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of make_tiny_model."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def make_tiny_model(folder: Path) -> Path:
    """A 2-layer Llama with random weights, grouped-query attention and a byte tokenizer, as a transformers folder."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # wide initial weights: a peaked distribution, so that sampling order and drafts matter
        config.initializer_range = 0.2
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class _Launches(TorchDispatchMode):
    """Counts torch operations that compute or copy: what would be a launch on a GPU."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        if not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "_unsafe_view")):
            self.count += 1
        return returned


@pytest.fixture
def launches() -> Callable[[Callable[[], object]], int]:
    """How many torch operations a call makes that would each be a launch on a GPU."""

    def count(call: Callable[[], object]) -> int:
        with _Launches() as counted:
            call()
        return counted.count

    return count


def pytest_collection_finish() -> None:
    """What was imported by now is searched for garbage no more; tests and DeepSpeed ask for many such searches."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw without a generator does not depend on which tests this process ran before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Nor on whether fixtures that draw were there already."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
