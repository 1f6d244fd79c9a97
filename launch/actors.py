"""The body of a Ray actor: one process of a run, which trains, samples, or both, exactly as a run of one process does.

launch/start.py puts them together. The driver spreads prompts over the workers' engines and hands each batch to all
trainers, which share it and reduce their gradients.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from configs import faults
from drafter.gate_learner import GateJudgement, GateLearner
from drafter.learner import Learner
from drafter.publish import Judgement
from drafter.report import DrafterReport, LearnStats, Replica, Standing
from launch.noted import noting, one_line
from launch.pace import Key
from launch.pulse import GROUP, Life, life
from rl.gate_lessons import GateLessons, Learned
from rl.reference import by_rollout, responses
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch, StepStats
from rollout.collectives import listening_store
from rollout.engine import NativeEngine
from rollout.ranks import LOOPBACK
from rollout.team import Call, Leader, follow
from rollout.transfer import Link, ReceivedWeights, Transfer, send
from rollout.types import Activity, Engine, Partial, Prompt, Rollout, Sampling

# What a worker is made of. Without a trainer it only samples, without an engine it only trains; without a learner there
# is no drafter to train.
Parts = tuple[Engine | None, DeepSpeedTrainer | None, Learner | None]

Copied = Literal["drafter", "gates"]  # what each worker trains a copy of


def own_host() -> str:
    """Where other workers reach this one: only from this machine where all of the cluster is on it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return LOOPBACK if len(nodes) == 1 else ray.util.get_node_ip_address()


class Summons:
    """Calls the other ranks of a team to what its first one does."""

    def __init__(self, followers: Sequence[Any]) -> None:
        self.followers = followers

    def __call__(self, call: Call) -> None:
        """Worker.follow on all of them."""
        for follower in self.followers:
            follower.follow.remote(call)


@noting
class Worker:
    """Actor body: one rank. Methods mirror those of engine, trainer and learner; generate streams.

    All of them run in one thread, between two cycles of a generate; learning alone has its own, and never runs beside
    a generate: whoever gives the worker something to sample calls it away first.
    """

    def __init__(self, rank: int, world_size: int, planned: str = "", recovery: int = 0) -> None:
        """planned: faults, as PACELINE_FAULT has them at the driver; recovery: how many came before this worker.

        rank: the worker's number; of those that train together, world_size in all, its rank too.
        """
        faults.arm(planned, process=str(rank), recovery=recovery)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
        self.generating = asyncio.Lock()
        self.away_from = 0  # the last turn of learning that is over
        self.copies: dict[Copied, Learner | GateLearner] = {}
        self.receiver: ReceivedWeights | None = None
        self.link: Link | None = None  # to those that weights are sent to, or come from
        self.failed = ""

    @ray.method(concurrency_group=GROUP)
    def alive(self) -> Life:
        """Who this is; answered by a thread of its own, whatever the other is at."""
        return life(self.failed)

    def address(self) -> tuple[str, int]:
        """Where the ranks of this one's group meet, as long as it lives."""
        self.meeting = listening_store(own_host())
        return self.meeting.host, self.meeting.port

    def build(self, make: Callable[[], Parts], meet: tuple[str, int]) -> bool:
        """Load the policy and join the other ranks; whether there is a drafter to train."""
        # the last says that the store is there already: torch's own would listen to every network
        os.environ |= {"MASTER_ADDR": meet[0], "MASTER_PORT": str(meet[1]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        faults.hit("worker.build")
        engine, trainer, learner = make()
        if engine is not None:
            assert isinstance(engine, NativeEngine | Leader)  # configs.check lets no other engine run under Ray
            self.engine = engine
            self.receiver = engine.weights if isinstance(engine.weights, ReceivedWeights) else None
            if isinstance(engine, NativeEngine) and engine.sparse is not None and engine.sparse.sampler is not None:
                self.gates = GateLessons(engine)
                self.copies["gates"] = self.gates.learner
        if trainer is not None:
            self.trainer = trainer
        if learner is not None:
            self.learner = self.copies["drafter"] = learner
        return learner is not None

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, partials: Sequence[Partial]
    ) -> AsyncGenerator[Rollout]:
        """NativeEngine.generate on this worker's policy, once the one before has ended."""
        stream = self.engine.generate(prompts, sampling, partials=partials)
        async with self.generating, aclosing(stream) as rollouts:
            async for rollout in rollouts:
                yield rollout

    async def follow(self, call: Call) -> None:
        """Take part in a call of the team's first rank, which waits for nobody's answer: the pulse tells of errors."""
        assert isinstance(self.engine, NativeEngine)
        try:
            async with self.generating:
                await follow(self.engine, call)
        except Exception as error:
            self.failed = one_line(error)
            raise

    def surrender(self, count: int) -> list[Partial]:
        """NativeEngine.surrender, between two cycles."""
        return self.engine.surrender(count)

    def adopt(self, partials: Sequence[Partial]) -> bool:
        """NativeEngine.adopt, between two cycles; False where there is no generate under way that could."""
        if not self.engine.is_generating:
            return False
        self.engine.adopt(partials)
        return True

    def progress(self) -> dict[Key, int]:
        """NativeEngine.progress."""
        return self.engine.progress()

    def activity(self) -> Activity:
        """NativeEngine.activity."""
        return self.engine.activity()[0]

    def update(self, version: int) -> int:
        """Engine.update."""
        return self.engine.update(version)

    def engine_state(self) -> dict[str, Any]:
        """Engine.state_dict."""
        return self.engine.state_dict()

    def load_engine_state(self, state: dict[str, Any]) -> None:
        """Engine.load_state_dict."""
        self.engine.load_state_dict(state)

    def step(self, batch: Batch) -> StepStats:
        """Trainer.step; the ranks share the batch and reduce among themselves."""
        return self.trainer.step(batch)

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        """Trainer.supervise."""
        return self.trainer.supervise(batch, lr)

    def save(self, folder: Path) -> None:
        """Trainer.save; rank 0 writes."""
        self.trainer.save(folder)

    def load(self, folder: Path) -> None:
        """Trainer.load."""
        self.trainer.load(folder)

    def layout(self) -> str:
        """What parameters this worker sends, or receives."""
        return self.trainer.layout if self.receiver is None else self.receiver.layout

    def listen(self) -> tuple[str, int]:
        """Where those that the first trainer sends to meet it."""
        self.store = listening_store(own_host())
        return self.store.host, self.store.port

    def join(self, meet: tuple[str, int], rank: int, world: int, device: str, timeout_s: float) -> None:
        """Become one of the group that weights are sent in; rank 0 sends."""
        limit = timedelta(seconds=timeout_s)
        store = self.store if rank == 0 else TCPStore(*meet, is_master=False, timeout=limit)
        self.link = None  # an old one ends before
        self.link = Link(store, rank=rank, world=world, device=device, timeout_s=timeout_s)

    def send(self, version: int, bucket_bytes: int) -> Transfer | None:
        """Send the policy to all engines; None of a rank that only helps to put it together."""
        parameters = self.trainer.whole_parameters(at_a_time=bucket_bytes)
        if self.link is None:
            for _ in parameters:
                pass
            return None
        try:
            return send(parameters, self.link, version, bucket_bytes=bucket_bytes)
        except Exception:
            self.link = None  # engines that wait for more hear so now
            raise

    async def receive(self, version: int, bucket_bytes: int) -> Transfer:
        """ReceivedWeights.receive, between two generates."""
        async with self.generating:  # one that follows may end a little later than the one that is followed
            assert self.link is not None and self.receiver is not None
            return self.receiver.receive(self.link, version, bucket_bytes=bucket_bytes)

    def begin_learning(self, counts: torch.Tensor) -> None:
        """Learner.begin."""
        self.learner.begin(counts)

    async def learn(self, turn: int, budget_s: float) -> LearnStats:
        """Learner.learn, in a thread so that the actor still hears what it is told, until called away from the turn."""
        return await asyncio.to_thread(self.learner.learn, budget_s=budget_s, until=lambda: self.away_from >= turn)

    def score(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> dict[Key, list[float]]:
        """The reference policy's log-probs of finished rollouts."""
        return by_rollout(pairs, self.trainer.score(responses(pairs)))

    def call_away(self, turn: int) -> None:
        """End the learning of this turn and those before, begun or not, after the step it is at."""
        self.away_from = max(self.away_from, turn)

    def delta(self, copied: Copied) -> tuple[bool, dict[str, torch.Tensor]]:
        """What was learned since workers agreed last, as Learner.delta, and whether there is any."""
        delta = self.copies[copied].delta()
        return bool(delta), delta

    def apply_deltas(self, copied: Copied, *deltas: dict[str, torch.Tensor]) -> None:
        """Learner.apply."""
        self.copies[copied].apply(deltas)

    def replica(self, copied: Copied) -> Replica:
        """Learner.replica."""
        return self.copies[copied].replica()

    def become(self, copied: Copied, replica: Replica) -> Standing:
        """Learner.become."""
        return self.copies[copied].become(replica)

    def give_up(self, copied: Copied, reason: str) -> Standing:
        """Learner.give_up."""
        return self.copies[copied].give_up(reason)

    def judge(self, version: int) -> Judgement | None:
        """Learner.judge."""
        return self.learner.judge(version)

    def conclude(self, judgement: Judgement | None) -> DrafterReport:
        """Learner.conclude."""
        return self.learner.conclude(judgement)

    def save_drafter(self, folder: Path) -> float:
        """Learner.save."""
        return self.learner.save(folder)

    def drafter_saved(self) -> None:
        """Learner.saved."""
        self.learner.saved()

    def load_drafter(self, folder: Path) -> None:
        """Learner.load."""
        self.learner.load(folder)

    def learn_gates(self) -> Learned:
        """GateLessons.learn."""
        return self.gates.learn()

    def judge_gates(self) -> GateJudgement | None:
        """GateLearner.judge."""
        return self.gates.learner.judge()

    async def conclude_gates(self, judgement: GateJudgement | None) -> Standing:
        """GateLearner.conclude, once no generate is under way."""
        async with self.generating:
            return self.gates.learner.conclude(judgement)

    def save_gates(self, folder: Path, base_model: str) -> None:
        """GateLessons.save."""
        self.gates.save(folder, base_model=base_model)

    def load_gates(self, folder: Path) -> None:
        """GateLessons.load."""
        self.gates.load(folder)
