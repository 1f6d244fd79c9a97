"""What a cycle costs: measured by arm, batch and context where it has run, predicted from there elsewhere."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

# Relative to reading the weights once: forwarding this many tokens, or attending to this many cached ones, costs as
# much again. From decode times on one H100 (SmolLM2-135M and 1.7B: 110 to 140 tokens; 8B: 450) and from its memory
# bandwidth. They only shape predictions; reports soon replace those.
TOKENS_AT_ROOF = 128
CACHED_AT_ROOF = 131_072
# and of one level that a head drafts: a layer and a vocabulary are 0.06 of an 8B policy's weights
LEVEL_SHARE = 1 / 16

WINDOW = 15  # reports remembered a cell: timings that vary by 10 % have a median that varies by 3
STALE_CYCLES = 256  # after which a cell's reports count as one: the machine may have changed since
FEW_CACHED_BITS = 15  # fewer than 32768 cached tokens in all hardly cost anything, and share a cell
OTHER_ARM = 0.5  # octaves that another arm's cell lies further away: it drafts otherwise, and pads otherwise

Place = tuple[int, int]  # rows, and the number of bits of the number of tokens cached in all


@dataclass(slots=True)
class Cell:
    """Recent cycles of one arm at one place, in units: seconds over the roofline's shape.

    unit: their lower median. context and cycle: of the last report. octave: log2 of the tokens forwarded.
    """

    units: deque[float]
    unit: float
    context: float
    cycle: int
    octave: float


@dataclass(frozen=True, slots=True)
class SelfDrafting:
    """A round of the policy's drafting for itself, as it is configured: a forward that reads less than a plain cycle's.

    tokens: that a row forwards, of which kept are hoped to stand. weights: bytes of those it reads, over the policy's.
    In a share of dense layers a row attends to all of its cached tokens; in the others to `cached` of them at most, or
    to cached_share where that is more. Choosing them reads described of the bytes that all of its own take.
    """

    tokens: int = 1
    kept: int = 1
    weights: float = 1.0
    cached: int = 0
    cached_share: float = 0.0
    described: float = 0.0
    dense: float = 0.0

    def rounds(self, num_drafted: int) -> int:
        """That so many tokens take."""
        return -(-num_drafted // self.kept)

    def shape(self, rows: int, context: float) -> float:
        """What a round takes over reading the policy's weights once."""
        chosen = min(context, max(self.cached, self.cached_share * context))
        read = self.dense * context + (1 - self.dense) * chosen + self.described * context
        return _shape(rows, self.tokens, read, weights=self.weights)


POLICY_ITSELF = SelfDrafting()


class CostTable:
    """Seconds of a cycle under each arm; arm 0 decodes plainly.

    tokens_per_row: tokens a row forwards under each arm, the pending one included. Cycles that forward equally many
    tokens cost about the same, however many rows they are spread over: so arms predict one another. shorter: for each
    arm another one, before it, that costs no more: of the same source and shorter, or arm 0.
    rounds: of drafting, each a forward of the policy, that an arm's draft takes besides where the policy itself drafts.
    levels: likewise those that a head drafts, one after the other: what one takes is learned from all arms that have
    any, so that a longer or shorter draft is priced by it. What other drafts take is left to measurement.
    """

    def __init__(
        self,
        tokens_per_row: Sequence[int],
        shorter: Sequence[int],
        *,
        rounds: Sequence[int] | None = None,
        drafting: SelfDrafting = POLICY_ITSELF,
        levels: Sequence[int] | None = None,
    ) -> None:
        assert tokens_per_row[0] == 1, "arm 0 forwards the pending token alone"
        assert all(other < arm for arm, other in enumerate(shorter) if arm), "shorter arms come first"
        self._tokens = list(tokens_per_row)
        self._shorter = list(shorter)
        self._rounds = list(rounds or [0] * len(self._tokens))
        self._drafting = drafting
        self._levels = list(levels or [0] * len(self._tokens))
        self._cells: list[dict[Place, Cell]] = [{} for _ in tokens_per_row]
        self._predicted: list[dict[Place, float]] = [{} for _ in tokens_per_row]
        self._level_s: list[dict[Place, float]] = [{} for _ in tokens_per_row]

    @property
    def anchored(self) -> bool:
        """Whether a plain cycle has been measured anywhere, so that seconds are seconds."""
        return bool(self._cells[0])

    def plain_seconds(self, rows: int, context: float) -> float:
        """Expected seconds under the first arm."""
        return self._expected(0, rows, context)

    def seconds(self, rows: int, context: float) -> list[float]:
        """Expected seconds under each arm. Drafting makes no cycle cheaper, and drafting further is not expected to."""
        place = _place(rows, context)
        plain = self.plain_seconds(rows, context)
        expected = [plain]
        for arm in range(1, len(self._tokens)):
            floor = plain if place in self._cells[arm] else expected[self._shorter[arm]]
            expected.append(max(floor, self._expected(arm, rows, context)))
        return expected

    def observe(self, arm: int, rows: int, context: float, seconds: float, cycle: int) -> None:
        """A cycle took this long. One report far off the others changes nothing."""
        place, shape = _place(rows, context), self._shape(arm, rows, context)
        cell = self._cells[arm].get(place)
        if cell is None:
            # the prediction counts as a report: the first true one may hold a compilation or the capture of a graph
            units = deque([self._expected(arm, rows, context) / shape] if self.anchored else (), maxlen=WINDOW)
            cell = self._cells[arm][place] = Cell(units, 0.0, 0.0, cycle, log2(rows * self._tokens[arm]))
        elif cycle - cell.cycle > STALE_CYCLES:
            cell.units.clear()
            cell.units.append(cell.unit)
        cell.units.append(seconds / shape)
        count = len(cell.units)
        cell.unit = sorted(cell.units)[(count - 1) // 2]
        cell.context = context
        cell.cycle = cycle
        if count & (count - 1) == 0:  # now and then, while the cell is young
            self._forget_predictions()

    def has_measured(self, arm: int, rows: int) -> bool:
        """Whether cycles of so many rows were measured under this arm, at whatever context."""
        return any(place[0] == rows for place in self._cells[arm])

    def measured(self, arm: int) -> dict[int, float]:
        """Seconds by rows, where they were measured, at the context seen there last."""
        cells = sorted(self._cells[arm].items(), key=lambda item: (item[0][0], item[1].cycle))
        return {rows: cell.unit * self._shape(arm, rows, cell.context) for (rows, _), cell in cells}

    def _expected(self, arm: int, rows: int, context: float) -> float:
        """Seconds as they were measured there, or as what was measured elsewhere predicts them."""
        place, shape = _place(rows, context), self._shape(arm, rows, context)
        cell = self._cells[arm].get(place)
        if cell is not None:
            return cell.unit * shape
        return self._unit(arm, place) * shape + self._levels[arm] * self._level_seconds(arm, place)

    def _unit(self, arm: int, place: Place) -> float:
        """A mean of the nearest measured units of cycles without a head's levels."""
        unit = self._predicted[arm].get(place)
        if unit is None:
            unit = self._predicted[arm][place] = self._interpolated(arm, place)
        return unit

    def _level_seconds(self, arm: int, place: Place) -> float:
        """What a level of a head's draft takes: by the nearest measured cycle with any, beyond the rest of it."""
        if not self._levels[arm]:
            return 0.0
        seconds = self._level_s[arm].get(place)
        if seconds is None:
            cells = [
                (_apart(where, place) + abs(log2(self._levels[other] / self._levels[arm])), other, where)
                for other, levels in enumerate(self._levels)
                if levels
                for where in self._cells[other]
            ]
            if cells:
                _, other, where = min(cells)
                cell = self._cells[other][where]
                beyond = max(0.0, cell.unit - self._unit(other, where))
                seconds = beyond * self._shape(other, where[0], cell.context) / self._levels[other]
            else:
                seconds = LEVEL_SHARE * self._unit(arm, place)
            self._level_s[arm][place] = seconds
        return seconds

    def _interpolated(self, arm: int, place: Place) -> float:
        """Inverse-distance weighting (Shepard 1968) over tokens forwarded and tokens cached, both in octaves."""
        octave, bits = log2(place[0] * self._tokens[arm]), place[1]
        total, weights = 0.0, 0.0
        for other, cells in enumerate(self._cells):
            if self._levels[other]:
                continue
            apart = 0.0 if other == arm else OTHER_ARM
            for (_, cell_bits), cell in cells.items():
                distance = abs(cell.octave - octave) + abs(cell_bits - bits) + apart
                weight = 1.0 / (distance * distance)
                total += weight * cell.unit
                weights += weight
        return total / weights if weights else 1.0

    def _shape(self, arm: int, rows: int, context: float) -> float:
        """What an arm's cycle takes over reading the weights once, by the roofline."""
        return _shape(rows, self._tokens[arm], context) + self._rounds[arm] * self._drafting.shape(rows, context)

    def _forget_predictions(self) -> None:
        for predicted in (*self._predicted, *self._level_s):
            predicted.clear()


def _place(rows: int, context: float) -> Place:
    return rows, max(FEW_CACHED_BITS, int(rows * context).bit_length())


def _apart(one: Place, other: Place) -> float:
    """Octaves of rows and of tokens cached between two places."""
    return abs(log2(one[0] / other[0])) + abs(one[1] - other[1])


def _shape(rows: int, tokens: int, context: float, *, weights: float = 1.0) -> float:
    """A cycle's time over that of reading the weights: a roofline whose corner is rounded off.

    weights: those it reads, relative to the policy's.
    """
    return weights + rows * (tokens / TOKENS_AT_ROOF + context / CACHED_AT_ROOF)
