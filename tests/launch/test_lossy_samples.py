"""Whoever reads a rollout sees that it was not sampled from the policy's own distribution."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from launch.monitor.samples import sample
from launch.samples import shown

ROW = {
    "prompt_id": "p", "sample": 0, "question": "how many?", "answer": "4", "text": "4", "reward": 1.0, "advantage": 0.0,
    "num_tokens": 1, "finish": "stop", "forwards": 1, "accepted": 0, "token_ids": np.array([7], dtype=np.int32),
    "drafted": np.array([False]),
}  # fmt: skip


@pytest.mark.parametrize("under", ["dense", "sparse", "rectified", None])
def test_a_lossy_rollout_is_shown_as_one(under: str | None, tmp_path: Path) -> None:
    scores = np.array([-0.5], dtype=np.float32)
    # None: a run of before there was such a thing
    marks = {} if under is None else {"sampled_under": under, "logprobs": scores, "dense_logprobs": scores}
    path = tmp_path / "step_1.parquet"
    pq.write_table(pa.Table.from_pylist([ROW | marks]), path)
    record = sample(path, 0, None)
    assert record is not None and not {"logprobs", "dense_logprobs"} & record.keys()
    out = io.StringIO()
    Console(file=out, width=160).print(shown(record, step=1))
    assert (f"attention {under}" in out.getvalue()) == (under in ("sparse", "rectified"))
