"""Fixtures of the tests that need vLLM: a policy it can serve on a CPU, and heads for it."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if find_spec("vllm"):
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles how it ranks log-probs, which nobody here asks for
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"

HEAD_DIM = 32  # the least that vLLM's attention on CPUs knows
NUM_LAYERS = 8  # the least but one at which a head reads three different layers


@pytest.fixture(scope="session")
def served_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model once more, with heads and layers as vLLM and EAGLE-3 need them, as a transformers folder."""
    folder = tmp_path_factory.mktemp("served-model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * HEAD_DIM,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,  # vLLM keeps a second, packed copy of such weights on a CPU
        initializer_range=0.13,  # wide enough for texts of many tokens, narrow enough that a head learns them
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
