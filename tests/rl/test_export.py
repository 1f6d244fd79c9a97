"""An exported policy is what the run trained, in a folder that needs nothing of ours."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import PreflightError, StorageError
from configs.load import dump
from configs.schema import Config, DataConfig, RunConfig
from rl import export
from rl.checkpoint import CheckpointStore, write_tensors
from rl.export import export_policy
from rollout.model import load_policy


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A run directory with checkpoints of steps 3 and 12, whose parameters are the base model's plus the step."""
    path = tmp_path / "run"
    for name in ("config", "metrics"):
        (path / name).mkdir(parents=True)
    config = Config(model=str(tiny_model_dir), run=RunConfig(name="tiny"), data=DataConfig(name="chain_sum"))
    (path / "config" / "resolved.yaml").write_text(dump(config))
    (path / "STATUS.json").write_text("{}")
    (path / "metrics" / "steps.jsonl").write_text(
        '{"step": 3, "reward_mean": 0.25}\n{"step": 12, "reward_mean": 0.5}\n{"st'
    )
    store = CheckpointStore(path / "checkpoints", keep=2)
    for step in (3, 12):
        store.write(step, lambda folder, step=step: write_checkpoint(folder, tiny_model_dir, step))
    return path


def trained_params(base: Path, step: int) -> dict[str, torch.Tensor]:
    policy = load_policy(base, device="cpu", dtype="bfloat16")
    return {name: (param + step / 100).detach() for name, param in policy.named_parameters()}


def write_checkpoint(folder: Path, base: Path, step: int) -> None:
    (folder / "trainer").mkdir()
    write_tensors(folder / "trainer" / "params.safetensors", trained_params(base, step))


def test_the_export_is_the_newest_checkpoint_and_plain_transformers(
    run: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    out = tmp_path / "out"
    export_policy(run, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = trained_params(tiny_model_dir, 12)
    assert model.dtype == torch.bfloat16
    assert {name for name, _ in model.named_parameters()} == set(expected)
    assert all(torch.equal(param, expected[name]) for name, param in model.named_parameters())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    assert "paceline" not in (out / "config.json").read_text() + (out / "generation_config.json").read_text()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_the_card_says_where_the_weights_come_from(run: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    export_policy(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {tiny_model_dir}" in card
    assert "# tiny, step 12" in card
    assert "step 12: 0.500" in card
    assert "licence" in card


def test_a_broken_checkpoint_is_passed_over_and_left_alone(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "step_12" / "trainer" / "params.safetensors").write_bytes(b"torn")
    (run / "checkpoints" / ".staging-step_13").mkdir()
    export_policy(run, tmp_path / "out")
    assert "# tiny, step 3" in (tmp_path / "out" / "README.md").read_text()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step_3", "step_12", ".staging-step_13"}


def test_a_run_without_an_intact_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    for step in (3, 12):
        (run / "checkpoints" / f"step_{step}" / "MANIFEST.json").unlink()
    with pytest.raises(StorageError, match=r"no intact checkpoint \(2 broken\)"):
        export_policy(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(PreflightError, match="already exists and is not empty"):
        export_policy(run, out)
    (out / "thesis.txt").unlink()
    export_policy(run, out)
    assert (out / "config.json").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="is not a run directory"):
        export_policy(tmp_path, tmp_path / "out")


def test_a_failed_write_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, params: dict[str, torch.Tensor]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "check_export", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export_policy(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_weights_that_come_back_different_are_refused(
    run: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "trained", lambda base, params: AutoModelForCausalLM.from_pretrained(base))
    with pytest.raises(StorageError, match="came back with another"):
        export_policy(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    store = CheckpointStore(run / "checkpoints", keep=2)

    def fill(folder: Path) -> None:
        (folder / "trainer").mkdir()
        write_tensors(folder / "trainer" / "params.safetensors", {"lm_head.bias": torch.zeros(3)})

    store.write(13, fill)
    with pytest.raises(StorageError, match=r"lm_head\.bias \[3\] has no place in"):
        export_policy(run, tmp_path / "out")
