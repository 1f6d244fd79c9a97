"""Named geometries: the shapes of known models, for measurements that need no weights to be fetched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from configs.errors import ConfigError, PreflightError, ResourceError
from rollout.model import ATTENTION, load_config, load_policy
from rollout.pretrained import load_tokenizer, resolve
from rollout.projections import lay_side_by_side

Dtype = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
ONE_OF_BOTH = "give either --geometry NAME for random weights or --model MODEL, as in --geometry qwen3-8b"

# None has dropout: load_policy takes it out of a real model, and these stand for one.
_GEOMETRIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "tiny": (
        LlamaConfig,
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": (
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-1.7b": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,  # the published model ties them; vLLM was measured without
        },
    ),
    "qwen3-8b": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,
        },
    ),
}


def geometry(name: str, *, num_layers: int | None = None, asked: str = "") -> PretrainedConfig:
    """The config of a named geometry, with other layers than its own if told.

    Raises ConfigError for an unknown one. asked: what the user wrote, where that was not --geometry.
    """
    if name not in _GEOMETRIES:
        raise ConfigError(f"{asked or f'--geometry {name}'}: unknown; choose one of {', '.join(_GEOMETRIES)}")
    kind, shape = _GEOMETRIES[name]
    architecture = {LlamaConfig: "LlamaForCausalLM", Qwen3Config: "Qwen3ForCausalLM"}[kind]
    deep = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return kind(architectures=[architecture], bos_token_id=1, eos_token_id=2, **shape | deep)


def random_policy(name: str, *, device: str, dtype: str, seed: int, num_layers: int | None = None) -> PreTrainedModel:
    """A named geometry with random weights, made on the device: otherwise what load_policy returns.

    num_layers: in place of the geometry's own. Weights are drawn as the architecture initialises them, norms are 1.
    What load_policy proves of a model, every benchmark proves of its engine before it times it.
    Raises ConfigError and ResourceError.
    """
    config = geometry(name, num_layers=num_layers)
    devices = [torch.device(device)] if device != "cpu" else []
    try:
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"--geometry {name}: its {dtype} weights do not fit on {device}") from error
    lay_side_by_side(model)
    return model.eval()


def placement(device: Device, dtype: Dtype) -> tuple[str, str]:
    """The device and dtype meant by a command's options. Raises PreflightError without the device."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise PreflightError("--device cuda: torch sees no CUDA device; leave --device out, or give --device cpu")
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def config_of(name: str | None, model: str | None) -> PretrainedConfig:
    """The config of what Subject.load loads, before its weights are. Raises ConfigError, PreflightError."""
    if name is not None and model is None:
        return geometry(name)
    if name is None and model is not None:
        return load_config(resolve(model))
    raise ConfigError(ONE_OF_BOTH)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure. name as the user gave it; folder: where its weights came from, None for random ones."""

    name: str
    model: PreTrainedModel
    folder: Path | None

    @classmethod
    def load(cls, geometry: str | None, model: str | None, *, device: Device, dtype: Dtype, seed: int) -> "Subject":
        """The named geometry with random weights, or the given model: a folder or a shipped name.

        Raises ConfigError, PreflightError and ResourceError.
        """
        where, kind = placement(device, dtype)
        if (geometry is None) == (model is None):
            raise ConfigError(ONE_OF_BOTH)
        if geometry is not None:
            return cls(geometry, random_policy(geometry, device=where, dtype=kind, seed=seed), None)
        assert model is not None
        folder = resolve(model)
        return cls(model, load_policy(folder, device=where, dtype=kind), folder)

    @property
    def source(self) -> PretrainedConfig | Path:
        """What a peer makes the same model from: its folder, or the config of its random weights."""
        return self.folder or self.model.config

    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end the model's answers; random weights have none."""
        if self.folder is None:
            return ()
        from launch.cluster import stop_token_ids  # which imports all that training needs

        return stop_token_ids(self.folder, load_tokenizer(self.folder))
