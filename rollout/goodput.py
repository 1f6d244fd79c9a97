"""Goodput: the strategy expected to commit most tokens a second, from measured times and accepted drafts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drafter.types import OFF, Strategy
from rollout.acceptance import Acceptance, Share
from rollout.costs import CostTable
from rollout.graphs import bucket

if TYPE_CHECKING:
    from rollout.strategy import CycleReport

# A challenger must promise this much more than the leader. Plain decoding wins near-ties: its tokens are certain.
MARGIN = 0.02
MARGIN_OFF = -0.01

PROBE_SHARE = 0.005  # of all time may be lost to probes
PROBE_CYCLES = 2.0  # plain cycles' worth of loss allowed ahead of that
CREDIT_CYCLES = 8.0  # plain cycles' worth that may be saved up, or owed
FIRST_INTERVAL, LAST_INTERVAL = 4, 512  # cycles between two probes of an arm
KNOWN_CYCLES = 16  # at a batch size before arms are probed there: one passed through is not worth a graph

ARM_TRIALS = 256.0  # drafted rows that an arm's own gain remembers
POOLED_TRIALS = 32.0  # weight of its source's gain beside it
FADE = 1.0 - 1.0 / 512.0  # of an arm's own evidence, for each cycle that another one ran
NEW_POLICY_TRIALS, NEW_BATCH_TRIALS = 16.0, 64.0  # what evidence weighs after such a change


class GoodputChooser:
    """argmax of expected committed tokens over expected seconds; off is always among the arms.

    Tokens a row: 1 + coverage x gain, where gain is what the arm's own drafts brought lately, leaning on its source's
    acceptance by depth where it has seldom run. Seconds: CostTable. An arm that is not leading is probed for a cycle
    now and then, twice as seldom after each probe that lost, and only while the loss expected of it is within
    PROBE_SHARE of the time. Deterministic given the reports.
    """

    def __init__(self, arms: Sequence[Strategy]) -> None:
        self._arms = (OFF, *(arm for arm in dict.fromkeys(arms) if arm != OFF))
        self.max_num_verify = max(arm.num_verify for arm in self._arms)
        self._index = {arm: number for number, arm in enumerate(self._arms)}
        count = len(self._arms)
        self._costs = CostTable([1 + arm.num_verify for arm in self._arms])
        self._sources = {arm.source: self._untried(arm.source) for arm in self._arms[1:]}
        self._gains = [Share(0.0, 0.0) for _ in range(count)]
        self._tokens = [1.0] * count
        self._refresh()
        self._lead(0)
        self._leader_rate = 0.0  # tokens a row and second
        self._cycle = 0
        self._chosen = [0] * count
        self._rows = 1  # of the batch that the evidence is about
        self._visits: dict[int, int] = {}
        self._due = [FIRST_INTERVAL] * count
        self._interval = [FIRST_INTERVAL] * count
        self._reserved = [0.0] * count
        self._credit = 0.0
        self._probes = 0
        self._probe_loss_s = 0.0

    def choose(self, *, batch: int, context: float) -> Strategy:
        """The leader by goodput, or an arm whose probe is due."""
        self._cycle += 1
        arm = 0
        if self._costs.anchored:  # before that seconds mean nothing
            arm = self._select(bucket(batch), context)
        self._chosen[arm] += 1
        return self._arms[arm]

    def observe(self, report: "CycleReport") -> None:
        """Learn the time a cycle took and the drafts it accepted."""
        arm = self._index[report.strategy]
        if not self._costs.anchored:
            self._credit = PROBE_CYCLES * report.seconds
        self._costs.observe(arm, bucket(report.bucket), report.context, report.seconds, self._cycle)
        accepted = sum(report.accepted_by_depth)
        self._account(arm, accepted / report.batch, report.seconds)
        if arm:
            source = self._sources[report.strategy.source]
            source.observe(report.batch, report.rows_with_draft, report.accepted_by_depth)
            if report.rows_with_draft:
                self._gains[arm].add(accepted, report.rows_with_draft, limit=ARM_TRIALS)
        for other, gain in enumerate(self._gains):
            if other != arm:
                gain.fade(FADE)
        self._refresh()

    def policy_changed(self) -> None:
        """Let new evidence outweigh the old, and look at every arm again soon."""
        self._weaken(NEW_POLICY_TRIALS)

    def drafter_changed(self, source: str) -> None:
        """Hope as for a source that was never tried, and look at it again soon."""
        for number, arm in enumerate(self._arms):
            if arm.source == source:
                self._sources[arm.source] = self._untried(source)
                self._gains[number] = Share(0.0, 0.0)
                self._interval[number] = FIRST_INTERVAL
                self._due[number] = min(self._due[number], self._cycle + FIRST_INTERVAL)
        self._refresh()

    def summary(self) -> dict[str, Any]:
        """Shares of cycles, times, tokens and acceptance as they stand, and what probing has cost."""
        cycles = max(1, self._cycle)
        arms = [
            {
                "source": arm.source,
                "depth": arm.depth,
                "num_verify": arm.num_verify,
                "share": self._chosen[number] / cycles,
                "tokens_per_row": self._tokens[number],
                "seconds": {str(rows): seconds for rows, seconds in self._costs.measured(number).items()},
            }
            for number, arm in enumerate(self._arms)
        ]
        sources = {
            name: {"coverage": source.coverage, "acceptance": source.rates()} for name, source in self._sources.items()
        }
        probes = {"count": self._probes, "loss_s": self._probe_loss_s}
        return {"choice": "goodput", "cycles": self._cycle, "arms": arms, "sources": sources, "probes": probes}

    def _untried(self, source: str) -> Acceptance:
        return Acceptance(max(arm.depth for arm in self._arms if arm.source == source))

    def _select(self, rows: int, context: float) -> int:
        """The arm of most expected tokens a second, unless another's turn to be probed has come."""
        if rows >= 2 * self._rows or 2 * rows <= self._rows:
            self._rows = rows  # the few that are left of a batch are not like the many that have finished
            self._weaken(NEW_BATCH_TRIALS)
        visits = self._visits[rows] = self._visits.get(rows, 0) + 1
        seconds = self._costs.seconds(rows, context)
        rates = [tokens / cost for tokens, cost in zip(self._tokens, seconds, strict=True)]
        best = max(range(len(rates)), key=[rate / bar for rate, bar in zip(rates, self._bars, strict=True)].__getitem__)
        if best != self._leader:
            self._interval[self._leader] = FIRST_INTERVAL
            self._due[self._leader] = self._cycle + FIRST_INTERVAL
            self._lead(best)
        self._leader_rate = rates[best]
        return self._probe(seconds, rates) if visits > KNOWN_CYCLES else best

    def _lead(self, arm: int) -> None:
        """Let an arm lead, and set the bars that others must pass."""
        self._leader = arm
        self._bars = [1.0 + (MARGIN if other else MARGIN_OFF) for other in range(len(self._arms))]
        self._bars[arm] = 1.0

    def _probe(self, seconds: list[float], rates: list[float]) -> int:
        """The arm whose probe is longest due, if the expected loss is covered; else the leader."""
        chosen, reserved = self._leader, 0.0
        for arm, cost in enumerate(seconds):
            if arm == self._leader or self._due[arm] > self._cycle:
                continue
            loss = cost * (1.0 - rates[arm] / self._leader_rate)
            if loss <= self._credit and (chosen == self._leader or self._due[arm] < self._due[chosen]):
                chosen, reserved = arm, max(0.0, loss)
        if chosen != self._leader:
            self._credit -= reserved
            self._reserved[chosen] = reserved
            self._due[chosen] = self._cycle + self._interval[chosen]
            self._interval[chosen] = min(2 * self._interval[chosen], LAST_INTERVAL)
            self._probes += 1
        return chosen

    def _account(self, arm: int, gain: float, seconds: float) -> None:
        """Earn the right to probe, and pay for a probe: the time beyond what the leader takes for as many tokens.

        gain: accepted tokens a row. Not committed ones: rows that had finished commit nothing under any arm.
        """
        self._credit += PROBE_SHARE * seconds
        if arm != self._leader and self._leader_rate:
            loss = seconds - (1.0 + gain) / self._leader_rate
            self._credit += self._reserved[arm] - max(0.0, loss)
            self._reserved[arm] = 0.0
            self._probe_loss_s += loss
            if loss <= 0 and (gain or arm == 0):  # without a token gained it was only quick by chance
                self._interval[arm] = max(FIRST_INTERVAL, self._interval[arm] // 4)
                self._due[arm] = self._cycle + 1
        limit = CREDIT_CYCLES * seconds
        self._credit = min(limit, max(-limit, self._credit))

    def _weaken(self, trials: float) -> None:
        for source in self._sources.values():
            source.weaken(trials)
        for gain in self._gains:
            gain.weaken(trials / 4)
        for arm in range(len(self._arms)):
            self._interval[arm] = FIRST_INTERVAL
            self._due[arm] = min(self._due[arm], self._cycle + FIRST_INTERVAL)

    def _refresh(self) -> None:
        """Expected tokens a row under each arm."""
        for number, arm in enumerate(self._arms[1:], start=1):
            source, own = self._sources[arm.source], self._gains[number]
            gain = (own.hits + POOLED_TRIALS * source.gain(arm.depth)) / (own.trials + POOLED_TRIALS)
            self._tokens[number] = 1.0 + source.coverage * gain
