"""What the host reads of a cycle: rows of a table, and a report by depth."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from configs.errors import DivergedError
from drafter.types import Strategy
from rollout.launched import Launched
from rollout.sequence import Sequence

MakeSequence = Callable[..., Sequence]
CHAIN = Strategy("suffix", depth=2, top_k=1, num_verify=2)


@pytest.fixture
def cycle(make_sequence: MakeSequence) -> Launched:
    """Three sequences on four rows: one that kept both drafted tokens, one that had none, one that was over before."""
    logprobs = torch.tensor([[-0.5, -1.5, -2.5], [-0.25, 0, 0], [0, 0, 0], [0, 0, 0]]).view(torch.int32)
    head = torch.tensor([[3, 0, 2], [1, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    tokens = torch.tensor([[7, 8, 9], [5, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    proposed = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    return Launched(
        sequences=[make_sequence(f"p{number}", [3, 4], sample=0, max_new_tokens=9) for number in range(3)],
        texts=np.arange(3),
        strategy=CHAIN,
        num_rows=4,
        context=2.0,
        results=torch.cat([head, tokens, logprobs, proposed], dim=1),
        dense_logprobs=None,
        version=1,
        begun=1.0,
        done=1.5,
        capture_s=0.0,
        is_watched=False,
    )


def test_a_cycles_results_are_read_by_row(cycle: Launched) -> None:
    read = cycle.read()
    assert (read.counts, read.accepted) == ([3, 1, 0], [2, 0, 0])
    assert read.tokens[0] == [7, 8, 9] and read.tokens[1][:1] == [5]
    assert read.logprobs[0] == [-0.5, -1.5, -2.5] and read.logprobs[1][:1] == [-0.25]
    assert read.proposed.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_its_report_counts_what_was_accepted_at_each_depth(cycle: Launched) -> None:
    report = cycle.report(cycle.read(), cycle.wait())
    assert (report.batch, report.bucket, report.committed, report.seconds) == (3, 4, 4, 0.5)
    assert (report.proposed_by_depth, report.accepted_by_depth, report.rows_with_draft) == ([1, 1], [1, 1], 1)


def test_log_probs_that_are_not_finite_end_the_run(cycle: Launched) -> None:
    cycle.results.view(torch.float32)[0, 3 + 3] = torch.nan
    with pytest.raises(DivergedError):
        cycle.read()
