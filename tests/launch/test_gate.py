"""`paceline gate train`, from a model folder to a folder of gates, and what of the policy it leaves alone."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from configs.errors import ConfigError, DataError, PreflightError
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import read_gates
from drafter.gate_training import LayerSample
from launch import distil
from launch.cli import app
from launch.subject import load_subject
from rollout.model import forward_packed, load_policy

RECIPE = """
model: {model}
compute: {{device: cpu, dtype: float32}}
data:
  name: chain_sum
  options: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
  size: 64
rollout: {{max_new_tokens: 12, temperature: 1.0}}
warmstart: {{solutions: "rl.worked:chain_sum"}}
"""
SMALL = [
    "--length", "256", "--block", "16", "--budget", "32", "--steps", "12", "--batch", "2", "--texts", "64",
    "--lr", "1e-2",
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_dir))
    return path


@pytest.fixture
def paceline() -> Callable[..., None]:
    """The command line, in this process."""
    return lambda *arguments: app([str(argument) for argument in arguments], standalone_mode=False)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("answers", ["policy", "solutions"])
def test_gates_are_trained_saved_and_fit_the_policy_which_is_left_alone(
    recipe: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    paceline: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    answers: str,
) -> None:
    before = hashes(tiny_model_dir)
    paceline("gate", "train", recipe, tmp_path / "gates", *SMALL, "--answers", answers)
    assert hashes(tiny_model_dir) == before
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert "best blocks found" in said and f"wrote {tmp_path / 'gates'}" in said
    policy = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    gates = read_gates(tmp_path / "gates", policy.config)
    assert gates.config.select_block == 16
    assert not torch.equal(gates.query_weight, Gates(gates.config).query_weight)


def test_a_text_that_can_be_read_only_once_is_learned_from(
    recipe: Path, tmp_path: Path, paceline: Callable[..., None], piped: Callable[[str], Path]
) -> None:
    files = ("--text", piped("one two three four five six seven " * 60), "--json", tmp_path / "figures.json")
    paceline("gate", "train", recipe, tmp_path / "gates", *SMALL, *files)
    assert (tmp_path / "gates" / "attn_gate_weights.safetensors").is_file()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["sequences"] == {"learned": 6, "heldout": 1} and figures["budget_blocks"] == 2
    assert len(figures["losses"]) == 12 and figures["losses"][-1] < figures["losses"][0]
    assert figures["trained"]["bound_recall"] == figures["untrained"]["bound_recall"]
    assert 0 < figures["trained"]["gate_recall"] <= 1


def test_training_changes_no_tensor_of_the_policy_and_gives_none_a_gradient(recipe: Path) -> None:
    subject = load_subject(recipe, [])
    before = {name: tensor.clone() for name, tensor in subject.policy.state_dict().items()}
    gates = Gates(GateConfig.of(subject.policy.config, select_block=16))
    sequences = distil.of_answers(subject, 64, answers="solutions", length=200)
    distil.train_gates(subject, gates, sequences, steps=2, batch=1, lr=1e-3, report=lambda step, stats: None)
    after = subject.policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in subject.policy.parameters())


def test_what_is_harvested_is_what_the_policy_attends_to(tiny_model_dir: Path) -> None:
    policy = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    tokens = torch.randint(0, 200, (100,), generator=torch.Generator().manual_seed(0))
    samples: list[LayerSample] = []
    scales: list[float] = []

    def observe(sample: LayerSample, scale: float) -> None:
        samples.append(sample)
        scales.append(scale)

    distil.harvest(policy, tokens.tolist(), observe, select_block=16)
    seen: list[tuple[torch.Tensor, ...]] = []

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *rest: object
    ) -> torch.Tensor:
        seen.append((query[0].transpose(0, 1), key[0].transpose(0, 1)))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)

    with torch.no_grad():
        forward_packed(policy, tokens, torch.arange(100), attend, None)
    assert [sample.layer for sample in samples] == [0, 1]
    for sample, scale, (query, key) in zip(samples, scales, seen, strict=True):
        torch.testing.assert_close(sample.query, query[50:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample.keys, key, atol=1e-5, rtol=1e-5)
        assert sample.positions.tolist() == list(range(50, 100))
        probs = torch.einsum("qhd,khd->qhk", query[50:], key.repeat_interleave(2, dim=1)) * scale
        unseen = torch.arange(100) > sample.positions[:, None, None]
        probs = probs.masked_fill(unseen, -torch.inf).softmax(dim=2)
        wanted = torch.stack([part.amax(dim=2) for part in probs.split(16, dim=2)], dim=2)
        wanted = wanted.unflatten(1, (2, 2)).amax(dim=2)
        torch.testing.assert_close(sample.weights, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        (("--block", "48"), ConfigError, "--block 48"),
        (("--budget", "8"), ConfigError, "--budget 8 holds no block of 16 keys; give 16"),
        (("--lr", "7"), ConfigError, "--lr 7"),
        (("--budget", "240"), ConfigError, "--budget 240 leaves nothing to select of --length 256; give less"),
        (("--budget", "0", "--length", "20"), ConfigError, "--length 20 leaves nothing to select"),
        (("--length", "1024"), ConfigError, "512 positions"),
        (("--texts", "4"), DataError, "raise --texts"),
        (("--text", "/no/such/file"), DataError, "/no/such/file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused_in_one_line(
    recipe: Path, tmp_path: Path, paceline: Callable[..., None], options: tuple[str, ...],
    error: type[Exception], named: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=named) as caught:
        paceline("gate", "train", recipe, tmp_path / "gates", *SMALL, "--answers", "solutions", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gates").exists()


def test_a_folder_that_is_taken_and_a_text_that_is_not_there_are_found_before_the_policy_is_loaded(
    tmp_path: Path, paceline: Callable[..., None]
) -> None:
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "notes").write_text("mine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tmp_path / "no_model"))
    with pytest.raises(PreflightError, match="not empty"):
        paceline("gate", "train", recipe, tmp_path / "gates", *SMALL)
    for command in ("gate", "drafter"):
        with pytest.raises(DataError, match="--text /no/such/file cannot be read"):
            paceline(command, "train", recipe, tmp_path / "out", "--text", "/no/such/file")


def test_sequences_that_the_policy_has_no_positions_for_are_found_before_its_weights_are_read(
    recipe: Path, tmp_path: Path, paceline: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.subject.load_policy", pytest.fail)
    with pytest.raises(ConfigError, match="--length 513 exceeds the 512 positions of the policy; lower it"):
        paceline("gate", "train", recipe, tmp_path / "gates", *SMALL, "--length", 513)


def gemma2(folder: Path, *, cap: float | None) -> Path:
    """A model whose first layer has a window, and whose attention scores are capped where cap is a number."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=cap,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_policy_that_caps_its_scores_is_refused_before_its_weights_are_read(
    tmp_path: Path, paceline: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe := tmp_path / "recipe.yaml").write_text(RECIPE.format(model=gemma2(tmp_path / "capped", cap=30.0)))
    monkeypatch.setattr("launch.subject.load_policy", pytest.fail)
    with pytest.raises(PreflightError, match="'gemma2' caps its attention scores at 30; gates learn plain ones"):
        paceline("gate", "train", recipe, tmp_path / "gates", *SMALL)


def test_layers_with_a_window_are_left_out(tmp_path: Path) -> None:
    observed: list[int] = []

    def observe(sample: LayerSample, scale: float) -> None:
        observed.append(sample.layer)

    plain = load_policy(gemma2(tmp_path / "plain", cap=None), device="cpu", dtype="float32")
    distil.harvest(plain, list(range(40)), observe, select_block=16)
    assert observed == [1]
