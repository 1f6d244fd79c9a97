"""Which head is served: a new one only where it is better, and the last good one again where it is not.

Heads are judged by the accept length they would have had on held-out features of the present policy, all on the same
ones, in the precision they are served in. A few windows say little: what is no more than their noise changes nothing.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite
from typing import Literal, Protocol

import torch

from configs.faults import hit
from configs.schema import DrafterConfig
from drafter.eagle import EagleHead
from drafter.features import FeatureBatch
from drafter.trainer import reached_by_window

MIN_GAIN = 0.02  # in accept length, relative: less is not worth that choosers measure a new version from the start
DOUBTS = 2.0  # standard errors of a gain that are put down to chance
CHUNK_WORDS = 1 << 22  # of a checksum's int64 temporaries: 32 MB
NUM_HEADS = 3  # kept beside the trained copy: the candidate, the one served and the one before
MIXER = 0x3C6EF362  # even, so that every word's factor is odd and no single change goes unseen; sums wrap at 2^64

Outcome = Literal["kept", "published", "rolled back"]


class Serves(Protocol):
    """What drafts with the published head: drafter.eagle_serving.EagleDrafter."""

    def publish(self, state: dict[str, torch.Tensor], version: int) -> None:
        """Draft with these weights, copied, from now on."""

    def withdraw(self) -> None:
        """Propose nothing until weights are published again."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Accept lengths on the same held-out positions: of the trained copy, of the head served, and of the one before.

    1 where there is no such head: without one, a cycle commits the target's own token. NaN for weights, or what they
    made of the features, that are not finite. Doubts: standard errors of the differences from the head served, by what
    differs between windows; 0 where none is served, since no draft is worse than none.
    """

    candidate: float
    served: float
    last_good: float
    num_tokens: int
    candidate_doubt: float
    last_good_doubt: float

    @property
    def verdict(self) -> Outcome:
        """What should be done."""
        if self.candidate - self.served > max(MIN_GAIN * self.served, DOUBTS * self.candidate_doubt):
            return "published"
        if self.last_good - self.served > max(MIN_GAIN * self.served, DOUBTS * self.last_good_doubt):
            return "rolled back"
        return "kept"

    @property
    def is_finite(self) -> bool:
        """Whether the candidate can be served at all."""
        return isfinite(self.candidate)


def pooled(judgements: Sequence[Judgement]) -> Judgement:
    """Several workers' judgements as one, each by its share of the positions."""
    total = sum(judgement.num_tokens for judgement in judgements)

    def shares(values: Iterable[float]) -> list[float]:
        return [value * each.num_tokens / total for value, each in zip(values, judgements, strict=True)]

    return Judgement(
        candidate=sum(shares(each.candidate for each in judgements)),
        served=sum(shares(each.served for each in judgements)),
        last_good=sum(shares(each.last_good for each in judgements)),
        num_tokens=total,
        candidate_doubt=hypot(*shares(each.candidate_doubt for each in judgements)),
        last_good_doubt=hypot(*shares(each.last_good_doubt for each in judgements)),
    )


class Publisher:
    """The head served and the one before it, apart from the copy that is trained and from the policy's weights.

    version counts what was served, a head served again included; 0 before the first.
    """

    def __init__(
        self,
        drafter: Serves,
        head: EagleHead,
        *,
        embedding: torch.Tensor,
        lm_head: torch.Tensor,
        config: DrafterConfig,
        dtype: torch.dtype,
    ) -> None:
        """head: a model of those to come; its weights are not served. dtype: of the weights served."""
        self.version = 0
        self.checksum = ""
        self._drafter = drafter
        self._embedding = embedding
        self._lm_head = lm_head
        self._config = config
        self._candidate, self._served, self._last_good = (
            copy.deepcopy(head).to(dtype).requires_grad_(False) for _ in range(NUM_HEADS)
        )
        self._has_last_good = False

    def propose(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take a copy of these weights, EagleHead.state_dict, as the candidate."""
        self._candidate.load_state_dict(state)

    def judge(self, batch: FeatureBatch) -> Judgement:
        """Hold the candidate against the head served and the last good one."""
        nothing = torch.zeros(len(batch.versions), dtype=torch.float64)
        candidate = self._reached(self._candidate, batch) if is_finite(self._candidate) else nothing * torch.nan
        served = self._reached(self._served, batch) if self.version else nothing
        last_good = self._reached(self._last_good, batch) if self._has_last_good else nothing
        return Judgement(
            candidate=1 + float(candidate.sum()),
            served=1 + float(served.sum()),
            last_good=1 + float(last_good.sum()),
            num_tokens=len(batch.next_ids),
            candidate_doubt=_doubt(candidate - served, batch) if self.version else 0.0,
            last_good_doubt=_doubt(last_good - served, batch),
        )

    def follow(self, verdict: Outcome) -> None:
        """Do as judged. The heads change places; only the drafter copies weights, between two cycles."""
        match verdict:
            case "published":
                before = self.version
                self._serve(self._candidate, before + 1)
                self._last_good, self._served, self._candidate = self._served, self._candidate, self._last_good
                self._has_last_good = before > 0
            case "rolled back":
                assert self._has_last_good
                self._serve(self._last_good, self.version + 1)
                self._last_good, self._served = self._served, self._last_good
            case "kept":
                pass

    def restore(
        self, state: Mapping[str, torch.Tensor], version: int, *, last_good: Mapping[str, torch.Tensor]
    ) -> None:
        """Serve what a checkpoint holds, or another worker serves. last_good: the head to go back to, {} for none."""
        self._served.load_state_dict(state)
        if last_good:
            self._last_good.load_state_dict(last_good)
        self._has_last_good = bool(last_good)
        self._serve(self._served, version)

    def withdraw(self) -> None:
        """Serve nothing."""
        self._drafter.withdraw()
        self.version, self.checksum, self._has_last_good = 0, "", False

    @property
    def served(self) -> dict[str, torch.Tensor]:
        """The weights served, not copied; none before the first."""
        return self._served.state_dict() if self.version else {}

    @property
    def last_good(self) -> dict[str, torch.Tensor]:
        """The weights to go back to, not copied; none where no head was served before this one."""
        return self._last_good.state_dict() if self._has_last_good else {}

    def _serve(self, head: EagleHead, version: int) -> None:
        """Only once it is served do the heads change places: what fails leaves all as it was."""
        state = head.state_dict()
        digest = checksum(state)
        hit("drafter.publish")
        self._drafter.publish(state, version)
        self.version, self.checksum = version, digest

    def _reached(self, head: EagleHead, batch: FeatureBatch) -> torch.Tensor:
        return reached_by_window(head, batch, embedding=self._embedding, lm_head=self._lm_head, config=self._config)


def _doubt(gains: torch.Tensor, batch: FeatureBatch) -> float:
    """The standard error of the sum of the windows' gains, [W], by what each is off its share of that sum.

    Of one window all of it: it alone never tells.
    """
    count = len(gains)
    if count == 1:
        return abs(float(gains))
    shares = batch.cu_seqlens.cpu().double().diff() / len(batch.next_ids)
    return float((gains - shares * gains.sum()).norm()) * (count / (count - 1)) ** 0.5


def is_finite(head: EagleHead) -> bool:
    """Whether every weight is a number."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in head.parameters()]).all())


def checksum(state: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits that equal tensors under equal names share, whatever device they are on.

    Every 16-bit word of a tensor counts by its place in sums modulo 2^64, made where the tensor is, not on the host.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        words = tensor.detach().contiguous().flatten()
        words = words.view(torch.int16) if words.element_size() > 1 else words.view(torch.uint8)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, len(words), CHUNK_WORDS):
            part = words[start : start + CHUNK_WORDS].long()
            places = torch.arange(start + 1, start + 1 + len(part), device=words.device)
            total += (part * (places * MIXER + 1)).sum()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {int(total)};".encode())
    return digest.hexdigest()
