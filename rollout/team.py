"""One engine over several processes that share a policy: rank 0 is spoken to, and the others do what it did.

Every rank has an engine of its own over its share (rollout/ranks.py). What rank 0 is told between two cycles the others
hear before the next one, so all run the same cycles over the same sequences.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from configs.errors import PacelineError
from rollout.collectives import Ranks
from rollout.engine import NativeEngine
from rollout.ranks import ENVIRONMENT as HOST_ALONE
from rollout.transfer import Weights
from rollout.types import Activity, Partial, Prompt, Rollout, Sampling

# Set where the user has not. Sockets are left alone: weights come from other hosts to the same process.
ENVIRONMENT = {name: value for name, value in HOST_ALONE.items() if not name.endswith("_IFNAME")} | {
    # a Ray worker sees its own GPU alone, as number 0; torch would take the ranks' GPUs for one, and refuse
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
}
GO_ON, CHANGED, OVER = range(3)  # what rank 0 signals before a cycle


@dataclass(frozen=True, slots=True)
class Seat:
    """A process's place in its team. meet: host and port of a store. timeout_s: that ranks wait for one another."""

    meet: tuple[str, int]
    rank: int
    world: int
    timeout_s: float

    def take(self, device: str) -> Ranks:
        """Meet the others, in torch's default group, which nothing else in this process has."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        limit = timedelta(seconds=self.timeout_s)
        store = TCPStore(*self.meet, is_master=False, timeout=limit)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=limit)
        assert dist.group.WORLD is not None
        return Ranks(dist.group.WORLD, torch.device(device, 0) if device == "cuda" else torch.device(device))


@dataclass(frozen=True, slots=True)
class Deed:
    """Something rank 0's engine was told."""

    method: Literal["update", "load_state_dict", "surrender", "adopt"]
    argument: Any

    def repeat(self, engine: NativeEngine) -> None:
        """Do it here; what was refused there is refused here, and what is under way goes on."""
        with suppress(PacelineError):
            getattr(engine, self.method)(self.argument)


@dataclass(frozen=True, slots=True)
class Call:
    """One generate of rank 0's engine, and what it was told since the one before."""

    before: tuple[Deed, ...]
    prompts: Sequence[Prompt]
    sampling: Sampling
    partials: Sequence[Partial]


class Leader:
    """The engine of rank 0, and through it of its team: NativeEngine, as those see it who give it work.

    summon: has every other rank begin follow with a call, and does not wait for it.
    """

    def __init__(self, engine: NativeEngine, summon: Callable[[Call], None]) -> None:
        assert engine.ranks is not None, "shard_policy comes first"
        self._engine = engine
        self._ranks = engine.ranks
        self._summon = summon
        self._deeds: list[Deed] = []  # that the others have not heard of
        engine.agree = self._tell

    @property
    def weights(self) -> Weights | None:
        """NativeEngine.weights: this rank's."""
        return self._engine.weights

    @property
    def is_generating(self) -> bool:
        """NativeEngine.is_generating."""
        return self._engine.is_generating

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, partials: Sequence[Partial] = ()
    ) -> AsyncGenerator[Rollout, None]:
        """NativeEngine.generate, on all ranks."""
        if not prompts and not partials:
            return
        self._summon(Call(tuple(self._deeds), prompts, sampling, partials))
        self._deeds = []
        try:
            async with aclosing(self._engine.generate(prompts, sampling, partials=partials)) as rollouts:
                async for rollout in rollouts:
                    yield rollout
        except (GeneratorExit, asyncio.CancelledError):  # between two cycles; an error is every rank's own
            self._ranks.signal(OVER)
            self._ranks.share(tuple(self._deeds))
            self._deeds = []
            raise

    def surrender(self, count: int) -> list[Partial]:
        """NativeEngine.surrender."""
        self._note("surrender", count)
        return self._engine.surrender(count)

    def adopt(self, partials: Sequence[Partial]) -> None:
        """NativeEngine.adopt."""
        self._note("adopt", partials)
        self._engine.adopt(partials)

    def progress(self) -> dict[tuple[str, int], int]:
        """NativeEngine.progress."""
        return self._engine.progress()

    def activity(self) -> list[Activity]:
        """NativeEngine.activity: one record for the team."""
        return self._engine.activity()

    def references(self) -> dict[tuple[str, int], list[float]]:
        """NativeEngine.references."""
        return self._engine.references()

    def figures(self) -> dict[str, Any]:
        """NativeEngine.figures."""
        return self._engine.figures()

    def update(self, version: int) -> int:
        """NativeEngine.update, between two generates; the other ranks' begins with it, or does not begin."""
        assert not self._engine.is_generating, "the ranks of a team hold new weights between two generates"
        self._note("update", version)
        return self._engine.update(version)

    def state_dict(self) -> dict[str, Any]:
        """NativeEngine.state_dict: equal on all ranks."""
        return self._engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """NativeEngine.load_state_dict, on all ranks."""
        self._note("load_state_dict", state)
        self._engine.load_state_dict(state)

    def _note(self, method: Literal["update", "load_state_dict", "surrender", "adopt"], argument: Any) -> None:
        self._deeds.append(Deed(method, argument))

    def _tell(self) -> bool:
        """Before a cycle: what came in between, seldom anything."""
        if self._ranks.signal(CHANGED if self._deeds else GO_ON) == CHANGED:
            self._ranks.share(tuple(self._deeds))
            self._deeds = []
        return True


async def follow(engine: NativeEngine, call: Call) -> None:
    """Run one call of rank 0's as it does, to the same end. Raises what generate does, and there too."""
    ranks = engine.ranks
    assert ranks is not None
    for deed in call.before:
        deed.repeat(engine)

    def hear() -> bool:
        signal = ranks.signal(GO_ON)
        deeds: tuple[Deed, ...] = () if signal == GO_ON else ranks.share(())
        for deed in deeds:
            deed.repeat(engine)
        return signal != OVER

    engine.agree = hear
    async for _ in engine.generate(call.prompts, call.sampling, partials=call.partials):
        pass
