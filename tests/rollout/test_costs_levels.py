"""What drafts of a head are priced at where only one of their lengths was measured."""

import pytest

from rollout.costs import CostTable

DEPTHS = (3, 7, 15)
LEVEL_MS = 0.12


def milliseconds(tokens: int, rows: int, levels: int) -> float:
    return 0.7 + 0.0055 * rows * tokens + LEVEL_MS * levels


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("measured", [1, 2, 3])
def test_a_longer_or_shorter_draft_is_priced_by_the_levels_of_the_measured_one(rows: int, measured: int) -> None:
    table = CostTable([1, *(1 + depth for depth in DEPTHS)], [0, 0, 1, 2], levels=[0, *DEPTHS])
    for cycle, plain_rows in enumerate((1, 4, 12, 48, 96, 192) * 4):
        table.observe(0, plain_rows, 100.0, 1e-3 * milliseconds(1, plain_rows, 0), cycle)
    depth = DEPTHS[measured - 1]
    for cycle in range(30, 36):
        table.observe(measured, rows, 100.0, 1e-3 * milliseconds(1 + depth, rows, depth), cycle)
    found = table.seconds(rows, 100.0)[1:]
    expected = [1e-3 * milliseconds(1 + depth, rows, depth) for depth in DEPTHS]
    assert found == pytest.approx(expected, rel=0.1)
