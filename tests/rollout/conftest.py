"""Fixtures of the rollout tests: a tiny policy, engines around it, drafters of known quality, bare sequences."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import RolloutConfig
from drafter.combined import CombinedDrafter
from drafter.eagle import EagleConfig, EagleHead
from drafter.eagle_serving import EagleDrafter
from drafter.ngram import NgramDrafter
from drafter.rings import FeatureRings
from drafter.types import OFF, Begun, Draft, Drafter, Drafts, DraftState, ResidentDrafter, Rows, Strategy, Texts
from kernels.attention import PagedSequences, paged_sequences
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.sequence import Sequence as RolloutSequence
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
TREE = Strategy(source="suffix", depth=4, top_k=3, num_verify=9)
CHAIN = Strategy(source="suffix", depth=4, top_k=1, num_verify=4)


@dataclass
class ScriptedDrafter:
    """Proposes trees that hold the true continuation with a given probability a level, among wrong siblings.

    truth: what each sequence will sample; hit_rate 1 is an oracle, 0 always wrong. Deterministic in the sequence's
    state. Checks that it is told everything: begin once unless finished, every token, finish at the end.
    """

    truth: dict[Key, list[int]]
    hit_rate: float
    vocab_size: int
    seed: int = 0
    texts: dict[Key, list[int]] = field(default_factory=dict)
    prompt_lens: dict[Key, int] = field(default_factory=dict)
    finished: set[Key] = field(default_factory=set)

    def begin(self, prompt_id: str, sample: int, prompt_ids: Sequence[int]) -> None:
        assert (prompt_id, sample) not in self.texts or (prompt_id, sample) in self.finished
        self.finished.discard((prompt_id, sample))
        self.texts[prompt_id, sample] = list(prompt_ids)
        self.prompt_lens[prompt_id, sample] = len(prompt_ids)

    def extend(self, prompt_id: str, sample: int, token_ids: Sequence[int]) -> None:
        self.texts[prompt_id, sample] += token_ids

    def finish(self, prompt_id: str, sample: int) -> None:
        assert (prompt_id, sample) not in self.finished
        self.finished.add((prompt_id, sample))

    def propose(self, states: Sequence[DraftState], strategy: Strategy) -> list[Draft]:
        return [self._tree(state, strategy) for state in states]

    def _tree(self, state: DraftState, strategy: Strategy) -> Draft:
        assert self.texts[state.prompt_id, state.sample] == list(state.token_ids)
        choices = random.Random(f"{self.seed}:{state.prompt_id}:{state.sample}:{len(state.token_ids)}")
        done = len(state.token_ids) - self.prompt_lens[state.prompt_id, state.sample]
        future = self.truth.get((state.prompt_id, state.sample), [])[done:]
        tokens: list[int] = []
        parents: list[int] = []
        levels: list[int] = []
        on_path: dict[int, int] = {-1: 0}  # node: how much of the future it has passed
        for _ in range(choices.randint(0, strategy.num_verify)):
            candidates = [-1, *range(len(tokens))] if strategy.top_k > 1 else [len(tokens) - 1]
            parent = choices.choice(candidates)
            level = 1 if parent < 0 else levels[parent] + 1
            siblings = [token for token, other in zip(tokens, parents, strict=True) if other == parent]
            if level > strategy.depth or len(siblings) >= strategy.top_k:
                continue
            passed = on_path.get(parent, len(future))
            right = future[passed] if passed < len(future) else None
            wanted = right if choices.random() < self.hit_rate else None
            token = choices.randrange(self.vocab_size) if wanted is None or wanted in siblings else wanted
            if token in siblings or (self.hit_rate == 0 and token == right):
                continue
            if token == right:
                on_path[len(tokens)] = passed + 1
            tokens.append(token)
            parents.append(parent)
            levels.append(level)
        return Draft(token_ids=tokens, parents=parents)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]


@dataclass
class ResidentScripted:
    """The scripted drafter over texts on the device. Checks what it is told: tokens, begin and finish."""

    truth: dict[Key, list[int]]
    hit_rate: float
    vocab_size: int
    prompts: dict[int, tuple[str, int]] = field(default_factory=dict)  # text: prompt id and length
    num_finished: int = 0
    num_refreshed: int = 0

    def attach(self, texts: Texts) -> None:
        assert (texts.groups == -1).all()

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        for each in begun:
            assert each.text not in self.prompts, "a text in use is given away"
            assert each.text not in free_texts
            assert each.length >= len(each.prompt_ids)
            self.prompts[each.text] = (each.prompt_id, len(each.prompt_ids))
        return [[] for _ in begun]

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        assert strategy.num_verify and grown >= 0
        self.num_refreshed += 1

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        assert self.num_refreshed, "it is told before it proposes"
        self.num_refreshed = 0
        for row in range(out.token_ids.shape[0]):
            text = int(rows.text[row])
            draft = Draft([], [])
            if rows.active[row]:
                tokens = texts.tokens[text, : int(texts.lengths[text])].tolist()
                draft = self._draft(text, tokens, strategy)
            out.num_nodes[row] = len(draft.token_ids)
            out.token_ids[row] = out.parents[row] = 7  # what lies past the nodes must not matter
            out.token_ids[row, : len(draft.token_ids)] = torch.tensor(draft.token_ids)
            out.parents[row, : len(draft.parents)] = torch.tensor(draft.parents)

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        assert self.prompts[text][0] == prompt_id
        self.num_finished += 1

    def release(self, texts: Sequence[int]) -> None:
        for text in texts:
            del self.prompts[text]

    def _draft(self, text: int, tokens: list[int], strategy: Strategy) -> Draft:
        prompt_id, prompt_len = self.prompts[text]
        response = tokens[prompt_len:]
        # a text does not say which sample it is: the first that agrees so far
        agreeing = (
            key for key, truth in self.truth.items() if key[0] == prompt_id and truth[: len(response)] == response
        )
        key = next(agreeing, (prompt_id, 0))
        scripted = ScriptedDrafter(self.truth, self.hit_rate, self.vocab_size)
        scripted.texts[key], scripted.prompt_lens[key] = tokens, prompt_len
        state = DraftState(prompt_id=prompt_id, sample=key[1], token_ids=tokens, max_tokens=1)
        return scripted.propose([state], strategy)[0]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.fixture
def chain() -> Strategy:
    return CHAIN


@pytest.fixture
def tree() -> Strategy:
    return TREE


@pytest.fixture
def scripted_drafter() -> type[ScriptedDrafter]:
    return ScriptedDrafter


@pytest.fixture
def resident_scripted() -> type[ResidentScripted]:
    return ResidentScripted


@pytest.fixture
def learned_drafting() -> Callable[..., tuple[CombinedDrafter, FeatureRings]]:
    """A suffix drafter beside a served head of random weights, and the rings it reads; what sink is given of them."""

    def make(policy: PreTrainedModel, sink: Any = None) -> tuple[CombinedDrafter, FeatureRings]:
        config = EagleConfig.of(policy.config, draft_vocab=128, window=12)
        rings = FeatureRings(
            aux_layers=config.aux_layers,
            hidden_size=config.hidden_size,
            window=8,
            max_nodes=TREE.num_verify,
            dtype=policy.dtype,
            device=policy.device,
            sink=sink,
            max_windows=math.inf,
        )
        embedding = policy.get_input_embeddings().weight.detach()
        eagle = EagleDrafter(config, embedding=embedding, rings=rings, temperature=1.0, device=policy.device)
        head = EagleHead(config, seed=0).to(policy.device)
        eagle.publish(head.state_dict(), version=1)
        return CombinedDrafter({"suffix": NgramDrafter(min_match=1), "eagle": eagle}), rings

    return make


@pytest.fixture
def make_sequence() -> Callable[..., RolloutSequence]:
    """A sequence from a prompt id and token ids."""

    def make(
        prompt_id: str, token_ids: list[int], *, sample: int = 0, max_new_tokens: int = 8, block_size: int = 4
    ) -> RolloutSequence:
        prompt = Prompt(id=prompt_id, token_ids=token_ids, answer="")
        return RolloutSequence(
            prompt=prompt,
            sample=sample,
            noise_key=0,
            max_length=len(token_ids) + max_new_tokens,
            block_size=block_size,
        )

    return make


@pytest.fixture(scope="session")
def long_prompts() -> list[Prompt]:
    """Three of many times a sparse budget, two of which begin alike."""
    choices = random.Random(1)
    common, *ends = ([choices.randrange(3, 259) for _ in range(count)] for count in (70, 9, 23, 100))
    texts = [common + ends[0], common + ends[1], ends[2]]
    return [Prompt(id=f"p{number}", token_ids=text, answer="") for number, text in enumerate(texts)]


@pytest.fixture(scope="session")
def policy(tiny_model_dir: Path) -> PreTrainedModel:
    """The tiny model in float32."""
    return load_policy(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Four prompts: shorter than a block, longer than several, and two with a common beginning."""
    choices = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [choices.randrange(3, 259) for _ in range(count)]

    common = tokens(11)
    texts = [tokens(1), tokens(23), common + tokens(3), common + tokens(8)]
    return [Prompt(id=f"p{number}", token_ids=text, answer="") for number, text in enumerate(texts)]


@pytest.fixture(scope="session")
def make_engine(policy: PreTrainedModel) -> Callable[..., NativeEngine]:
    """An engine around the tiny policy; keyword arguments are RolloutConfig's."""

    def make(
        drafter: Drafter | ResidentDrafter | None = None,
        strategy: Strategy = OFF,
        *,
        cycles: Literal["hosted", "resident"] = "hosted",
        **options: Any,
    ) -> NativeEngine:
        rollout = RolloutConfig(**({"block_size": 4, "max_running": 8} | options))
        return NativeEngine(policy, drafter=drafter, chooser=FixedChooser(strategy), rollout=rollout, cycles=cycles)

    return make


@pytest.fixture
def assert_same() -> Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]:
    """Hold rollouts against others: the same tokens and ends, and log-probs up to rounding."""

    def compare(rollouts: dict[Key, Rollout], expected: dict[Key, Rollout]) -> None:
        assert rollouts.keys() == expected.keys()
        for key, rollout in rollouts.items():
            assert rollout.token_ids == expected[key].token_ids, key
            assert rollout.finish == expected[key].finish
            # 1e-4: float32 sums in another order
            assert rollout.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)

    return compare


@pytest.fixture(
    params=[
        {"kv_tokens": 48},
        {"kv_tokens": 64, "max_running": 3},
        {"max_running": 1},
        {"max_running": 5, "prefill_tokens": 1},
        {"prefill_tokens": 3},
        {"prefill_tokens": 17, "kv_tokens": 80},
        {"block_size": 1},
        {"block_size": 64},
    ],
    ids=str,
)
def options(request: pytest.FixtureRequest) -> dict[str, int]:
    """RolloutConfig options that force preemption, small batches, chunked prompts or odd blocks."""
    return dict(request.param)


@pytest.fixture(scope="session")
def collect() -> Callable[..., dict[Key, Rollout]]:
    """Run an engine to the end: its rollouts by (prompt id, sample)."""

    def run(engine: NativeEngine, prompts: Sequence[Prompt], sampling: Sampling) -> dict[Key, Rollout]:
        async def all_rollouts() -> dict[Key, Rollout]:
            return {(r.prompt_id, r.sample): r async for r in engine.generate(prompts, sampling)}

        return asyncio.run(all_rollouts())

    return run


@pytest.fixture
def checked_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cycle, a drafting one neither, reads past a row's block table; rows and texts are soon outgrown."""

    def checked(**inputs: Any) -> PagedSequences:
        table, queries = inputs["block_tables"], inputs["max_seqlen_q"]
        last = inputs["context_lens"] + queries - 1
        assert int(last.max()) // inputs["block_size"] < table.shape[1], "a padded node's key lies past the table"
        return paged_sequences(**inputs)

    monkeypatch.setattr("rollout.forward.paged_sequences", checked)
    # rows that begin short and few spare texts, so that both are outgrown
    monkeypatch.setattr("rollout.workspace.LENGTH_STEP", 16)
    monkeypatch.setattr("rollout.workspace.TEXT_BYTES", 300)
