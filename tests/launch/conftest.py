"""What several tests of launch share."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from configs.errors import PacelineError
from launch.bench import app
from launch.geometry import Subject


@pytest.fixture
def refuses_unread(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Sequence[str], str, str], None]:
    """That a bench of a model, given a text and options, says so before it reads the weights."""

    def refuses(command: str, options: Sequence[str], text: str, says: str) -> None:
        monkeypatch.delattr(Subject, "load")
        (tmp_path / "text.txt").write_text(text)
        usual = ["--text", str(tmp_path / "text.txt"), "--device", "cpu", "--model", str(tiny_model_dir)]
        with pytest.raises(PacelineError, match=says):
            app([command, *usual, *options], standalone_mode=False)

    return refuses


@pytest.fixture
def piped() -> Iterator[Callable[[str], Path]]:
    """A file of this short text that is empty once it was read, as <(...) of a shell is."""
    with ExitStack() as open_ends:

        def pipe(text: str) -> Path:
            reading, writing = os.pipe()
            open_ends.callback(os.close, reading)
            os.write(writing, text.encode())
            os.close(writing)
            return Path(f"/dev/fd/{reading}")

        yield pipe


@pytest.fixture(scope="session")
def deep_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Seven layers, so that three of them are read; small ones, under the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("deep-model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
