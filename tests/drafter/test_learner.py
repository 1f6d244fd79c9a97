"""The drafter's life: it learns, is judged and published, and whatever fails leaves the head served as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import DrafterConfig
from drafter import checkpoint
from drafter.buffer import FeatureBuffer, FeatureWindow
from drafter.eagle import EagleConfig, EagleHead
from drafter.features import FeatureBatch
from drafter.learner import MAX_FAILURES, MIN_JUDGED, PATIENCE, Learner
from drafter.publish import Judgement, checksum, pooled
from drafter.trainer import DrafterStats, DrafterTrainer, evaluate

VOCAB, SIZE = 24, 16
SHAPE = EagleConfig(
    hidden_size=SIZE, intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB, draft_vocab=16,
    window=32, rms_norm_eps=1e-5, rope_theta=10_000.0, max_position_embeddings=256, aux_layers=(0, 1, 2),
)  # fmt: skip
CONFIG = DrafterConfig(unroll=3, lr=3e-3, batch_tokens=256)
COUNTS = torch.arange(VOCAB)


class Served:
    """Stands for EagleDrafter: keeps copies of what it is given."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.state: dict[str, torch.Tensor] = {}

    def publish(self, state: dict[str, torch.Tensor], version: int) -> None:
        self.versions.append(version)
        self.state = {name: tensor.clone() for name, tensor in state.items()}

    def withdraw(self) -> None:
        self.state = {}


class Toy:
    """A policy whose next token depends on the last alone, with features of its texts in a buffer."""

    def __init__(self, seed: int = 5, *, temperature: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        weights = torch.Generator().manual_seed(1)
        self.embedding, lm_head = torch.randn(2, VOCAB, SIZE, generator=weights)
        self.lm_head = 2 * lm_head
        states = torch.randn(VOCAB, SIZE, generator=weights)
        mixing = torch.randn(SIZE, 3 * SIZE, generator=weights) / SIZE**0.5
        probs = (states @ self.lm_head.T).softmax(dim=1)
        self.buffer = FeatureBuffer(max_bytes=1 << 20, temperature=temperature)
        for index in range(60):
            tokens = [int(torch.randint(VOCAB, (1,), generator=draw))]
            for _ in range(20):
                tokens.append(int(torch.multinomial(probs[tokens[-1]], 1, generator=draw)))
            ids = torch.tensor(tokens)
            hidden = states[ids[:-1]]
            window = FeatureWindow(
                prompt_id=f"p{index}",
                first=8 * (index % 5),
                version=0,
                token_ids=ids[:-1],
                next_ids=ids[1:],
                aux=hidden @ mixing,
                hidden=hidden,
                alt_ids=torch.full((20,), -1),
                alt_hidden=torch.zeros(20, SIZE),
            )
            self.buffer.add(window)
        assert self.buffer.num_tokens
        self.served = Served()

    def learner(self, config: DrafterConfig = CONFIG, *, head: EagleHead | None = None) -> Learner:
        return Learner(
            head or EagleHead(SHAPE, seed=1),
            drafter=self.served,
            buffer=self.buffer,
            embedding=self.embedding,
            lm_head=self.lm_head,
            config=config,
            dtype=torch.float32,
        )

    def taught(self, updates: int) -> Learner:
        """A learner after so many updates, none of them judged."""
        learner = self.learner()
        learner.begin(COUNTS)
        learner.learn(budget_s=600, until=steps(updates))
        return learner


def steps(count: int) -> Callable[[], bool]:
    """An until that allows so many steps."""
    left = iter(range(count))
    return lambda: next(left, None) is None


def judged(
    candidate: float, served: float, last_good: float, num_tokens: int = 100, doubts: tuple[float, float] = (0.0, 0.0)
) -> Judgement:
    return Judgement(candidate, served, last_good, num_tokens, *doubts)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner._trainer.head.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_is_published_when_better_and_drafts_what_was_judged() -> None:
    toy = Toy()
    learner = toy.learner()
    assert learner.learn(budget_s=600, until=steps(5)).num_steps == 0, "no vocabulary yet"
    learner.begin(COUNTS)
    assert toy.served.versions == [], "random weights are not served"
    lengths = []
    for _ in range(4):
        assert learner.learn(budget_s=600, until=steps(20)).num_steps == 20
        report = learner.settle(0)
        lengths.append(report.accept_length)
        assert report.num_steps == 20 and not report.off
    assert lengths[-1] > lengths[0] > 1
    assert toy.served.versions == list(range(1, report.version + 1)) and report.version >= 2
    assert checksum(toy.served.state) == report.checksum
    assert toy.served.state["d2t"].max() == VOCAB - 16, "the most frequent tokens can be proposed"


def test_a_step_that_would_exceed_the_budget_is_not_taken() -> None:
    learner = Toy().learner()
    learner.begin(COUNTS)
    assert learner.learn(budget_s=0.0, until=lambda: False).num_steps == 0
    first = learner.learn(budget_s=600, until=steps(1))
    assert first.step_s > 0
    assert learner.learn(budget_s=first.step_s / 2, until=lambda: False).num_steps == 0


def test_equal_weights_are_not_published_again() -> None:
    toy = Toy()
    learner = toy.taught(30)
    assert learner.settle(0).outcome == "published"
    assert learner.settle(0).outcome == "kept", "nothing was learned since"
    learner._unjudged = True
    report = learner.settle(0)
    assert report.accept_length == report.served_accept_length and report.outcome == "kept"
    assert toy.served.versions == [1]


def test_updates_that_are_not_finite_leave_the_weights_and_at_last_turn_the_drafter_off() -> None:
    toy = Toy()
    learner = toy.taught(20)
    learner.settle(0)
    before = weights_of(learner)
    toy.embedding[:] = torch.nan
    for turn in range(MAX_FAILURES):
        assert not learner.off
        learner.learn(budget_s=600, until=steps(2))
        assert same(weights_of(learner), before), f"turn {turn}"
    assert "not finite" in learner.off
    assert learner.learn(budget_s=600, until=lambda: False).num_steps == 0
    assert learner.settle(0).off == learner.off and toy.served.versions == [1], "the last good head stays"


def test_a_trainer_that_dies_costs_what_it_had_learned_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    learner = toy.taught(20)
    learner.settle(0)
    before = weights_of(learner)
    step = DrafterTrainer.step
    calls = iter(range(100))

    def dies(trainer: DrafterTrainer, batch: FeatureBatch) -> DrafterStats:
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return step(trainer, batch)

    monkeypatch.setattr(DrafterTrainer, "step", dies)
    learner.learn(budget_s=600, until=steps(10))
    assert same(weights_of(learner), before) and not learner.off and learner.delta() == {}
    assert learner.learn(budget_s=600, until=steps(10)).num_steps == 10, "it goes on"


def test_training_that_finds_no_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    learner = toy.learner()
    learner.begin(COUNTS)

    def starves(trainer: DrafterTrainer, batch: FeatureBatch) -> DrafterStats:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(DrafterTrainer, "step", starves)
    for _ in range(MAX_FAILURES):
        learner.learn(budget_s=600, until=steps(1))
    assert learner.off.endswith("no memory to train it; lower drafter.batch_tokens or drafter.buffer_mb")


def test_a_ruined_copy_starts_again_from_the_last_good_weights() -> None:
    toy = Toy()
    learner = toy.taught(40)
    learner.settle(0)
    before = weights_of(learner)
    with torch.no_grad():
        learner._trainer.head.fc.weight.normal_()
        learner._trainer.head.norm.weight.mul_(-1)
    learner._unjudged = True
    report = learner.settle(0)
    assert report.outcome == "kept" and report.accept_length < report.served_accept_length
    assert same(weights_of(learner), before) and toy.served.versions == [1]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_weights_that_are_not_finite_are_never_served(temperature: float) -> None:
    """Greedy acceptance is a number even of logits that are none."""
    toy = Toy(temperature=temperature)
    learner = toy.learner()
    learner.begin(COUNTS)
    with torch.no_grad():
        learner._trainer.head.fc.weight[0, 0] = torch.inf
    learner._unjudged = True
    learner.settle(0)
    assert toy.served.versions == [] and learner._trainer.head.fc.weight.isfinite().all()


def test_a_head_that_turns_out_worse_gives_way_to_the_one_before() -> None:
    toy = Toy()
    learner = toy.taught(40)
    learner.settle(0)
    good = checksum(toy.served.state)
    publisher = learner._publisher
    bad = EagleHead(SHAPE, seed=3).state_dict()
    publisher.propose(bad)
    publisher.follow("published")  # judged on features that did not tell
    assert checksum(toy.served.state) == checksum(bad)
    publisher.propose(bad)
    heldout = toy.buffer.heldout(1000, version=0)
    assert heldout is not None
    verdict = publisher.judge(heldout).verdict
    assert verdict == "rolled back"
    publisher.follow(verdict)
    assert checksum(toy.served.state) == good and toy.served.versions == [1, 2, 3]


def test_what_is_served_is_no_ones_storage() -> None:
    """Neither the policy's nor the trained copy's: training never changes a draft before it is published."""
    toy = Toy()
    learner = toy.learner()
    learner.begin(COUNTS)
    policy = {tensor.untyped_storage().data_ptr() for tensor in (toy.embedding, toy.lm_head)}
    trained = {tensor.untyped_storage().data_ptr() for tensor in learner._trainer.head.state_dict().values()}
    learner.learn(budget_s=600, until=steps(20))
    learner.settle(0)
    served = {tensor.untyped_storage().data_ptr() for tensor in learner._publisher.served.values()}
    assert not policy & trained and not policy & served and not trained & served
    before = checksum(learner._publisher.served)
    embedding, lm_head = toy.embedding.clone(), toy.lm_head.clone()
    learner.learn(budget_s=600, until=steps(5))
    assert checksum(learner._publisher.served) == before
    assert torch.equal(toy.embedding, embedding) and torch.equal(toy.lm_head, lm_head)


def test_replicas_agree_after_a_publish_though_each_learned_from_its_own_features() -> None:
    toys = [Toy(seed) for seed in (5, 6, 7)]
    learners = [toy.learner() for toy in toys]
    for learner in learners:
        learner.begin(COUNTS)
    for turn in range(3):
        for learner in learners[: 3 - turn]:  # those without an idle moment learn nothing, one is lost at last
            learner.learn(budget_s=600, until=steps(15))
        deltas = [learner.delta() for learner in learners]
        assert [bool(delta) for delta in deltas] == [index < 3 - turn for index in range(3)]
        for learner in learners:
            learner.apply(deltas)
        judgements = [judgement for learner in learners if (judgement := learner.judge(0)) is not None]
        reports = [learner.conclude(pooled(judgements)) for learner in learners]
        assert len({(report.version, report.checksum) for report in reports}) == 1
        assert len({checksum(toy.served.state) for toy in toys}) == 1
        assert same(weights_of(learners[0]), weights_of(learners[1]))
    assert reports[0].version > 0


def test_only_failures_in_a_row_turn_the_drafter_off() -> None:
    toy = Toy()
    learner = toy.learner()
    learner.begin(COUNTS)
    embedding = toy.embedding.clone()
    for _ in range(MAX_FAILURES):
        toy.embedding[:] = torch.nan
        learner.learn(budget_s=600, until=steps(2))
        toy.embedding[:] = embedding
        learner.learn(budget_s=600, until=steps(2))
        assert not learner.settle(0).off


def test_what_workers_learned_is_averaged_and_who_learned_nothing_counts_for_nothing() -> None:
    learner = Toy().learner()
    learner.begin(COUNTS)
    base = weights_of(learner)
    names = [name for name, _ in learner._trainer.head.named_parameters()]
    deltas = [{name: torch.full_like(base[name], size) for name in names} for size in (0.5, 1.0)]
    learner.learn(budget_s=600, until=steps(2))  # its own is among the deltas, or is lost with it
    learner.apply([*deltas, {}])
    found = weights_of(learner)
    for name in names:
        torch.testing.assert_close(found[name], base[name] + 0.75, msg=name)
    learner.apply([])
    assert same(weights_of(learner), base), "without a delta all go on from what they agreed on"


def test_a_worker_that_became_another_goes_on_as_that_one_does() -> None:
    toys = [Toy(), Toy()]
    one, other = learners = [toy.learner() for toy in toys]
    for learner in learners:
        learner.begin(COUNTS)
        learner.learn(budget_s=600, until=steps(30))
    one.settle(0)
    one.learn(budget_s=600, until=steps(30))
    one.settle(0)
    before = other.delta()
    assert before and toys[1].served.versions == []
    version = one._publisher.version
    assert other.become(one.replica()) == (version, checksum(toys[0].served.state))
    assert same(toys[1].served.state, toys[0].served.state) and toys[1].served.versions == [version]
    assert same(weights_of(other), weights_of(one))
    assert same(other._publisher.last_good, one._publisher.last_good)
    storages = {tensor.untyped_storage().data_ptr() for tensor in one._publisher.served.values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in other._publisher.served.values()}


def test_a_worker_that_refuses_another_ones_head_tells_by_what_it_serves() -> None:
    toys = [Toy(), Toy()]
    one, other = (toy.learner() for toy in toys)
    one.begin(COUNTS)
    one.learn(budget_s=600, until=steps(30))
    one.settle(0)

    def refuse(state: dict[str, torch.Tensor], version: int) -> None:
        raise RuntimeError("out of memory")

    toys[1].served.publish = refuse  # type: ignore[method-assign]
    assert other.become(one.replica()) == (0, "")


def test_a_drafter_that_is_given_up_drafts_no_more_and_learns_no_more(tmp_path: Path) -> None:
    toy, other = Toy(), Toy()
    learner = toy.taught(30)
    learner.settle(0)
    assert learner.give_up("workers differ") == (0, "")
    assert toy.served.state == {} and learner.learn(budget_s=600, until=lambda: False).num_steps == 0
    report = learner.settle(0)
    assert (report.version, report.off, report.outcome) == (0, "workers differ", "kept")
    learner.save(tmp_path / "drafter")
    learner.saved()
    resumed = other.learner(replace(CONFIG, init="somewhere"))
    assert other.served.versions == [1], "what it was given"
    resumed.load(tmp_path / "drafter")
    assert other.served.state == {} and resumed.off == "workers differ"


def test_a_gain_that_is_next_to_none_changes_nothing() -> None:
    assert judged(2.03, 2.0, 2.03).verdict == "kept"
    assert judged(2.05, 2.0, 2.05).verdict == "published"
    assert judged(2.03, 2.0, 2.05).verdict == "rolled back"


def test_a_gain_within_two_standard_errors_changes_nothing() -> None:
    assert judged(2.5, 2.0, 2.5, doubts=(0.26, 0.26)).verdict == "kept"
    assert judged(2.5, 2.0, 2.5, doubts=(0.24, 0.26)).verdict == "published"
    assert judged(2.5, 2.0, 2.5, doubts=(0.26, 0.24)).verdict == "rolled back"


def test_heads_that_differ_by_chance_alone_seldom_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    learner = toy.taught(40)
    assert learner.settle(0).outcome == "published"
    publisher, heldout = learner._publisher, toy.buffer.heldout(1000, version=0)
    assert heldout is not None
    count = len(heldout.versions)
    publisher.propose(learner._trainer.head.state_dict())
    publisher._has_last_good = True
    chance = torch.Generator().manual_seed(0)

    def reached(head: EagleHead, batch: FeatureBatch) -> torch.Tensor:
        """By window, give or take a third; by the candidate more."""
        each = 0.3 + (gain if head is publisher._candidate else 0.0)
        return each + 0.1 * torch.randn(count, generator=chance, dtype=torch.float64)

    monkeypatch.setattr(publisher, "_reached", reached)
    gain = 0.0
    verdicts = [publisher.judge(heldout).verdict for _ in range(400)]
    assert verdicts.count("published") < 36 and verdicts.count("rolled back") < 36, "one in twenty each, of 7 windows"
    gain = 0.2
    verdicts = [publisher.judge(heldout).verdict for _ in range(100)]
    assert verdicts.count("published") > 80


def test_windows_add_up_to_the_accept_length_and_one_alone_tells_nothing() -> None:
    toy = Toy()
    learner = toy.taught(40)
    learner.settle(0)
    learner.learn(budget_s=600, until=steps(40))
    publisher = learner._publisher
    publisher.propose(learner._trainer.head.state_dict())
    heldout = toy.buffer.heldout(1000, version=0)
    assert heldout is not None and len(heldout.versions) > 1
    judgement = publisher.judge(heldout)
    figures = evaluate(
        publisher._candidate, heldout, embedding=toy.embedding, lm_head=toy.lm_head, config=learner._config
    )
    assert judgement.candidate == pytest.approx(figures.accept_length, abs=1e-5)
    difference = abs(judgement.candidate - judgement.served)
    assert 0 < judgement.candidate_doubt < difference * len(heldout.versions)
    one = publisher.judge(toy.buffer.heldout(1, version=0))  # type: ignore[arg-type]
    assert one.candidate_doubt == pytest.approx(abs(one.candidate - one.served)) and one.verdict == "kept"


def test_pooled_judgements_weigh_by_positions() -> None:
    first, second = judged(2.0, 1.5, 1.0, 300, doubts=(0.4, 0.0)), judged(1.0, 1.9, 1.0, 100, doubts=(1.6, 0.4))
    assert pooled([first, second]) == judged(1.75, 1.6, 1.0, 400, doubts=(0.5, 0.1))
    assert pooled([first, replace(second, candidate=float("nan"))]).is_finite is False


def test_a_head_is_judged_by_features_of_the_present_policy_alone() -> None:
    toy = Toy()
    learner = toy.taught(40)
    assert learner.judge(1) is None, "the features are of version 0"
    assert learner.settle(1).outcome == "kept" and toy.served.versions == []
    assert learner.settle(0).outcome == "published", "what was not judged then is judged now"


def test_too_few_held_out_positions_publish_nothing_and_the_next_step_judges() -> None:
    toy = Toy()
    learner = toy.taught(40)
    judgement = learner.judge(0)
    assert judgement is not None and judgement.verdict == "published"
    report = learner.conclude(replace(judgement, num_tokens=MIN_JUDGED - 1))
    assert report.outcome == "kept" and not report.off and toy.served.versions == []
    ruined = learner.conclude(judged(1.0, 2.0, 1.0, MIN_JUDGED - 1))
    assert not ruined.off and learner._failures == 0, "by so few nothing is ruined either"
    assert learner.settle(0).outcome == "published"


def test_steps_without_a_held_out_prompt_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    learner = toy.taught(5)
    for _ in range(PATIENCE - 1):
        learner.settle(1)
    assert not caplog.text
    for _ in range(PATIENCE):
        learner.settle(1)
    assert caplog.text.count("raise rollout.prompts_per_step") == 1


def test_a_resumed_drafter_is_the_saved_one_bit_for_bit(tmp_path: Path) -> None:
    toy, other = Toy(), Toy()
    learner = toy.taught(20)
    learner.settle(0)
    learner.learn(budget_s=600, until=steps(3))  # ahead of what is served
    assert learner.save(tmp_path / "drafter") > 0
    learner.saved()
    resumed = other.learner(head=EagleHead(SHAPE, seed=9))
    resumed.load(tmp_path / "drafter")
    assert same(weights_of(resumed), weights_of(learner))
    assert same(other.served.state, toy.served.state) and other.served.versions == [1]
    batch = toy.buffer.batch(256)
    learner._trainer.step(batch)
    resumed._trainer.step(batch)
    assert same(weights_of(resumed), weights_of(learner)), "the optimiser goes on too"
    small = Learner(
        EagleHead(replace(SHAPE, draft_vocab=8)),
        drafter=other.served,
        buffer=other.buffer,
        embedding=other.embedding,
        lm_head=other.lm_head,
        config=CONFIG,
        dtype=torch.float32,
    )
    with pytest.raises(ConfigError, match="draft_vocab=16"):
        small.load(tmp_path / "drafter")


def test_a_checkpoint_holds_the_heads_tensors_and_nothing_of_the_policy(tmp_path: Path) -> None:
    toy = Toy()
    learner = toy.taught(2)
    for _ in range(2):
        learner._publisher.propose(learner._trainer.head.state_dict())
        learner._publisher.follow("published")
    learner.save(tmp_path / "drafter")
    learner.saved()
    _, files = checkpoint.read(tmp_path / "drafter")
    head = learner._trainer.head
    moments = {f"{moment}.{name}" for name, _ in head.named_parameters() for moment in ("exp_avg", "exp_avg_sq")}
    assert {name: set(tensors) for name, tensors in files.items()} == {
        "training": {f"head.{name}" for name in head.state_dict()} | moments | {"steps"},
        "served": set(head.state_dict()),
        "last_good": set(head.state_dict()),
    }


def test_a_resumed_drafter_goes_back_to_the_last_good_head_as_the_saved_one_would(tmp_path: Path) -> None:
    toy, other = Toy(), Toy()
    learner = toy.taught(40)
    learner.settle(0)
    good = checksum(toy.served.state)
    bad = EagleHead(SHAPE, seed=3).state_dict()
    learner._publisher.propose(bad)
    learner._publisher.follow("published")  # judged on features that did not tell
    learner._unjudged = True
    learner.save(tmp_path / "drafter")
    learner.saved()
    resumed = other.learner(head=EagleHead(SHAPE, seed=9))
    resumed.load(tmp_path / "drafter")
    assert checksum(other.served.state) == checksum(bad)
    with torch.no_grad():
        for each in (learner, resumed):
            each._trainer.head.load_state_dict(bad)
    saved, again = learner.settle(0), resumed.settle(0)
    assert saved.outcome == again.outcome == "rolled back" and again.version == saved.version == 3
    assert checksum(other.served.state) == checksum(toy.served.state) == good


@pytest.mark.parametrize("failures", [MAX_FAILURES - 1, MAX_FAILURES])
def test_a_resumed_drafter_remembers_its_failures_and_why_it_is_off(tmp_path: Path, failures: int) -> None:
    toy, other = Toy(), Toy()
    learner = toy.taught(20)
    learner.settle(0)
    toy.embedding[:] = torch.nan
    for _ in range(failures):
        learner.learn(budget_s=600, until=steps(2))
    learner.save(tmp_path / "drafter")
    learner.saved()
    resumed = other.learner(head=EagleHead(SHAPE, seed=9))
    resumed.load(tmp_path / "drafter")
    assert resumed.off == learner.off and bool(resumed.off) == (failures == MAX_FAILURES)
    assert same(other.served.state, toy.served.state), "what was served drafts on"
    other.embedding[:] = torch.nan
    resumed.learn(budget_s=600, until=steps(2))
    assert "not finite" in resumed.off, "the next failure in a row is the last"
    assert resumed.settle(0).off == resumed.off


def test_what_is_turned_off_by_the_options_learns_again_when_they_say_so(tmp_path: Path) -> None:
    toy, other = Toy(), Toy()
    learner = toy.learner(replace(CONFIG, init="somewhere", train=False))
    assert learner.off == "drafter.train=false"
    learner.save(tmp_path / "drafter")
    learner.saved()
    resumed = other.learner()
    resumed.load(tmp_path / "drafter")
    assert not resumed.off and resumed.learn(budget_s=600, until=steps(2)).num_steps == 2


def test_a_given_drafter_is_served_at_once_and_may_be_left_untrained() -> None:
    toy = Toy()
    head = EagleHead(SHAPE, seed=4)
    learner = toy.learner(replace(CONFIG, init="somewhere", train=False), head=head)
    assert toy.served.versions == [1] and checksum(toy.served.state) == checksum(head.state_dict())
    learner.begin(COUNTS)
    assert learner.learn(budget_s=600, until=lambda: False).num_steps == 0
    assert learner.settle(0).off == "drafter.train=false" and toy.served.versions == [1]


def test_a_checksum_tells_any_change_and_any_exchange() -> None:
    state = EagleHead(SHAPE).state_dict()
    before = checksum(state)
    assert before == checksum({name: state[name].clone() for name in reversed(state)})
    for name, tensor in state.items():
        flat = tensor.flatten()
        other = flat.clone()
        other[-1] = 1 - flat[-1].int() if flat.dtype == torch.bool else flat[-1] + 1
        assert checksum(state | {name: other.view(tensor.shape)}) != before, name
        if flat[0] != flat[-1]:
            other = flat.clone()
            other[0], other[-1] = flat[-1], flat[0]
            assert checksum(state | {name: other.view(tensor.shape)}) != before, name


def test_a_ruined_copy_goes_back_to_the_head_served_though_settles_were_skipped_since() -> None:
    toy = Toy()
    learner = toy.taught(40)
    assert learner.settle(0).outcome == "published"
    with torch.no_grad():
        for parameter in learner._trainer.head.parameters():
            parameter.normal_()
    learner.conclude(None)  # a settle that judges nothing, after which all agree on the ruin
    report = learner.conclude(judged(1.0, 2.0, 1.0))
    assert report.outcome == "kept" and not report.off
    assert same(
        dict(learner._trainer.head.named_parameters()),
        {n: toy.served.state[n] for n, _ in learner._trainer.head.named_parameters()},
    )


def test_the_served_accept_length_is_of_the_head_served_from_now_on() -> None:
    toy = Toy()
    learner = toy.taught(40)
    judgement = learner.judge(0)
    assert judgement is not None
    report = learner.conclude(judgement)
    assert report.outcome == "published" and report.served_accept_length == judgement.candidate > judgement.served


def test_a_drafter_that_refuses_new_weights_leaves_the_old_ones_known_as_served() -> None:
    toy = Toy()
    learner = toy.taught(20)
    first = learner.settle(0)
    assert first.outcome == "published"

    def refuse(state: dict[str, torch.Tensor], version: int) -> None:
        raise RuntimeError("out of memory")

    toy.served.publish = refuse  # type: ignore[method-assign]
    learner.learn(budget_s=600, until=steps(40))
    report = learner.settle(0)
    assert (report.outcome, report.version, report.checksum) == ("kept", first.version, first.checksum)
    assert same(learner._publisher.served, toy.served.state)
