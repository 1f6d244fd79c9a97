"""The faults a run may meet, what becomes of each, and docs/faults.md, which is made from this table.

python tests/faults/fault_document.py     writes docs/faults.md
"""

from dataclasses import dataclass
from typing import Literal

from configs.faults import POINTS

INLINE = ()
DRAFTER = ("spec.source=eagle",)
RAY = ("compute.backend=ray", "compute.workers=2", "train.steps=3")
SEPARATE = ("compute.backend=ray", "compute.placement=separate", "train.steps=3")
ON_DISK = ("checkpoint.keep=1",)

# What the finished run has in common with one that nothing befell: every bit of its state, every token, or the counts.
Same = Literal["bits", "tokens", "counts"]


@dataclass(frozen=True)
class Case:
    """One row. code: how the disturbed command ends; where that is not 0, the run is resumed without the fault.

    said: what the report of the first cause must hold, or where there is none the command's output.
    """

    what: str
    fault: str
    outcome: str
    code: int
    options: tuple[str, ...] = INLINE
    same: Same = "bits"
    said: str = ""

    @property
    def workers(self) -> int:
        """Ray workers; 0: one process."""
        return 2 if RAY[0] in self.options else 0


KILLED = -9
LAST = "resume goes on from the last whole checkpoint"
AGAIN = "all workers start again from the newest checkpoint"

CASES: dict[str, Case] = {
    # one process
    "driver-dies-mid-rollout": Case("the process is killed while it samples", "rollout.cycle:30:kill", LAST, KILLED),
    "driver-dies-mid-step": Case("the process is killed in a step", "train.backward:3:kill", LAST, KILLED),
    "sigterm": Case("SIGTERM", "rollout.cycle:30:term", "the state is saved; resume goes on from there", 75),
    "bug-mid-rollout": Case(
        "an unexpected error while it samples",
        "rollout.cycle:30:raise",
        f"exit 1, the stack in the report; {LAST}",
        1,
        said="FaultError: injected at rollout.cycle",
    ),
    "nan-loss": Case(
        "a loss that is NaN", "train.backward:3:nan", f"the update is not applied, exit 5; {LAST}", 5, said="not finite"
    ),
    "out-of-memory": Case(
        "out of memory in a step", "train.backward:3:oom", f"exit 4, with what to lower; {LAST}", 4, said="OutOfMemory"
    ),
    "data-unreadable": Case(
        "an unexpected error while the data are read",
        "data.load:1:raise",
        "exit 1 before anything starts; resume starts over",
        1,
    ),
    # a checkpoint
    **{
        f"dies-at-{point}-{nth}": Case(
            f"the process is killed as {POINTS[f'checkpoint.{point}']}",
            f"checkpoint.{point}:{nth}:kill",
            LAST,
            KILLED,
            ON_DISK,
        )
        for point, nth in {"stage": 3, "file": 7, "manifest": 3, "fsync": 17, "rename": 3, "clean": 1}.items()
    },
    "full-disk-checkpoint": Case(
        "a full disk under a checkpoint",
        "checkpoint.file:7:enospc",
        f"nothing half-written stays, exit 6; {LAST}",
        6,
        said="No space left on device",
    ),
    "full-disk-fsync": Case(
        "a full disk found out at the end",
        "checkpoint.fsync:17:enospc",
        f"nothing half-written stays, exit 6; {LAST}",
        6,
        said="No space left on device",
    ),
    "full-disk-metrics": Case(
        "a full disk under the metrics", "metrics.append:2:enospc", f"exit 6; {LAST}", 6, said="steps.jsonl"
    ),
    "full-disk-samples": Case(
        "a full disk under the samples", "samples.write:2:enospc", f"exit 6; {LAST}", 6, said="step_2.parquet"
    ),
    "dies-before-metrics": Case("the process is killed before a step's record", "metrics.append:3:kill", LAST, KILLED),
    "dies-before-samples": Case(
        "the process is killed between a step's record and its samples",
        "samples.write:3:kill",
        f"{LAST}, the record is cut and written again",
        KILLED,
    ),
    "corrupt-shard": Case(
        "a shard of the newest checkpoint is corrupt (and the process was killed)",
        "metrics.append:4:kill",
        "the checkpoint is set aside as step_N.corrupt; the one before it is taken",
        KILLED,
    ),
    # the drafter
    "drafter-crash": Case(
        "an error while the drafter learns",
        "drafter.step:2:raise",
        "it starts again from its last good weights; rollouts go on",
        0,
        DRAFTER,
        "counts",
        "the drafter starts again from its last good weights",
    ),
    "drafter-nan": Case(
        "a drafter whose loss is NaN again and again",
        "drafter.step:1+:nan",
        "updates are dropped; after three turns it is left alone, and rollouts go on",
        0,
        DRAFTER,
        "counts",
        "the drafter learns no more",
    ),
    "drafter-publish": Case(
        "an error while a better head is published",
        "drafter.publish:1:raise",
        "the head served stays; rollouts go on",
        0,
        DRAFTER,
        "counts",
        "publishing the drafter failed",
    ),
    # rewards
    "reward-hang": Case(
        "a reward that hangs",
        "reward.call:3:hang",
        f"killed after reward.timeout_s, exit 8 (scored 0 under on_error=zero); {LAST}",
        8,
        ("reward.timeout_s=1",),
        said="no answer within 1 s",
    ),
    "reward-exception": Case(
        "a reward that raises", "reward.call:3:raise", "exit 8 (scored 0 under on_error=zero)", 8, said="FaultError"
    ),
    "reward-dies": Case(
        "a reward whose process dies", "reward.call:3:kill", "exit 8 (scored 0 under on_error=zero)", 8, said="SIGKILL"
    ),
    "reward-hog": Case(
        "a reward that wants 10 GB",
        "",
        "it meets reward.memory_mb and is scored 0 under on_error=zero",
        0,
        ("reward.functions={'tiny_reward:hog': 1.0}", "reward.on_error=zero"),
        "counts",
    ),
    "reward-forks": Case(
        "a reward that starts processes without end",
        "",
        "all are killed with it after reward.timeout_s; scored 0 under on_error=zero",
        0,
        ("reward.functions={'tiny_reward:forks': 1.0}", "reward.on_error=zero", "reward.timeout_s=2"),
        "counts",
    ),
    # workers
    "worker-dies-mid-rollout": Case(
        "a worker is killed while it samples", "rollout.cycle@1:30:kill", AGAIN, 0, RAY, "tokens", "worker 1"
    ),
    "worker-dies-mid-step": Case(
        "a worker is killed in a step", "train.backward@1:2:kill", AGAIN, 0, RAY, "tokens", "worker 1"
    ),
    "worker-dies-building": Case(
        "a worker dies before it has loaded its policy", "worker.build@1:1:exit", AGAIN, 0, RAY, "tokens", "died"
    ),
    "worker-dies-saving": Case(
        "the worker that writes a checkpoint is killed", "checkpoint.file@0:4:kill", AGAIN, 0, RAY, "tokens", "worker 0"
    ),
    "straggler-mid-rollout": Case(
        "a worker stops while it samples (SIGSTOP)",
        "rollout.cycle@1:30:stop",
        f"killed after run.silence_s without a sign of life; {AGAIN}",
        0,
        (*RAY, "run.silence_s=6"),
        "tokens",
        "showed no sign of life",
    ),
    "straggler-mid-step": Case(
        "a worker stops in a step (SIGSTOP)",
        "train.backward@1:2:stop",
        f"killed after run.silence_s without a sign of life; {AGAIN}",
        0,
        (*RAY, "run.silence_s=6"),
        "tokens",
        "showed no sign of life",
    ),
    "rank-hangs": Case(
        "a worker lives but never comes to the reduction of gradients",
        "train.backward@1:2:hang",
        f"the others wait run.collective_s and name it; {AGAIN}",
        0,
        (*RAY, "run.collective_s=12"),
        "tokens",
        "worker 1",
    ),
    "bug-in-worker": Case(
        "an unexpected error in one worker",
        "train.backward@1:2:raise",
        "exit 1; the report has that worker's stack, not what the others say of it",
        1,
        RAY,
        "tokens",
        "worker 1",
    ),
    "budget-spent": Case(
        "a worker that is lost again and again",
        "rollout.cycle@1:1+:kill",
        f"exit 7 once run.max_recoveries are used up; {LAST}",
        7,
        (*RAY, "run.max_recoveries=1"),
        "tokens",
        "workers were lost 2 times",
    ),
    "transfer-cut-by-trainer": Case(
        "the worker that sends weights is killed half-way",
        "transfer.bucket@0:2:kill",
        f"the engine serves nothing of it; {AGAIN}",
        0,
        SEPARATE,
        "tokens",
        "worker 0",
    ),
    "transfer-cut-by-engine": Case(
        "the only engine is killed while it receives weights",
        "transfer.bucket@1:2:kill",
        AGAIN,
        0,
        SEPARATE,
        "tokens",
        "worker 1",
    ),
    "driver-dies": Case(
        "the driver of two workers is killed",
        "metrics.append:2:kill",
        f"its workers go with it; {LAST}",
        KILLED,
        RAY,
        "tokens",
    ),
}

# Rows whose tests need more than a command: the test.
ELSEWHERE: tuple[tuple[str, str, str, str], ...] = (
    (
        "a node is lost with its worker",
        "rollout.cycle@1:30:node",
        "a rank's: all start again on the nodes left, from the newest checkpoint; another's: the others go on",
        "tests/faults/test_nodes.py",
    ),
    (
        "one of the workers that share an engine is killed (`rollout.tensor_parallel`)",
        "rollout.cycle@2:30:kill",
        "its team is ended with it, and the error names team and rank; the others sample what it owed, or "
        "where there is no other all workers start again from the newest checkpoint",
        "tests/system/test_teams.py",
    ),
    (
        "out of memory while a CUDA graph is captured",
        "graph.capture:1:oom",
        "such cycles run eagerly from then on, said once",
        "tests/faults/test_graph_capture.py",
    ),
    (
        "a kill at any write, fsync, rename or removal of a checkpoint",
        "every one, in turn",
        "the newest whole checkpoint is taken up bit for bit: parameters, optimiser, drafter, loop",
        "tests/faults/test_every_write.py",
    ),
)
