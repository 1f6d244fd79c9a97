"""A node that is lost with the worker on it, among simulated ones."""

import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_runs import Commands, check_complete, check_end, texts
from fault_table import RAY


@pytest.fixture
def nodes(commands: Commands) -> Iterator[dict[str, str]]:
    """Three nodes of one CPU each; what a command's environment needs to be on them."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with subprocess.Popen(
        [sys.executable, "-m", "launch.simulated_nodes", "0", "1", "1", "1"],  # CPUs of each: the head is no worker's
        env=commands.env | token,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        assert address, "no cluster"
        yield token | {"RAY_ADDRESS": address}
        cluster.communicate(timeout=600)


@pytest.mark.slow
def test_a_lost_node_of_a_rank_ends_all_and_they_start_again_on_the_nodes_left(
    recipe: Path, commands: Commands, nodes: dict[str, str], undisturbed: Callable[[tuple[str, ...]], Path]
) -> None:
    run = recipe.parent / "lost-node"
    ended = commands.run(
        "train", recipe, f"run.dir={run}", *RAY, "run.silence_s=8", fault="rollout.cycle@1:30:node", env=nodes
    )
    assert ended.code == 0, ended.said
    report = json.loads((run / "logs" / "attempt_1" / "crash.json").read_text())
    assert report["first"]["process"] == "worker 1" and report["following"]
    check_complete(run, steps=3)
    assert texts(run, 3) == texts(undisturbed(RAY), 3)


@pytest.mark.slow
def test_a_lost_node_that_only_samples_is_done_without(
    recipe: Path, commands: Commands, nodes: dict[str, str], undisturbed: Callable[[tuple[str, ...]], Path]
) -> None:
    run = recipe.parent / "lost-sampler"
    options = (RAY[0], "compute.placement=separate", "compute.workers=1", "compute.rollout_workers=2", "train.steps=3")
    fault = "rollout.cycle@2:30:node"
    ended = commands.run("train", recipe, f"run.dir={run}", *options, "run.silence_s=8", fault=fault, env=nodes)
    assert ended.code == 0, ended.said
    assert "the others sample what it owed" in ended.said
    assert check_end(run, ended) is None
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["attempt_1"]
    check_complete(run, steps=3)
    assert texts(run, 3) == texts(undisturbed(()), 3)
