"""The rendered script under a real Slurm: munged, slurmctld and two slurmd of one host, all private to the test."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from launch.render.plan import LaunchPlan, here, make_plan
from launch.render.slurm import Slurm, render

pytestmark = pytest.mark.slow

PATIENCE_S = 900.0
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=8
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=8
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """Commands of a Slurm cluster that only this test knows."""

    env: dict[str, str]
    folder: Path

    def __call__(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=self.folder)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, plan: LaunchPlan) -> str:
        """The job id of the plan's script."""
        script = self.folder / f"{plan.run_dir.name}.sbatch"
        script.write_text(render(plan, Slurm()))
        Path(plan.state_dir).mkdir()
        self("sbatch", "--test-only", str(script))
        return self("sbatch", "--parsable", str(script))

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        fields = self("scontrol", "show", "job", "--oneliner", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def ended(self, number: str) -> tuple[str, str]:
        """State and exit code, once the job and what it started have ended."""
        wait_for(lambda: self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), f"job {number}")
        job = self.job(number)
        return job["JobState"], job["ExitCode"]


def wait_for(reached: Callable[[], bool], what: str) -> None:
    """Look twice a second until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(
    program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """Two nodes that are one host; every daemon is ended afterwards."""
    munged, slurmctld, slurmd = program("munged"), program("slurmctld"), program("slurmd")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o400)
    key.chmod(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    # ports of jobs and Ray's folders follow from job ids: another test's must not be the same
    text = CONFIG.format(
        host=socket.gethostname(),
        ports=[free_port() for _ in range(3)],
        user=user,
        first=1 + secrets.randbelow(60_000),
        folder=folder,
    )
    (folder / "slurm.conf").write_text(text)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))}
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    place = folder / "munge"
    daemons = [
        [munged, "--foreground", "--force", f"--key-file={key}", f"--socket={place}/socket", f"--pid-file={place}/pid",
         f"--log-file={place}/log", f"--seed-file={place}/seed"],
        [slurmctld, "-D", "-c"],
        [slurmd, "-D", "-N", "n1"],
        [slurmd, "-D", "-N", "n2"],
    ]  # fmt: skip
    with ExitStack() as stack:
        for index, command in enumerate(daemons):
            log = stack.enter_context((folder / f"{index}.log").open("wb"))
            daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
            stack.callback(end, daemon)
            if index == 0:
                wait_for((place / "socket").exists, "munged")
        found = Cluster(env, folder)
        wait_for(lambda: idle_nodes(found) == 2, "two idle nodes")
        stack.callback(lambda: subprocess.run(["scancel", "--user", user], env=env))
        yield found


def end(daemon: subprocess.Popen[bytes]) -> None:
    """End a daemon, however it takes."""
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(60)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def idle_nodes(cluster: Cluster) -> int:
    """Nodes that have registered; 0 while the controller does not answer yet."""
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True, env=cluster.env)
    return done.stdout.split().count("idle")


@pytest.fixture
def planned(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., LaunchPlan]:
    """Plans of a recipe that the tiny model finishes at once."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_dir}\n"
        "compute: {device: cpu, dtype: float32}\n"
        "data: {name: chain_sum, options: {min_terms: 2, max_terms: 2}, size: 64, max_prompt_tokens: 256}\n"
        "rollout: {prompts_per_step: 2, group_size: 2, max_new_tokens: 16}\n"
        "reward: {workers: 1}\n"
        "train: {steps: 2, micro_tokens: 1024}\n"
    )
    env = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

    def plan(name: str, *overrides: str, nodes: int = 1, setup: str = here()) -> LaunchPlan:
        root = PurePosixPath(tmp_path)
        return make_plan(
            str(recipe), [f"run.dir={name}", *overrides], nodes=nodes, setup=setup, env=env, root=root, time_limit="1h"
        )

    return plan


def log_of(plan: LaunchPlan, job: str) -> str:
    """What the job has said so far."""
    path = Path(plan.state_dir) / f"slurm-{job}.log"
    return path.read_text() if path.exists() else ""


def left_behind(plan: LaunchPlan, job: str) -> list[Path]:
    """Tokens and Ray folders that should be gone."""
    return [*Path(plan.state_dir).glob("ray_token*"), *Path("/tmp").glob(f"paceline-{job}-*")]


def test_two_nodes_train_together_and_leave_the_success_file(
    cluster: Cluster, planned: Callable[..., LaunchPlan]
) -> None:
    plan = planned("two", nodes=2)
    job = cluster.submit(plan)
    assert cluster.ended(job) == ("COMPLETED", "0:0"), log_of(plan, job)
    assert (Path(plan.state_dir) / "SUCCESS").read_text() == f"job {job}\nrun {plan.run_dir}\n"
    assert "all 2 nodes have joined" in log_of(plan, job)
    assert '"state": "done"' in (Path(plan.run_dir) / "STATUS.json").read_text()
    assert left_behind(plan, job) == []


def test_training_that_fails_fails_the_job_with_its_code_and_a_node_that_lags_keeps_its_logs(
    cluster: Cluster, planned: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    ray, slow = Path(sys.executable).with_name("ray"), tmp_path / "bin" / "ray"
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/bash\n{ray} "$@" &\npid=$!\n'
        "trap '[[ $SLURMD_NODENAME == n1 ]] || sleep 40; kill $pid' TERM\n"
        "wait $pid; wait $pid\n"  # the first is interrupted
    )
    slow.chmod(0o755)
    plan = planned("fails", "model=/nowhere/model", nodes=2, setup=f"{here()}; PATH={slow.parent}:$PATH")
    job = cluster.submit(plan)
    assert cluster.ended(job) == ("FAILED", "3:0"), log_of(plan, job)
    assert not (Path(plan.state_dir) / "SUCCESS").exists()
    assert "forcing job termination" not in log_of(plan, job)
    assert left_behind(plan, job) == []
    for node in ("n1", "n2"):
        assert list(Path(plan.state_dir).glob(f"ray-*/{node}/*.out"))  # Ray's logs, for whoever looks


def test_ray_that_does_not_start_fails_the_job(
    cluster: Cluster, planned: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    broken = tmp_path / "bin" / "ray"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no space left for Ray' >&2\nexit 1\n")
    broken.chmod(0o755)
    plan = planned("no-ray", setup=f"{here()}; PATH={broken.parent}:$PATH")
    job = cluster.submit(plan)
    assert cluster.ended(job) == ("FAILED", "4:0"), log_of(plan, job)
    log = log_of(plan, job)  # srun's own words may stand between these lines
    assert "Ray ended on node n1 with code 1:\n" in log and "\nno space left for Ray\n" in log
    assert not (Path(plan.state_dir) / "SUCCESS").exists()
    assert left_behind(plan, job) == []


def test_a_job_told_to_stop_saves_is_queued_again_and_goes_on(
    cluster: Cluster, planned: Callable[..., LaunchPlan]
) -> None:
    plan = planned("stopped", "train.steps=40", "rollout.max_new_tokens=48")
    job = cluster.submit(plan)
    wait_for(lambda: "step 2/" in log_of(plan, job), "the second step")
    (token,) = Path(plan.state_dir).glob("ray_token*")
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() not in log_of(plan, job)
    cluster("scancel", "--signal=TERM", "--batch", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", "the requeue")
    assert '"code": 75' in (Path(plan.run_dir) / "EXIT.json").read_text()
    # Slurm would wait two minutes; in the second in which it ended a job it does not start it ("already killed")
    cluster("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    assert cluster.ended(job) == ("COMPLETED", "0:0"), log_of(plan, job)
    assert (Path(plan.run_dir) / "events.jsonl").read_text().count('"event": "attempt"') == 2
    assert (Path(plan.state_dir) / "SUCCESS").exists()


def test_a_job_told_to_stop_before_it_trains_is_queued_again(
    cluster: Cluster, planned: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    waits = tmp_path / "bin" / "ray"
    waits.parent.mkdir()
    waits.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 3600\n")
    waits.chmod(0o755)
    plan = planned("early", setup=f"{here()}; PATH={waits.parent}:$PATH")
    job = cluster.submit(plan)
    wait_for((tmp_path / "started").exists, "Ray's start")
    cluster("scancel", "--signal=TERM", "--batch", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", "the requeue")
    assert "told to stop before training has begun" in log_of(plan, job)
    assert not Path(plan.run_dir).exists() and left_behind(plan, job) == []
    cluster("scancel", job)
