"""The drafter's life: it learns from the features of the run it drafts for, and serves when it got better.

Nothing that befalls it ends the run: what fails is put back to the last good head, and what keeps failing is left
alone, with a reason, while the head served goes on drafting.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from configs.errors import ConfigError
from configs.schema import DrafterConfig
from drafter import checkpoint
from drafter.allocation import is_out_of_memory
from drafter.buffer import FeatureBuffer
from drafter.checkpoint import CheckpointWriter
from drafter.eagle import EagleConfig, EagleHead
from drafter.features import FeatureBatch
from drafter.publish import Judgement, Outcome, Publisher, Serves
from drafter.report import DrafterReport, LearnStats, Replica, Standing
from drafter.trainer import DrafterStats, DrafterTrainer, choose_vocabulary

MAX_FAILURES = 3  # in a row, before it is left alone
RUINED = 0.8  # of the served head's accept length: a trained copy below it starts again from the head served
MAX_JUDGING = 0.5  # of the time spent training, at most, is spent judging
MIN_JUDGED = 64  # held-out positions of all workers: by fewer nothing is published, and the next step may judge
PATIENCE = 8  # steps without a held-out prompt before that is said

TRAINING, SERVED, LAST_GOOD = "training", "served", "last_good"  # files of a checkpoint

log = logging.getLogger(__name__)


class Learner:
    """The trained copy of the head, what it learns from, and the publishing of it: one worker's.

    With several workers each trains its own copy: deltas are averaged and applied, judgements pooled, and all settle
    the same. A single worker's settle does both in one.
    """

    def __init__(
        self,
        head: EagleHead,
        *,
        drafter: Serves,
        buffer: FeatureBuffer,
        embedding: torch.Tensor,
        lm_head: torch.Tensor,
        config: DrafterConfig,
        dtype: torch.dtype,
    ) -> None:
        """head: float32, on the policy's device; with config.init it is served as it is, else its vocabulary is still
        to be chosen. embedding, lm_head [V, H]: the policy's, as they are at any time. dtype: of the weights served."""
        self.ready = bool(config.init)
        self._config = config
        self._buffer = buffer
        self._lm_head = lm_head
        self._trainer = DrafterTrainer(head, embedding=embedding, lm_head=lm_head, config=config)
        self._publisher = Publisher(drafter, head, embedding=embedding, lm_head=lm_head, config=config, dtype=dtype)
        self._writer = CheckpointWriter()
        self._base: dict[str, torch.Tensor] = {}  # weights that all workers agreed on last
        self._fresh: list[DrafterStats] = []  # steps since the last report
        self._unjudged = False  # whether it has learned since it was last judged
        self._step_s = 0.0
        self._trained_s = 0.0
        self._judged_s = 0.0
        self._failures = 0  # in a row
        self._given_up = ""  # why
        self._num_without = 0  # steps in a row without held-out features
        if self.ready:
            self._publisher.restore(head.state_dict(), 1, last_good={})
            self._agree()

    @property
    def off(self) -> str:
        """Why it learns no more, "" while it does."""
        return self._given_up or ("" if self._config.train else "drafter.train=false")

    def begin(self, counts: torch.Tensor) -> None:
        """Choose the tokens it can propose, by how often each was sampled: counts [V]. Once, before it learns."""
        if self.ready:
            return
        head = self._trainer.head
        d2t, t2d = choose_vocabulary(counts, head.config.draft_vocab)
        head.set_vocabulary(d2t, t2d, self._lm_head)
        self.ready = True
        self._agree()

    def learn(self, *, budget_s: float, until: Callable[[], bool]) -> LearnStats:
        """Train until told to stop, or another step would exceed the budget, or there is nothing to learn from.

        until is asked before every step.
        """
        begun = perf_counter()
        if self.off or not self.ready:
            return LearnStats(0, 0.0, self._step_s)

        def over() -> bool:
            return until() or perf_counter() - begun + self._step_s > budget_s

        stats: list[DrafterStats] = []
        try:
            stats = self._trainer.train(self._next_batch, until=over)
        except Exception as error:  # whatever it is, rollouts go on without what it would have brought
            log.warning("training the drafter failed", exc_info=True)
            self._fail(_reason(error), self._base)
        if stats:
            self._step_s = stats[-1].seconds
            if not any(step.applied for step in stats):
                self._fail(f"{len(stats)} updates in a row were not finite", self._base)
        applied = [step for step in stats if step.applied]
        self._fresh += applied
        self._unjudged |= bool(applied)
        seconds = perf_counter() - begun
        self._trained_s += seconds
        return LearnStats(len(stats), seconds, self._step_s)

    def settle(self, version: int) -> DrafterReport:
        """Judge what was learned since by features of this policy version, and publish it where it is better."""
        return self.conclude(self.judge(version))

    def judge(self, version: int) -> Judgement | None:
        """The trained copy against the head served, by held-out features of this policy version.

        None where there is nothing new, nothing to judge by or no time: the next step may judge then.
        """
        if self.off or not self._unjudged or self._judged_s > MAX_JUDGING * self._trained_s:
            return None
        begun = perf_counter()
        heldout = self._buffer.heldout(self._config.batch_tokens // 2, version=version)
        if heldout is None:
            self._count_step_without_heldout()
            return None
        self._num_without = 0
        self._unjudged = False
        try:
            self._publisher.propose(self._trainer.head.state_dict())
            return self._publisher.judge(heldout)
        except Exception as error:
            log.warning("judging the drafter failed", exc_info=True)
            self._count_failure(f"{type(error).__name__}: {error}")
            return None
        finally:
            self._judged_s += perf_counter() - begun

    def conclude(self, judgement: Judgement | None) -> DrafterReport:
        """Do as judged, this worker's judgement or several workers' pooled; how the drafter stands then."""
        outcome: Outcome = "kept"
        if judgement is not None:
            if not judgement.is_finite:
                self._fail("its weights are not finite", self._last_good())
            elif judgement.num_tokens < MIN_JUDGED:
                self._unjudged = True
                self._agree()
            elif judgement.candidate < RUINED * judgement.served:
                reason = f"accept length fell from {judgement.served:.2f} to {judgement.candidate:.2f}"
                self._fail(reason, self._last_good())
            else:
                self._failures = 0
                outcome = self._follow(judgement.verdict)
                self._agree()
        else:
            self._agree()
        steps, self._fresh = self._fresh, []
        nan = float("nan")
        return DrafterReport(
            num_steps=len(steps),
            loss=sum(step.loss for step in steps) / len(steps) if steps else nan,
            train_accept_length=sum(step.accept_length for step in steps) / len(steps) if steps else nan,
            accept_length=judgement.candidate if judgement else nan,
            served_accept_length=_served(judgement, outcome) if judgement else nan,
            version=self._publisher.version,
            checksum=self._publisher.checksum,
            outcome=outcome,
            buffer_tokens=self._buffer.num_tokens,
            seconds=self._trained_s + self._judged_s,
            off=self.off,
        )

    def delta(self) -> dict[str, torch.Tensor]:
        """What was learned since the workers last agreed, by parameter, on the host; {} for nothing."""
        if not self._fresh or self.off:
            return {}
        return {name: (value - self._base[name]).cpu() for name, value in self._parameters().items()}

    def apply(self, deltas: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Go on from what all agreed on last plus the mean of what they learned: the same on every worker, bit for bit.

        A lost worker's delta is simply not among them; {} counts for nothing. conclude makes it what all agree on.
        """
        learned = [delta for delta in deltas if delta]
        self._unjudged |= bool(learned)
        for name, value in self._parameters().items():
            value.copy_(self._base[name])
            if learned:
                value += torch.stack([delta[name] for delta in learned]).mean(dim=0).to(value.device)

    def replica(self) -> Replica:
        """What is served here, and the trained copy."""

        def on_host(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.detach().cpu() for name, tensor in state.items()}

        publisher = self._publisher
        return Replica(
            publisher.version,
            on_host(publisher.served),
            on_host(publisher.last_good),
            on_host(self._trainer.head.state_dict()),
        )

    def become(self, replica: Replica) -> Standing:
        """Draft with, and learn on from, what another worker does; what is served then, which tells whether it went."""
        try:
            self._serve(replica.version, replica.served, replica.last_good)
            self._trainer.head.load_state_dict(replica.weights)
            self._agree()
        except Exception:
            log.warning("taking up another worker's drafter failed", exc_info=True)
        return self._publisher.version, self._publisher.checksum

    def give_up(self, reason: str) -> Standing:
        """Learn no more and draft no more."""
        self._given_up = reason
        self._publisher.withdraw()
        return self._publisher.version, self._publisher.checksum

    def save(self, folder: Path) -> float:
        """Begin to write a checkpoint into this folder, beside what follows; the seconds that took. See saved."""
        files: dict[str, dict[str, torch.Tensor]] = {TRAINING: self._trainer.state_dict()}
        if self._publisher.version:
            files[SERVED] = self._publisher.served
        if self._publisher.last_good:
            files[LAST_GOOD] = self._publisher.last_good
        record: dict[str, Any] = {
            "head": asdict(self._trainer.head.config),
            "version": self._publisher.version,
            "steps": self._trainer.steps,
            "ready": self.ready,
            "off": self._given_up,
            "failures": self._failures,
            "unjudged": self._unjudged,
            "num_without": self._num_without,
            "trained_s": self._trained_s,
            "judged_s": self._judged_s,
        }
        return self._writer.begin(folder, files, record)

    def saved(self) -> None:
        """Until the checkpoint is on the disk. Raises StorageError where it could not be written."""
        self._writer.wait()

    def load(self, folder: Path) -> None:
        """Take up a checkpoint, bit for bit, and serve what it served. Raises StorageError, ConfigError."""
        record, files = checkpoint.read(folder)
        head = self._trainer.head
        if (saved := as_config(record["head"])) != head.config:
            raise ConfigError(f"{folder} holds a drafter of another shape ({saved}); resume with the options it had")
        self._trainer.load_state_dict(files[TRAINING])
        self.ready, self._unjudged, self._num_without = record["ready"], record["unjudged"], record["num_without"]
        self._given_up, self._failures = record["off"], record["failures"]
        self._trained_s, self._judged_s = record["trained_s"], record["judged_s"]
        if record["version"] or self._given_up:
            self._serve(record["version"], files.get(SERVED, {}), files.get(LAST_GOOD, {}))
        self._agree()

    def _serve(self, version: int, served: Mapping[str, torch.Tensor], last_good: Mapping[str, torch.Tensor]) -> None:
        """Serve this head from now on, or none for version 0."""
        if version:
            self._publisher.restore(served, version, last_good=last_good)
        else:
            self._publisher.withdraw()

    def _follow(self, verdict: Outcome) -> Outcome:
        """Do as judged; where that fails, the head served stays."""
        try:
            if verdict == "published":  # a worker without held-out features has judged nothing
                self._publisher.propose(self._trainer.head.state_dict())
            self._publisher.follow(verdict)
            return verdict
        except Exception as error:
            log.warning("publishing the drafter failed", exc_info=True)
            self._count_failure(f"{type(error).__name__}: {error}")
            return "kept"

    def _next_batch(self) -> FeatureBatch | None:
        return self._buffer.batch(self._config.batch_tokens) if self._buffer.num_tokens else None

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self._trainer.head.named_parameters()}

    def _agree(self) -> None:
        """The present weights are what failures go back to, and what deltas count from."""
        self._base = {name: value.clone() for name, value in self._parameters().items()}

    def _last_good(self) -> dict[str, torch.Tensor]:
        """The weights served; before the first, those agreed on last."""
        return self._publisher.served or self._base

    def _fail(self, reason: str, good: Mapping[str, torch.Tensor]) -> None:
        """Go back to good weights, and learn on from there with an optimiser that remembers nothing."""
        self._count_failure(reason)
        self._fresh.clear()
        self._unjudged = False
        weights = {**self._trainer.head.state_dict(), **good}
        self._trainer.load_state_dict(
            {f"head.{name}": value for name, value in weights.items()} | {"steps": torch.tensor(0)}
        )
        self._agree()

    def _count_step_without_heldout(self) -> None:
        """Say so once: by chance a few prompts may all be for learning, and then no head is ever judged."""
        self._num_without += 1
        if self._num_without == PATIENCE:
            log.warning(
                "no prompt of %d steps was held out to judge the drafter by, and none is published without;"
                " raise rollout.prompts_per_step",
                PATIENCE,
            )

    def _count_failure(self, reason: str) -> None:
        """Leave it alone after too many in a row."""
        self._failures += 1
        if self._failures < MAX_FAILURES:
            log.warning("the drafter starts again from its last good weights: %s", reason)
        else:
            self._given_up = f"{self._failures} failures in a row, the last: {reason}"
            log.warning("the drafter learns no more: %s", self.off)


def _reason(error: Exception) -> str:
    """Why training failed, in a line."""
    if is_out_of_memory(error):
        return "no memory to train it; lower drafter.batch_tokens or drafter.buffer_mb"
    return f"{type(error).__name__}: {error}"


def _served(judgement: Judgement, outcome: Outcome) -> float:
    """The accept length of the head that is served after the judgement was followed."""
    match outcome:
        case "published":
            return judgement.candidate
        case "rolled back":
            return judgement.last_good
    return judgement.served


def as_config(record: Mapping[str, Any]) -> EagleConfig:
    """The shape a checkpoint's record tells."""
    return EagleConfig(**{**record, "aux_layers": tuple(record["aux_layers"])})
