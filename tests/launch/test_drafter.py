"""`paceline drafter` and `paceline export --drafter`, from a model folder to a folder that engines load."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from configs.errors import ConfigError, DataError, DivergedError, PreflightError, StorageError
from configs.load import dump, load
from drafter.checkpoint import CheckpointWriter
from drafter.eagle import EagleConfig, EagleHead
from drafter.export import Origin, read_drafter, write_drafter
from launch import offline
from launch.cli import app
from launch.subject import Subject, load_subject, policy_answers, sampled_texts, solved_texts
from rl.checkpoint import CheckpointStore, write_tensors
from rl.features import Text
from rollout.model import load_config, load_policy
from rollout.types import Prompt

RECIPE = """
model: {model}
compute: {{device: cpu, dtype: float32}}
data:
  name: chain_sum
  options: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
  size: 64
rollout: {{max_new_tokens: 12, temperature: 1.0}}
drafter: {{draft_vocab: 100, window: 32, batch_tokens: 512, unroll: 2}}
warmstart: {{solutions: "rl.worked:chain_sum"}}
"""


@pytest.fixture
def recipe(tmp_path: Path, deep_model_dir: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=deep_model_dir))
    return path


@pytest.fixture
def paceline() -> Callable[..., None]:
    """The command line, in this process."""
    return lambda *arguments: app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def run(tmp_path: Path, recipe: Path, deep_model_dir: Path) -> Path:
    """A run whose checkpoint of step 3 holds a policy and a served drafter, with samples of steps 2 and 3."""
    path = tmp_path / "run"
    for name in ("config", "metrics", "samples"):
        (path / name).mkdir(parents=True)
    (path / "config" / "resolved.yaml").write_text(dump(load(recipe)))
    (path / "STATUS.json").write_text("{}")
    (path / "metrics" / "steps.jsonl").write_text(
        '{"step": 2, "drafter_served_accept_length": 2.25}\n{"step": 3, "reward_mean": 0.5}\n'
    )
    policy = load_policy(deep_model_dir, device="cpu", dtype="bfloat16")
    params = {name: (param + 0.01).detach() for name, param in policy.named_parameters()}
    head = EagleHead(EagleConfig.of(policy.config, draft_vocab=100, window=32), seed=4)

    def fill(folder: Path) -> None:
        (folder / "trainer").mkdir()
        write_tensors(folder / "trainer" / "params.safetensors", params)
        writer = CheckpointWriter()
        record = {"head": {name: getattr(head.config, name) for name in head.config.__slots__}, "version": 1}
        served = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in head.state_dict().items()
        }
        writer.begin(folder / "drafter", {"training": head.state_dict(), "served": served}, record)
        writer.wait()

    CheckpointStore(path / "checkpoints", keep=2).write(3, fill)
    for step in (2, 3):
        rows = [{"question": f"{i} + {step}?", "text": f"It is {i + step}.", "finish": "stop"} for i in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), path / "samples" / f"step_{step}.parquet")
    return path


def test_a_drafter_is_trained_measured_and_trained_on(
    recipe: Path, tmp_path: Path, paceline: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out, again, results = tmp_path / "out", tmp_path / "again", tmp_path / "eval.json"
    paceline("drafter", "train", recipe, out, "--answers", "solutions", "--texts", 16, "--steps", 10)
    card = (out / "README.md").read_text()
    assert "step 10/10: loss" in capsys.readouterr().out
    assert "vllm serve" in card and "sglang.launch_server" in card and "Accept length" in card
    head = read_drafter(out)
    assert (head.config.draft_vocab, head.config.window, head.config.aux_layers) == (100, 32, (2, 3, 4))
    measure = ("drafter", "eval", recipe, "--drafter", out, "--temperatures", "0,1", "--prompts", 4, "--depth", 3)
    paceline(*measure, "--json", results)
    shown = capsys.readouterr().out
    assert "accept length" in shown and "+3" in shown
    result = json.loads(results.read_text())
    assert [one["temperature"] for one in result["temperatures"]] == [0, 1]
    for one in result["temperatures"]:
        assert 1 <= one["accept_length"] <= 4 and len(one["by_depth"]) == 3
        assert one["draft_tokens"] == 3 * one["drafts"]
    paceline("drafter", "train", recipe, again, "--texts", 8, "--steps", 1, f"drafter.init={out}")
    assert torch.equal(read_drafter(again).d2t, head.d2t)


def test_a_drafter_learns_from_a_text(
    recipe: Path,
    tmp_path: Path,
    paceline: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    piped: Callable[[str], Path],
) -> None:
    text, out = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40, tmp_path / "out"
    train = ("drafter", "train", recipe, out, "--text")
    with pytest.raises(DataError, match=r"--text has \d+ tokens, not two pieces of 250; give a longer"):
        paceline(*train, piped(text[:400]), "--length", 250)
    paceline(*train, piped(text), "--length", 64, "--texts", 12, "--steps", 30)
    said = capsys.readouterr().out
    before, after = re.findall(r"([\d.]+) before, ([\d.]+) after", said)[0]
    assert "12 texts, 768 tokens" in said and float(after) > float(before)
    assert read_drafter(out).config.draft_vocab == 100


def test_a_runs_drafter_is_exported_with_its_policy(run: Path, tmp_path: Path, paceline: Callable[..., None]) -> None:
    policy, out = tmp_path / "policy", tmp_path / "drafter"
    paceline("export", run, "--policy", policy, "--drafter", out)
    origin = json.loads((out / "drafter.json").read_text())
    assert (origin["step"], origin["accept_length"], origin["policy"]) == (3, 2.25, str(policy))
    assert f"vllm serve {policy}" in (out / "README.md").read_text()
    paceline("export", run, "--drafter", tmp_path / "other", "--format", "speculators")
    described = json.loads((tmp_path / "other" / "config.json").read_text())
    assert described["speculators_model_type"] == "eagle3"
    assert "sglang" not in (tmp_path / "other" / "README.md").read_text()  # it does not know the names
    mode = (out / "config.json").stat().st_mode
    assert [path.stat().st_mode for path in (*out.iterdir(), *policy.glob("*.safetensors"))] == [mode] * 5
    first, second = read_drafter(out).state_dict(), read_drafter(tmp_path / "other").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_drafter_is_not_exported_for_another_policy(
    run: Path, tmp_path: Path, deep_model_dir: Path, paceline: Callable[..., None]
) -> None:
    from rl.export_drafter import export_drafter

    with pytest.raises(PreflightError, match="does not hold the policy of"):
        export_drafter(run, tmp_path / "out", layout="eagle3", policy=deep_model_dir)
    shutil.rmtree(run / "checkpoints" / "step_3" / "drafter")
    assert not (tmp_path / "out").exists()


def test_a_drafter_is_not_exported_for_a_model_of_another_geometry(
    run: Path, tmp_path: Path, deep_model_dir: Path, tiny_model_dir: Path, paceline: Callable[..., None]
) -> None:
    resolved = run / "config" / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace(str(deep_model_dir), str(tiny_model_dir)))
    with pytest.raises(StorageError, match=r"hidden_size=32 does not fit .* has 64; was it replaced"):
        paceline("export", run, "--drafter", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_every_check_comes_before_the_folder(
    run: Path, tmp_path: Path, paceline: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StorageError("it came back otherwise")

    for check in ("check_drafter", "check_in_vllm"):
        with monkeypatch.context() as patched, pytest.raises(StorageError, match="came back otherwise"):
            patched.setattr(f"rl.export_drafter.{check}", refuse)
            paceline("export", run, "--drafter", tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))


def test_the_card_says_which_policy_to_serve(run: Path, tmp_path: Path, paceline: Callable[..., None]) -> None:
    alone, both, policy = tmp_path / "alone", tmp_path / "both", tmp_path / "policy"
    paceline("export", run, "--drafter", alone)
    paceline("export", run, "--policy", policy, "--drafter", both)
    assert f"paceline export {run} --policy OUT" in (alone / "README.md").read_text()
    assert "--policy OUT" not in (both / "README.md").read_text()
    paceline("drafter", "train", run, tmp_path / "offline", "--texts", 6, "--steps", 1)
    assert f"paceline export {run} --policy OUT" in (tmp_path / "offline" / "README.md").read_text()


def test_the_drafter_of_an_older_checkpoint_is_said_to_be_one(
    run: Path, tmp_path: Path, paceline: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "rl.export"]

    paceline("export", run, "--drafter", tmp_path / "out")
    assert said() == []
    shutil.copytree(run / "checkpoints" / "step_3", run / "checkpoints" / "step_4")
    (run / "checkpoints" / "step_4" / "drafter" / "served.safetensors").write_bytes(b"cut")
    paceline("export", run, "--drafter", tmp_path / "older")
    assert said() == [f"{run}/checkpoints/step_4 does not match its hashes; step_3 is taken"]


def test_nothing_is_exported_where_one_of_the_two_cannot_be(
    run: Path, tmp_path: Path, paceline: Callable[..., None]
) -> None:
    policy, out, taken = tmp_path / "policy", tmp_path / "drafter", tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    with pytest.raises(PreflightError, match="taken already exists"):
        paceline("export", run, "--policy", policy, "--drafter", taken)
    with pytest.raises(PreflightError, match="taken already exists"):
        paceline("export", run, "--policy", taken, "--drafter", out)
    for inside in (out, out / "policy"):
        with pytest.raises(PreflightError, match="name a folder for each"):
            paceline("export", run, "--policy", inside, "--drafter", out)
    CheckpointStore(run / "checkpoints", keep=2).write(4, lambda folder: (folder / "trainer").mkdir())
    with pytest.raises(PreflightError, match="step_4 has no drafter"):
        paceline("export", run, "--policy", policy, "--drafter", out)
    assert not policy.exists() and not out.exists()


@pytest.mark.parametrize(
    ("off", "complaint"),
    [
        ("", "good enough to be served by then; train longer"),
        ("workers differ", r"any more \(workers differ\); `paceline"),
    ],
)
def test_why_a_run_serves_no_drafter_is_said(
    run: Path, tmp_path: Path, paceline: Callable[..., None], off: str, complaint: str
) -> None:
    def fill(folder: Path) -> None:
        writer = CheckpointWriter()
        writer.begin(folder / "drafter", {"training": {"steps": torch.tensor(3)}}, {"version": 0, "off": off})
        writer.wait()

    CheckpointStore(run / "checkpoints", keep=2).write(4, fill)
    with pytest.raises(PreflightError, match=complaint):
        paceline("export", run, "--drafter", tmp_path / "out")


def test_what_stops_a_drafter_is_found_before_the_policys_weights_are_read(
    recipe: Path,
    run: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    paceline: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    piped: Callable[[str], Path],
) -> None:
    for reads in ("load_policy", "read_params"):
        monkeypatch.setattr(f"launch.subject.{reads}", pytest.fail)
    (tmp_path / "taken" / "mine").mkdir(parents=True)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is no folder"):
        paceline("drafter", "train", recipe, tmp_path / "file" / "out")
    with pytest.raises(PreflightError, match="nowhere holds no drafter"):
        paceline("drafter", "train", recipe, tmp_path / "out", "drafter.init=nowhere")
    with pytest.raises(ConfigError, match="unroll=32 does not fit drafter.window=32"):
        paceline("drafter", "train", recipe, tmp_path / "out", "drafter.unroll=32")
    for source in (recipe, run):
        with pytest.raises(PreflightError, match="taken already exists"):
            paceline("drafter", "train", source, tmp_path / "taken")
        with pytest.raises(ConfigError, match="--length 257 exceeds the 256 positions of the policy; lower it"):
            paceline("drafter", "train", source, tmp_path / "out", "--text", piped("some"), "--length", 257)
    with pytest.raises(PreflightError, match="engines need three different"):
        paceline("drafter", "train", recipe, tmp_path / "out", f"model={tiny_model_dir}")
    assert not (tmp_path / "out").exists()


def test_a_drafter_that_diverged_is_not_written(recipe: Path, tmp_path: Path, paceline: Callable[..., None]) -> None:
    train = ("drafter", "train", recipe, tmp_path / "out", "--answers", "solutions", "--texts", 8, "--steps", 3)
    with pytest.raises(DivergedError, match="after 3 updates; lower drafter.lr=1e"):
        paceline(*train, "drafter.lr=1e30")
    assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_measured_or_kept_is_found_before_the_policys_weights_are_read(
    recipe: Path,
    run: Path,
    tmp_path: Path,
    deep_model_dir: Path,
    paceline: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = EagleConfig.of(load_config(deep_model_dir), draft_vocab=100, window=16)
    origin = Origin(str(deep_model_dir), [], "0" * 64, 0, 3)
    (given := tmp_path / "given").mkdir()
    write_drafter(given, EagleHead(shape), layout="eagle3", dtype=torch.float32, origin=origin)
    for reads in ("load_policy", "read_params"):
        monkeypatch.setattr(f"launch.subject.{reads}", pytest.fail)
    for source, options, window in ((run, (), 32), (run, ("--drafter", given), 16), (recipe, ("--drafter", given), 16)):
        with pytest.raises(ConfigError, match=f"--depth {window} does not fit the drafter's window of {window} tokens"):
            paceline("drafter", "eval", source, *options, "--depth", window)
    with pytest.raises(PreflightError, match="nowhere holds no drafter"):
        paceline("drafter", "eval", run, "--drafter", "nowhere")
    with pytest.raises(StorageError, match="name a file"):
        paceline("drafter", "eval", run, "--json", tmp_path)


def test_what_a_run_lacks_is_named(run: Path, recipe: Path, tmp_path: Path, paceline: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match="say what to export"):
        paceline("export", run)
    with pytest.raises(ConfigError, match="say which drafter to measure"):
        paceline("drafter", "eval", recipe)
    with pytest.raises(ConfigError, match="is not numbers between commas"):
        paceline("drafter", "eval", recipe, "--temperatures", "hot")


def test_a_runs_samples_become_texts_newest_first(run: Path) -> None:
    subject = load_subject(run, [])
    assert subject.step == 3 and subject.policy.dtype == torch.bfloat16
    texts = sampled_texts(subject, 4)
    decoded = [subject.tokenizer.decode(text.token_ids[text.num_prompt :]) for text in texts]
    assert decoded == ["It is 3.<|im_end|>", "It is 4.<|im_end|>", "It is 5.<|im_end|>", "It is 2.<|im_end|>"]
    assert "0 + 3?" in subject.tokenizer.decode(texts[0].token_ids[: texts[0].num_prompt])


def test_samples_that_cannot_be_read_are_named(run: Path) -> None:
    (run / "samples" / "step_3.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"step_3.parquet cannot be read \(.*; move it away"):
        sampled_texts(load_subject(run, []), 4)


@pytest.mark.parametrize("num_prompts", [2, 8, 9, 40])
def test_all_answers_to_a_prompt_are_learned_from_or_none(num_prompts: int) -> None:
    texts = [Text([5, prompt, 6, answer], 3) for prompt in range(num_prompts) for answer in (7, 8)]
    learned, heldout = offline.split(texts)
    sides = [{tuple(text.token_ids[:3]) for text in side} for side in (learned, heldout)]
    assert sides[0].isdisjoint(sides[1]) and len(learned) + len(heldout) == len(texts)
    assert len(sides[1]) == -(-num_prompts // 8), "one prompt in eight"
    assert {tuple(text.token_ids) for text in offline.split(texts[::-1])[1]} == {tuple(t.token_ids) for t in heldout}


def test_siblings_alone_leave_nothing_to_measure_by() -> None:
    with pytest.raises(ConfigError, match="2 texts of 1 prompts are too few"):
        offline.split([Text([5, 6, 7], 2), Text([5, 6, 8], 2)])


def test_the_accept_length_is_that_of_every_batch_held_out(recipe: Path) -> None:
    subject = load_subject(recipe, ["drafter.batch_tokens=64"])
    texts = solved_texts(subject, 8)
    head = offline.start_head(subject, texts)
    alone = [offline.accept_lengths(subject, [head], [text])[0] for text in texts]
    sizes = [len(text.token_ids) - text.num_prompt for text in texts]
    mean = sum(length * size for length, size in zip(alone, sizes, strict=True)) / sum(sizes)
    assert offline.accept_lengths(subject, [head, head], texts) == pytest.approx([mean, mean], rel=1e-3)
    assert len(set(alone)) > 1


@pytest.mark.parametrize("context", ["rollout", "server"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_measured_are_the_answers_at_this_temperature_all_of_them_and_no_prompt(
    recipe: Path, temperature: float, context: Literal["rollout", "server"], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    texts: list[Text] = []

    def answers(subject: Subject, prompts: list[Prompt], *, temperature: float) -> tuple[list[Text], torch.Tensor]:
        asked.append(temperature)
        found, keys = policy_answers(subject, prompts, temperature=temperature)
        texts.extend(found)
        return found, keys

    monkeypatch.setattr(offline, "policy_answers", answers)
    subject = load_subject(recipe, [])
    head = offline.start_head(subject, solved_texts(subject, 4))
    cycles = offline.measure(
        subject, head, offline.problems(subject, 4), temperature=temperature, depth=3, context=context
    )
    assert asked == [temperature]
    # the first token is the prompt's forward's, and the last may be one that no draft can follow
    after_first = [len(text.token_ids) - text.num_prompt - 1 for text in texts]
    committed = len(cycles.accepted) + sum(cycles.accepted)
    assert sum(after_first) <= committed <= sum(after_first) + len(texts)
    assert min(cycles.places) == 1 and max(cycles.places) <= max(after_first)


def test_a_runs_own_drafter_is_measured_on_its_policy(
    run: Path, paceline: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    paceline("drafter", "eval", run, "--prompts", 2, "--context", "server")
    assert "accept length" in capsys.readouterr().out


def test_answers_are_the_policys_and_solutions_the_recipes(recipe: Path) -> None:
    subject = load_subject(recipe, ["rollout.max_new_tokens=5"])
    prompts = subject.data(num_heldout=0).prompts(0, 3)
    texts, keys = policy_answers(subject, prompts, temperature=0.0, num_samples=2)
    assert len(texts) == len(keys) == 6 and len(set(keys.tolist())) == 6
    assert texts[0].token_ids == texts[1].token_ids  # greedy
    with torch.no_grad():
        text = texts[0]
        model = LlamaForCausalLM.from_pretrained(subject.config.model, dtype=torch.float32)
        logits = model(torch.tensor(text.token_ids)[None]).logits[0]
    assert logits[text.num_prompt - 1 : -1].argmax(1).tolist() == text.token_ids[text.num_prompt :]
    solved = solved_texts(subject, 2)
    assert all(text.token_ids[-1] == subject.tokenizer.eos_token_id for text in solved)
