"""Whether sparse attention fits a policy, told from its config before its weights are read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PretrainedConfig

from configs.errors import ConfigError, PreflightError
from configs.schema import SparseConfig
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from rollout.selectors import require_sparse


def policy(num_layers: int = 2) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """A folder of gates over blocks of 16 tokens, of a policy of two layers."""
    (folder := tmp_path / "gates").mkdir()
    made = Gates(GateConfig.of(policy(), select_block=16, gate_dim=8), seed=0)
    write_gates(folder, made, model_config=policy(), base_model="some/policy", dtype=torch.float32)
    return folder


def test_gates_of_the_policy_fit(gates: Path) -> None:
    require_sparse(SparseConfig(selector="gate", gate=str(gates), select_block=16), policy())


def test_gates_that_are_not_there_are_missed_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"GATES holds no gates: .* set sparse\.gate .* `paceline gate train`"):
        require_sparse(SparseConfig(selector="gate", gate=str(tmp_path / "GATES")), policy())


def test_gates_of_another_policy_are_refused(gates: Path) -> None:
    with pytest.raises(PreflightError, match=r"gates for a policy of num_layers=2, not 3"):
        require_sparse(SparseConfig(selector="gate", gate=str(gates), select_block=16), policy(3))


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (Gemma2Config(), "'gemma2' .* its config sets final_logit_softcapping=30.0; set sparse.mode=off"),
        (MistralConfig(sliding_window=4096), "'mistral' .* its attention has a sliding window; set sparse.mode=off"),
    ],
)
def test_a_policy_that_decodes_through_its_own_module_is_refused(model_config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(PreflightError, match=reason):
        require_sparse(SparseConfig(), model_config)


def test_gates_of_other_blocks_are_refused_with_theirs(gates: Path) -> None:
    with pytest.raises(ConfigError, match=r"blocks of 16 tokens, not of 64; set sparse\.select_block=16"):
        require_sparse(SparseConfig(selector="gate", gate=str(gates)), policy())


def test_more_dense_layers_than_the_policy_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sparse\.dense_layers=3: the policy has 2 layers; set fewer"):
        require_sparse(SparseConfig(dense_layers=3), policy())
    require_sparse(SparseConfig(dense_layers=2), policy())


def test_gates_that_are_to_learn_and_have_no_layer_are_refused(gates: Path) -> None:
    learning = SparseConfig(mode="draft", selector="gate", gate=str(gates), select_block=16, learn=True)
    require_sparse(learning, policy())
    with pytest.raises(ConfigError, match=r"sparse\.learn=True: no layer .* goes by gates; set false, or fewer dense"):
        require_sparse(replace(learning, dense_layers=2), policy())
