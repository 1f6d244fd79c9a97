"""Goodput: the strategy expected to commit most tokens a second, from measured times and accepted drafts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drafter.types import OFF, Strategy
from rollout.acceptance import Acceptance, Share
from rollout.budget import Captures, Purse
from rollout.costs import POLICY_ITSELF, CostTable, SelfDrafting
from rollout.graphs import bucket

if TYPE_CHECKING:
    from rollout.strategy import CycleReport

# A challenger must promise this much more than the leader. Plain decoding wins near-ties: its tokens are certain.
MARGIN = 0.02
MARGIN_OFF = -0.01

PROBE_SHARE = 0.005  # of all time may be lost to probes, against the leader
PROBE_CYCLES = 2.0  # plain cycles' worth of loss allowed ahead of that
CREDIT_CYCLES = 8.0  # plain cycles' worth that may be saved up, or owed
FIRST_INTERVAL, LAST_INTERVAL = 4, 512  # cycles between two probes of an arm
OUTDONE = 0.8  # of the leader's goodput: a source none of whose arms promises as much is asked no more
OUTDONE_ROWS = 32.0  # that say so
QUIET_CYCLES = 8  # of plain decoding from one comparison of all arms, which takes time, to the next; or a probe is due
RETURNS = 4.0  # cycles expected at a batch size for each that there was: step after step passes through it
SEEN_ROWS = 16.0  # of a source, before more graphs are captured for it
EXPLORE = 20.0  # captures' worth of time at a batch size, before one more arm's is taken to see what it costs there
DOUBT = 1.05  # times as much an arm must promise where it was not measured: its price may be wrong
KNOWN_CYCLES = 16  # at a batch size before an untried source may capture graphs for it

ARM_TRIALS = 256.0  # drafted rows that an arm's own gain remembers
POOLED_TRIALS = 32.0  # weight of its source's gain beside it
FADE = 1.0 - 1.0 / 512.0  # of an arm's own evidence, for each cycle that another one ran
NEW_POLICY_TRIALS, NEW_BATCH_TRIALS = 16.0, 64.0  # what evidence weighs after such a change


class GoodputChooser:
    """argmax of expected committed tokens over expected seconds; off is always among the arms.

    Tokens a row: 1 + coverage x gain, where gain is what the arm's own drafts brought lately, leaning on its source's
    acceptance by depth where it has seldom run. Seconds: CostTable. An arm that is not leading is probed for a cycle
    now and then, twice as seldom after each probe that lost, only while the loss expected of it is within PROBE_SHARE
    of the time, and not while another source outdoes its own by far. An arm whose graphs are yet to be captured runs
    only where they are worth it: where the batch size has been met so often that the cycles to come pay for them.
    What all this may cost where drafts bring nothing is a budget, not an estimate (rollout/budget.py).
    Deterministic given the reports. self_drafting: what the policy does where it drafts for itself.
    """

    def __init__(self, arms: Sequence[Strategy], *, self_drafting: SelfDrafting = POLICY_ITSELF) -> None:
        drafting = [arm for arm in dict.fromkeys(arms) if arm != OFF]
        drafting.sort(key=lambda arm: (arm.num_verify, arm.depth))
        sources = dict.fromkeys(arm.source for arm in drafting)
        self._arms = (OFF, *(arm for source in sources for arm in drafting if arm.source == source))
        self.max_num_verify = max(arm.num_verify for arm in self._arms)
        self._index = {arm: number for number, arm in enumerate(self._arms)}
        count = len(self._arms)
        # of each arm's source the next shorter one, or off
        self._shorter = [
            arm - 1 if arm and self._arms[arm].source == self._arms[arm - 1].source else 0 for arm in range(count)
        ]
        self._costs = CostTable(
            [1 + arm.num_verify for arm in self._arms],
            self._shorter,
            rounds=[self_drafting.rounds(arm.num_verify) if arm.source == "sparse" else 0 for arm in self._arms],
            drafting=self_drafting,
            levels=[arm.depth if arm.source == "eagle" else 0 for arm in self._arms],
        )
        self._sources = {
            arm.source: Acceptance(max(other.depth for other in self._arms if other.source == arm.source))
            for arm in self._arms[1:]
        }
        self._arms_of = {
            source: [number for number, arm in enumerate(self._arms) if arm.source == source]
            for source in self._sources
        }
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
        self._quiet_until = self._quiet_rows = 0  # arms are not compared before that cycle, while rows are so many
        self._unfaded = 0  # plain cycles by which evidence is yet to fade
        self._purse = Purse()
        self._captures = Captures()

    def choose(self, *, batch: int, context: float) -> Strategy:
        """The leader by goodput, or an arm whose probe is due."""
        self._cycle += 1
        arm, rows = 0, bucket(batch)
        if self._cycle < self._quiet_until and rows == self._quiet_rows:
            self._visits[rows] += 1
        elif self._costs.anchored:  # before that seconds mean nothing
            arm = self._select(rows, context)
        self._chosen[arm] += 1
        return self._arms[arm]

    def observe(self, report: "CycleReport") -> None:
        """Learn the time a cycle took, the drafts it accepted, and what its graphs took to capture."""
        arm, rows = self._index[report.strategy], bucket(report.bucket)
        if not self._costs.anchored:
            self._credit = PROBE_CYCLES * report.seconds
        if not report.capture_s:  # what else such a cycle takes is not what it will take
            self._costs.observe(arm, rows, report.context, report.seconds, self._cycle)
        if self._costs.anchored:
            self._account(arm, rows, report)
        else:
            # the host began to capture while the device was still at the cycle before
            plain_s = max(0.0, report.seconds - report.capture_s)
            self._captures.observe((arm, rows), report.capture_s, plain_s, 0.0, plain_s)
        if not arm:
            self._unfaded += 1  # it says nothing about drafts
            return
        accepted = sum(report.accepted_by_depth)
        self._sources[report.strategy.source].observe(report.batch, report.rows_with_draft, report.accepted_by_depth)
        factor = FADE ** (self._unfaded + 1)
        self._unfaded = 0
        for other, gain in enumerate(self._gains):
            gain.fade(factor if other != arm else factor / FADE)
        if report.rows_with_draft:
            self._gains[arm].add(accepted, report.rows_with_draft, limit=ARM_TRIALS)
        self._refresh()

    def policy_changed(self) -> None:
        """Let new evidence outweigh the old, and look at every arm again soon."""
        self._weaken(NEW_POLICY_TRIALS)

    def drafter_changed(self, source: str) -> None:
        """Hope for as much as before, and as for a source that was never tried; look at it again soon."""
        for number, arm in enumerate(self._arms):
            if arm.source == source:
                self._quiet_until = 0
                self._sources[source].renew()
                self._gains[number] = Share(0.0, 0.0)
                self._interval[number] = FIRST_INTERVAL
                self._due[number] = min(self._due[number], self._cycle + FIRST_INTERVAL)
        self._refresh()

    def summary(self) -> dict[str, Any]:
        """Shares of cycles, times, tokens and acceptance as they stand, and what probing and capturing have cost."""
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
        return {
            "choice": "goodput",
            "cycles": self._cycle,
            "arms": arms,
            "sources": sources,
            "probes": {"count": self._probes, "loss_s": self._probe_loss_s},
            "captures": {"spent_s": self._captures.spent_s, "cost_s": self._captures.cost_s},
        }

    def _select(self, rows: int, context: float) -> int:
        """The arm of most expected tokens a second, unless another's turn to be probed has come."""
        if rows >= 2 * self._rows or 2 * rows <= self._rows:
            self._rows = rows  # the few that are left of a batch are not like the many that have finished
            self._weaken(NEW_BATCH_TRIALS)
        self._visits[rows] = self._visits.get(rows, 0) + 1
        seconds = self._costs.seconds(rows, context)
        rates = [tokens / cost for tokens, cost in zip(self._tokens, seconds, strict=True)]
        # what a cycle loses at most: all that it takes beyond a plain one
        affordable = [not arm or self._purse.affords(cost - seconds[0]) for arm, cost in enumerate(seconds)]
        best = self._best(rows, seconds, rates, affordable)
        if best != self._leader:
            self._interval[self._leader] = FIRST_INTERVAL
            self._due[self._leader] = self._cycle + FIRST_INTERVAL
            self._lead(best)
        self._leader_rate = rates[best]
        chosen = self._probe(rows, seconds, rates, affordable)
        if chosen:
            self._purse.set_aside(self._cycle, chosen, seconds[chosen] - seconds[0])
        elif not best:
            ahead = [due for due in self._due[1:] if due > self._cycle]
            self._quiet_until, self._quiet_rows = min([self._cycle + QUIET_CYCLES, *ahead]), rows
        return chosen

    def _best(self, rows: int, seconds: list[float], rates: list[float], affordable: list[bool]) -> int:
        """The arm that is to lead: of those that are ready to run, or of any where its graphs are worth capturing."""
        score = [rate / bar for rate, bar in zip(rates, self._bars, strict=True)]
        by_score = sorted((arm for arm, can in enumerate(affordable) if can), key=lambda arm: -score[arm])
        best = next(arm for arm in by_score if not arm or self._captures.ready((arm, rows)))
        for arm in by_score:
            if arm == best:
                break
            if self._worth_capturing(arm, rows, seconds[best], rates[best], rates[arm]):
                return arm
        return best

    def _worth_capturing(self, arm: int, rows: int, seconds: float, rate: float, promised: float) -> bool:
        """Whether the cycles to come at this batch size will pay for the graphs of a better arm.

        seconds and rate: of the arm that runs without it. That it is better must have been seen, be it elsewhere, and
        by more than a price can be wrong that was not measured here.
        """
        if self._sources[self._arms[arm].source].rows < SEEN_ROWS:
            return False
        if not self._costs.has_measured(arm, rows):
            promised /= DOUBT
        saved_s = RETURNS * self._visits[rows] * seconds * (1.0 - rate / promised)
        return saved_s >= self._captures.cost_s and self._captures.affords()

    def _lead(self, arm: int) -> None:
        """Let an arm lead, and set the bars that others must pass."""
        self._leader = arm
        self._bars = [1.0 + (MARGIN if other else MARGIN_OFF) for other in range(len(self._arms))]
        self._bars[arm] = 1.0

    def _probe(self, rows: int, seconds: list[float], rates: list[float], affordable: list[bool]) -> int:
        """The arm whose probe is longest due, if the expected loss is covered; else the leader."""
        chosen, reserved = self._leader, 0.0
        is_saving = False
        for arm, cost in enumerate(seconds):
            if arm == self._leader or self._due[arm] > self._cycle:
                continue
            if not affordable[arm]:
                is_saving |= self._is_worth_saving_for(arm, rows, seconds, rates)
                continue
            loss = cost * (1.0 - rates[arm] / self._leader_rate)
            if loss > self._credit or (chosen != self._leader and self._due[arm] >= self._due[chosen]):
                continue
            if arm and not self._may_be_tried(arm, rows, seconds, rates):
                continue
            chosen, reserved = arm, max(0.0, loss)
        if is_saving and chosen and not self._sources[self._arms[chosen].source].untried:
            return self._leader
        if chosen != self._leader:
            self._credit -= reserved
            self._reserved[chosen] = reserved
            self._due[chosen] = self._cycle + self._interval[chosen]
            self._interval[chosen] = min(2 * self._interval[chosen], LAST_INTERVAL)
            self._probes += 1
        return chosen

    def _is_worth_saving_for(self, arm: int, rows: int, seconds: list[float], rates: list[float]) -> bool:
        """Whether other sources wait until this arm can be afforded: cheaper ones would spend, again and again, what
        one look at a source of which nothing is known takes."""
        if not self._sources[self._arms[arm].source].untried:
            return False
        can_earn = self._purse.can_earn(seconds[arm] - seconds[0], seconds[0])
        return can_earn and self._may_be_tried(arm, rows, seconds, rates)

    def _may_be_tried(self, arm: int, rows: int, seconds: list[float], rates: list[float]) -> bool:
        """Whether a probe of this arm could teach something that it is worth."""
        name = self._arms[arm].source
        source, best = self._sources[name], max(self._arms_of[name], key=rates.__getitem__)
        is_sisters = self._arms[self._leader].source not in ("off", name)
        if is_sisters and source.rows >= OUTDONE_ROWS and rates[best] < OUTDONE * self._leader_rate:
            return False
        if self._captures.ready((arm, rows)):
            return True
        if not self._captures.affords():
            return False
        has_graphs = self._captures.has_any(self._arms_of[name])
        if source.untried or not has_graphs:  # what it is worth is found out once, by its most promising arm
            return arm == best and self._visits[rows] > KNOWN_CYCLES
        # it may cost less than is expected of it, though not less than the one that is shorter: see, if it is paid for
        least, this, leader = seconds[self._shorter[arm]], self._arms[arm], self._arms[self._leader]
        if this.source == leader.source == "eagle" and this.depth < leader.depth:
            # a head drafts level by level, so that a draft's share of the levels is no less of the cost
            least = max(least, seconds[0] + this.depth / leader.depth * (seconds[self._leader] - seconds[0]))
        hoped = self._tokens[arm] / least
        is_known = self._visits[rows] * seconds[self._leader] >= EXPLORE * self._captures.cost_s
        is_paid = self._captures.affords(ahead=0.0)
        return is_known and is_paid and source.rows >= SEEN_ROWS and hoped > (1.0 + MARGIN) * self._leader_rate

    def _account(self, arm: int, rows: int, report: "CycleReport") -> None:
        """Earn the right to probe and to capture, and pay for it.

        A cycle gains its accepted tokens a row. Not its committed ones: rows that had finished commit nothing under any
        arm.
        """
        tokens = 1.0 + sum(report.accepted_by_depth) / report.batch
        plain_s = self._costs.plain_seconds(rows, report.context)
        expected_s = self._costs.seconds(rows, report.context)[arm] if arm else plain_s
        # a stall of the machine is nobody's fault
        seconds = expected_s if report.capture_s else min(report.seconds, 2.0 * expected_s)
        saved_s = tokens * plain_s - seconds if arm else 0.0
        self._purse.settle(self._cycle, arm, seconds, saved_s, plain_s)
        self._captures.observe((arm, rows), report.capture_s, seconds, saved_s, plain_s)
        self._credit += PROBE_SHARE * seconds
        if arm != self._leader and self._leader_rate:
            loss = seconds - tokens / self._leader_rate
            self._credit += self._reserved[arm] - max(0.0, loss)
            self._reserved[arm] = 0.0
            self._probe_loss_s += loss
            if loss <= 0 and (tokens > 1.0 or arm == 0):  # without a token gained it was only quick by chance
                self._interval[arm] = max(FIRST_INTERVAL, self._interval[arm] // 4)
                self._due[arm] = self._cycle + 1
        limit = CREDIT_CYCLES * seconds
        self._credit = min(limit, max(-limit, self._credit))

    def _weaken(self, trials: float) -> None:
        self._quiet_until = 0
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
