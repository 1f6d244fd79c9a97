"""DeepSpeed trains the policy in place: the parameters it updates are the ones the engine samples with."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from math import inf
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from configs.errors import DivergedError
from configs.faults import hit
from configs.schema import TrainConfig
from rl import stored
from rl.batch import microbatches, split, to_device
from rl.loss import RECORD, clipped_policy_loss, importance_weights, k3_divergence, step_stats
from rl.offload import Shelf
from rl.packed import PackedPolicy, Round
from rl.reference import completed
from rl.schedule import learning_rate
from rl.types import Batch, StepStats
from rl.ulysses import Sharing, require_heads
from rl.zero import Shares, deepspeed_config, limit_waits, start_deepspeed
from rollout.projections import grouped_parameters
from rollout.transfer import layout, trainable

log = logging.getLogger(__name__)


# (round, logprobs [R], entropy [R]) -> record [len(RECORD), R], whose first row carries the gradient
Objective = Callable[[Round, torch.Tensor, torch.Tensor], torch.Tensor]


class DeepSpeedTrainer:
    """rl.types.Trainer on DeepSpeed's ZeRO 0 to 3.

    Every rank is given the same whole batch and takes its share of it, so that all know every denominator. Parameters
    keep their storage from here on, but under ZeRO 3, where a rank holds a share of each and whole_parameters puts them
    together. In bfloat16 the optimiser works on float32 masters and gradients add up in float32; ZeRO 0, for which
    DeepSpeed has no float32 accumulator, then runs as ZeRO 1: equal results, less memory.
    With train.sequence_parallel several ranks have the same share of a batch, and a part of every sequence each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        *,
        total_steps: int,
        temperature: float,
        device: torch.device | str,
        collective_s: float = 1800.0,
    ) -> None:
        """collective_s: how long ranks wait for one another."""
        self.config = config
        self.total_steps = total_steps
        self.temperature = temperature
        self.device = torch.device(device)
        self.steps = 0  # reinforcement steps done; the schedule's position
        self.changes = 0  # of the parameters, by whatever means
        self.params = trainable(model)
        shapes = {name: param.shape for name, param in self.params.items()}
        (self.dtype,) = {param.dtype for param in self.params.values()}
        assert self.dtype in (torch.float32, torch.bfloat16), self.dtype
        self.stage = 1 if config.zero_stage == 0 and self.dtype == torch.bfloat16 else config.zero_stage
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # rollouts are sampled without
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        require_heads(model.config, config.sequence_parallel)
        deepspeed = start_deepspeed(self.device, collective_s)
        self.sharing = Sharing(config.sequence_parallel)
        self.policy = PackedPolicy(model, self.sharing)
        self.reference: dict[str, torch.Tensor] | None = None
        # in this order DeepSpeed's flat buffers leave the projections of a layer side by side, as rollouts read them
        ordered = [param for param in grouped_parameters(model) if param.requires_grad]
        self.adam = torch.optim.AdamW(
            ordered, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        num_params = sum(param.numel() for param in self.params.values())
        with redirect_stdout(StringIO()) as chatter:  # its bfloat16 optimiser prints memory reports
            self.engine, *_ = deepspeed.initialize(
                model=self.policy,
                optimizer=self.adam,
                config=deepspeed_config(config, self.stage, self.dtype, num_params),
                dist_init_required=False,
            )
        limit_waits(collective_s)
        log.debug("%s", chatter.getvalue())
        self.engine.eval()
        self.shares = Shares(deepspeed, self.engine, self.adam, self.params, shapes, stage=self.stage)
        self.shares.prime()
        self.make_room: Callable[[], None] | None = None  # called before memory that was lent is needed again
        self.lent_bytes = 0
        self._shelf = Shelf(self.device) if config.offload == "rollout" else None
        self._lend()

    def step(self, batch: Batch) -> StepStats:
        """One pass over the batch in updates_per_step updates, each of as many passes as its tokens need.

        Raises DivergedError, the update that failed not applied, when a loss or a gradient is not finite.
        """
        start = perf_counter()
        with self._own_memory():
            stats = self._step(batch)
        held = 0
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = perf_counter() - start
        return replace(stats, seconds=seconds, offloaded_bytes=self.lent_bytes, memory_bytes=held)

    def _step(self, batch: Batch) -> StepStats:
        config, lr = self.config, learning_rate(self.config, self.steps, self.total_steps)
        if config.kl_coef > 0 and self.reference is None:
            self.reference = {name: param.detach().clone() for name, param in self.params.items()}
        updates = [update for update in split(batch, config.updates_per_step) if update.loss_mask.any()]
        rounds = [self._rounds(update) for update in updates]
        if len(updates) > 1:
            for each in (each for group in rounds for each in group):
                with torch.no_grad():
                    each.old_logprobs, _ = self.policy(each, self.temperature)
        records, norms = zip(
            *(
                self._update(group, update, self._policy_objective, lr=lr, temperature=self.temperature)
                for group, update in zip(rounds, updates, strict=True)
            ),
            strict=True,
        )
        self.steps += 1
        return step_stats(torch.cat(records, dim=1), batch, sum(norms) / len(norms), lr, seconds=0.0)

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        """One cross-entropy update on the batch's masked tokens; the schedule does not move. Raises DivergedError."""
        start = perf_counter()
        with self._own_memory():
            record, norm = self._update(self._rounds(batch), batch, self._cross_entropy, lr=lr, temperature=1.0)
        return step_stats(record, batch, norm, lr, perf_counter() - start)

    @contextmanager
    def _own_memory(self) -> Iterator[None]:
        """Inside, optimiser states are on the device; outside too, unless train.offload lends their memory."""
        if self._shelf is None:
            yield
            return
        if self.make_room is not None:
            self.make_room()
        self._shelf.bring_back()
        try:
            yield
        finally:
            self._lend()

    def _lend(self) -> None:
        """Have optimiser states wait on the host, and their memory serve others."""
        if self._shelf is not None:
            states = [*self.shares.states(), *(self.reference or {}).values()]
            self.lent_bytes = self._shelf.put_away(states, self.shares.gradient_buffers())

    def _rounds(self, batch: Batch) -> list[Round]:
        """This rank's passes over its share of an update; every rank has the same number of them."""
        sharing = self.sharing
        room = self.config.micro_tokens * sharing.size
        shares = [microbatches(share, room) for share in split(batch, sharing.count)]
        own = shares[sharing.number]
        filler = (own or max(shares, key=len))[0]
        missing = max(map(len, shares)) - len(own)
        rounds = []
        for part, weight in [*((part, 1.0) for part in own), *[(filler, 0.0)] * missing]:
            part = to_device(part, self.device)
            rounds.append(Round(part, sharing.targets(part), weight))
        return rounds

    def _update(
        self, rounds: list[Round], batch: Batch, objective: Objective, *, lr: float, temperature: float
    ) -> tuple[torch.Tensor, float]:
        """One optimiser update from the rounds of a batch. Returns all ranks' records [len(RECORD), R] and the norm."""
        # DeepSpeed averages gradients over ranks; the mean meant here is over all tokens of the update
        scale = dist.get_world_size() / int(batch.loss_mask.sum())
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.changes += 1
        self.engine.train(self.config.gradient_checkpointing)
        kept = [torch.zeros(len(RECORD), 0, device=self.device)]
        for index, each in enumerate(rounds):
            self.engine.set_gradient_accumulation_boundary(index == len(rounds) - 1)
            record = objective(each, *self.engine(each, temperature))
            loss = record[0].sum() * (each.weight * scale)
            if hit("train.backward") == "nan":
                loss = loss * torch.nan
            # a gradient that is not finite is what every rank sees, and what no optimiser applies
            self.engine.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
            if each.weight:
                kept.append(record.detach())
        self.engine.eval()
        norm, applied = self._apply()
        record = all_ranks(torch.cat(kept, dim=1)).cpu()
        if not applied:
            culprit = "gradient" if record[0].isfinite().all() else "loss"
            raise DivergedError(
                f"the {culprit} of step {self.steps + 1} is not finite and was not applied; "
                f"lower the learning rate ({lr:g}) and start again from the last checkpoint"
            )
        return record, norm

    def _apply(self) -> tuple[float, bool]:
        """Clip and step. Returns the gradient's norm before clipping, and whether it was finite and thus applied."""
        if self.stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm()), bool(self.engine.was_step_applied())
        # plain AdamW would take a step along NaN, so at stage 0 the clipping and the check are ours
        norm = float(nn.utils.clip_grad_norm_(self.params.values(), self.config.max_grad_norm or inf))
        if not norm < inf:
            self.engine.zero_grad()
            return norm, False
        self.engine.step()
        return norm, True

    def _policy_objective(self, each: Round, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """The policy loss of GRPO with its corrections."""
        config, targets = self.config, each.targets
        sampled, advantages = each.batch.old_logprobs[targets], each.batch.advantages[targets]
        dense = each.batch.dense_logprobs[targets]
        old = logprobs.detach() if each.old_logprobs is None else each.old_logprobs
        weights = importance_weights(old, sampled, config.importance_cap)
        loss, clipped = clipped_policy_loss(
            logprobs, old, advantages, clip_low=config.clip_low, clip_high=config.clip_high
        )
        loss, kl = weights * loss, torch.zeros_like(loss)
        if self.reference is not None:
            # ranks that compute together must agree on what is to be computed
            alone = self.scores_alone(config)
            reference = completed(each, self._referred) if alone else self._referred(each)
            kl = k3_divergence(logprobs, reference)
            loss = loss + config.kl_coef * kl
        # of the dense forwards alone: what a selector changes is meant, and the weights' to correct
        prob_diff, logprob_diff = (old.exp() - dense.exp()).abs(), (old - dense).abs()
        log_ratio = old - sampled
        return torch.stack([loss, entropy.detach(), kl, clipped.float(), weights, log_ratio, prob_diff, logprob_diff])

    @torch.no_grad()
    def _referred(self, each: Round) -> torch.Tensor:
        """The reference's log-probs of a round's targets, [R]; before the first step, the policy's."""
        named = {f"policy.{name}": tensor for name, tensor in (self.reference or {}).items()}
        logprobs, _ = torch.func.functional_call(self.policy, named, (each, self.temperature))
        return logprobs

    @staticmethod
    def scores_alone(config: TrainConfig) -> bool:
        """Whether there is a reference, which one rank can ask without the others, in memory that nobody else has."""
        together = config.zero_stage == 3 or config.sequence_parallel > 1
        return config.kl_coef > 0 and not together and config.offload == "none"

    def score(self, batch: Batch) -> torch.Tensor:
        """The reference's log-probs of a batch's response tokens, [R] on the host, computed by this rank alone."""
        assert self.scores_alone(self.config)
        parts = [to_device(part, self.device) for part in microbatches(batch, self.config.micro_tokens)]
        return torch.cat([self._referred(Round(part, self.sharing.targets(part), 1.0)).cpu() for part in parts])

    def _cross_entropy(self, each: Round, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """The supervised loss: nothing was sampled, so nothing is corrected."""
        zero = torch.zeros_like(logprobs)
        return torch.stack([-logprobs, entropy.detach(), zero, zero, torch.ones_like(zero), zero, zero, zero])

    def save(self, folder: Path) -> None:
        """As rl.stored.write; every rank takes part, rank 0 writes. Raises OSError."""
        with self._own_memory():
            stored.write(folder, self.shares, dtype=self.dtype, reference=self.reference, steps=self.steps)

    def load(self, folder: Path) -> None:
        """Restore what save wrote, whatever number of ranks and ZeRO stage wrote it. Raises StorageError."""
        stored.check_fits(folder, self.shares, dtype=self.dtype)
        self.changes += 1
        with self._own_memory():
            self.steps = stored.read(folder, self.shares, dtype=self.dtype, device=self.device)
            if self.config.kl_coef > 0 and self.steps > 0:
                self.reference = stored.read_reference(folder, device=self.device)

    @property
    def layout(self) -> str:
        """As ReceivedWeights.layout, of what whole_parameters yields."""
        return layout((name, shape, self.dtype) for name, shape in self.shares.shapes.items())

    def whole_parameters(self, *, at_a_time: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, valid until the next is asked for; all ranks go through them at the same time.

        at_a_time: bytes that are gathered at once, where ranks hold shares (ZeRO 3).
        """
        return self.shares.whole(at_a_time=at_a_time)


def all_ranks(record: torch.Tensor) -> torch.Tensor:
    """Every rank's columns [K, R of that rank] side by side, in rank order, on every rank."""
    world = dist.get_world_size()
    if world == 1:
        return record
    widths = [torch.zeros(1, dtype=torch.int64, device=record.device) for _ in range(world)]
    dist.all_gather(widths, torch.tensor([record.shape[1]], device=record.device))
    widest = max(int(width) for width in widths)
    padded = nn.functional.pad(record, (0, widest - record.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, : int(width)] for part, width in zip(parts, widths, strict=True)], dim=1)
