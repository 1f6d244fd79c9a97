"""vLLM as the engine: rollouts behind the same protocol, from a copy of the policy that vLLM keeps in this process.

What differs from NativeEngine: the weights are copied at every update; the noise is vLLM's own, seeded for each rollout
but drawn by generators with a state, so that speculation and the batch can change what is sampled, though not its
distribution; drafts are chains of an EAGLE-3 head, exported at first and published to it from then on; it shows no
hidden states, so that whoever trains the head has the policy read finished rollouts again.
"""

import asyncio
import atexit
import os
import time
import weakref
from collections import abc
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from configs.errors import ConfigError, PacelineError, PreflightError, ResourceError
from configs.schema import RolloutConfig
from drafter.types import OFF, Strategy
from kernels.sample import noise_key
from rollout.activity import Tally
from rollout.memory import cache_budget
from rollout.model import bytes_per_block, context_length
from rollout.prompts import check_prompts
from rollout.types import Activity, Prompt, Rollout, Sampling, SpecStats

# before vLLM is imported; whoever sets them otherwise is obeyed
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: tensors are handed over as they are
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it compiles at start with nvcc
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # dozens of warnings at every start
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from rollout.vllm_transfer import TRANSFER, hand_over, tensor_shapes

MAX_BLOCK_SIZE = 128  # of vLLM's KV cache, whichever the device: a sequence rounds up to whole blocks
GPU_SHARE = 0.01  # what must be free at start; the cache has its own size, and training has the rest
SEED_BITS = 62  # a generator's seed is not negative

Read = abc.Callable[[abc.Sequence[tuple[Prompt, Rollout]], Sampling], None]


@dataclass
class Running:
    """A rollout under way."""

    prompt: Prompt
    sample: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    drafted: list[tuple[int, int]] = field(default_factory=list)  # as in SpecStats
    finish: Literal["stop", "length"] | None = None


class VllmEngine:
    """Samples rollouts with vLLM from a copy of the policy, brought up to date by update().

    folder: the policy's, whose config and weights vLLM reads at the start. drafter: folder of an exported EAGLE-3
    drafter, of which each forward verifies depth tokens; None decodes token by token. max_length: the longest sequence,
    prompt and response. read: is given the rollouts of every generate, with their prompts, once all are there. One
    generate at a time, and no update during one.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        folder: Path,
        *,
        rollout: RolloutConfig,
        max_length: int,
        drafter: Path | None = None,
        depth: int = 0,
        read: Read | None = None,
    ) -> None:
        assert (drafter is None) == (depth == 0)
        self.version = 0
        self.drafter_version = 0
        self._policy = policy
        self._depth = depth
        self._read = read
        self._max_length = min(max_length, context_length(policy.config))
        self._drafter_shapes = {} if drafter is None else tensor_shapes(drafter)
        self._running: dict[str, Running] = {}
        self._max_running = rollout.max_running
        self._strategy = Strategy("eagle", depth, 1, depth) if depth else OFF
        self._tally = Tally()
        self._is_cuda = policy.device.type == "cuda"
        longest = min(self._max_length + depth, context_length(policy.config))
        speculative = None
        if drafter is not None:
            speculative = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": depth}
        try:
            with own_threads():
                self._llm = LLM(
                    str(folder),
                    skip_tokenizer_init=True,
                    use_tqdm_on_load=False,
                    generation_config="vllm",
                    dtype=str(policy.dtype).removeprefix("torch."),
                    # room for drafts past the end: without, vLLM drafts for nobody while one sequence is near it
                    max_model_len=longest,
                    max_num_seqs=rollout.max_running,
                    # vLLM sets back the noise of a prompt computed in parts, which a CPU's generators cannot
                    enable_chunked_prefill=self._is_cuda,
                    max_num_batched_tokens=max(
                        rollout.prefill_tokens, rollout.max_running * (1 + depth), 0 if self._is_cuda else longest
                    ),
                    kv_cache_memory_bytes=self._cache_bytes(rollout),
                    gpu_memory_utilization=GPU_SHARE,
                    enforce_eager=not self._is_cuda or rollout.graph_mb == 0,
                    logprobs_mode="processed_logprobs",
                    weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
                    speculative_config=speculative,
                )
            # before whoever shares the process group ends it, at which vLLM's own end would fail
            atexit.register(shut_down, weakref.ref(self._llm))
            if not self._is_cuda:
                from rollout.vllm_cpu import repair

                repair()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, PacelineError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise PreflightError(f"vLLM does not start with {folder} ({reason}); set rollout.backend=native") from error

    async def generate(self, prompts: abc.Sequence[Prompt], sampling: Sampling) -> abc.AsyncGenerator[Rollout, None]:
        """num_samples rollouts of every prompt, each as it finishes. Raises DataError as check_prompts does."""
        assert not self._running, "one generate at a time"
        check_prompts(prompts, sampling, context=context_length(self._policy.config))
        assert sampling.min_p == 0, "vLLM applies min_p in another order, and not at all to drafts"
        if self._depth and sampling.temperature and sampling.top_k and sampling.top_p == 1 and not self._is_cuda:
            # apply_top_k_only of vLLM 0.32.0 fails on a step without drafts, which every prompt's first is
            raise ConfigError(
                f"rollout.top_k={sampling.top_k}: vLLM cannot filter by top_k alone while it drafts on a CPU;"
                " set 0, rollout.top_p below 1 beside it, or spec.source=off"
            )
        engine = self._llm.llm_engine
        if self._tally.is_over or self._tally.step != sampling.step:
            self._tally = Tally(sampling.step)
        finished: list[tuple[Prompt, Rollout]] = []
        try:
            for prompt in prompts:
                for sample in range(sampling.num_samples):
                    asked = {"prompt_token_ids": prompt.token_ids}
                    self._running[f"{sample}:{prompt.id}"] = Running(prompt, sample)
                    engine.add_request(f"{sample}:{prompt.id}", asked, self._params(prompt, sample, sampling))
            while self._running:
                begun = time.time()
                outputs = engine.step()
                self._tally.cycle(self._strategy, prefills=False)  # vLLM does not tell which steps compute prompts
                self._tally.spent(begun, time.time())
                for output in outputs:
                    running = self._running[output.request_id]
                    extend(running, output, greedy=sampling.temperature == 0)
                    self._tally.tokens += len(output.outputs[0].token_ids)
                    if running.finish is not None:
                        del self._running[output.request_id]
                        rollout = self._rollout(running)
                        if self._read is not None:
                            finished.append((running.prompt, rollout))
                        yield rollout
                await asyncio.sleep(0)
            if self._read is not None:
                self._read(finished, sampling)
        finally:
            # also where the caller leaves early: nothing may stay behind
            engine.abort_request(list(self._running))
            self._running.clear()

    def update(self, version: int) -> int:
        """Copy the policy's weights, which hold this version now, and forget what was computed with the old ones."""
        assert not self._running, "vLLM takes new weights between two calls of generate"
        self._llm.start_weight_update()
        hand_over(self._policy.named_parameters(remove_duplicate=False), self._llm)
        self.version = version
        self._tally.is_over = True
        return sum(parameter.nbytes for parameter in self._policy.parameters())

    def activity(self) -> list[Activity]:
        """As NativeEngine's; how many run and how many wait is told from their number and rollout.max_running."""
        running = min(len(self._running), self._max_running)
        waiting = len(self._running) - running
        is_generating = bool(self._running)
        return [self._tally.activity(running=running, waiting=waiting, preempted=0, is_generating=is_generating)]

    def references(self) -> dict[tuple[str, int], list[float]]:
        """Nothing: nobody is idle while this samples."""
        return {}

    def figures(self) -> dict[str, Any]:
        """Nothing, as NativeEngine's."""
        return {}

    def publish(self, state: abc.Mapping[str, torch.Tensor], version: int) -> None:
        """Draft with these weights from now on: the tensors of an exported drafter's folder, under their names there.

        Raises PreflightError where a name or a shape is another than in the folder that vLLM began with.
        """
        assert not self._running, "vLLM takes new weights between two calls of generate"
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(shapes.keys() | self._drafter_shapes.keys()):
            if shapes.get(name) != self._drafter_shapes.get(name):
                raise PreflightError(
                    f"drafter tensor {name}: {shapes.get(name, 'missing')} where vLLM serves"
                    f" {self._drafter_shapes.get(name, 'none')}; start again from an export of this drafter"
                )
        self._llm.start_draft_weight_update()
        hand_over(iter(state.items()), self._llm)
        self.drafter_version = version

    def state_dict(self) -> dict[str, Any]:
        """Nothing that the next run would not find out by itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up nothing."""
        assert not state

    def _params(self, prompt: Prompt, sample: int, sampling: Sampling) -> SamplingParams:
        seed = noise_key(seed=sampling.seed, step=sampling.step, prompt_id=prompt.id, sample=sample)
        return SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed & ((1 << SEED_BITS) - 1),
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the stop tokens above are all there are
            detokenize=False,
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.DELTA,
        )

    def _rollout(self, running: Running) -> Rollout:
        assert running.finish is not None
        drafts = self._depth * (running.forwards - 1)  # the prompt's forward has none
        by_depth = running.accepted_by_depth + [0] * (self._depth - len(running.accepted_by_depth))
        return Rollout(
            prompt_id=running.prompt.id,
            sample=running.sample,
            token_ids=running.token_ids,
            logprobs=running.logprobs,
            version_spans=[(self.version, len(running.token_ids))],
            finish=running.finish,
            spec=SpecStats(
                forwards=running.forwards,
                proposed=drafts,
                accepted=sum(by_depth),
                proposed_by_depth=[running.forwards - 1] * self._depth,
                accepted_by_depth=by_depth,
                drafted=running.drafted,
            ),
        )

    def _cache_bytes(self, rollout: RolloutConfig) -> int:
        """Memory for what is to run together, within what the device has room for. Raises ResourceError."""
        config = self._policy.config
        layers = config.get_text_config().num_hidden_layers
        # a drafter is one layer more
        block = bytes_per_block(config, MAX_BLOCK_SIZE, self._policy.dtype) * (layers + (self._depth > 0)) // layers
        needed = -(-(self._max_length + self._depth) // MAX_BLOCK_SIZE) + 1  # vLLM keeps one block to itself
        if rollout.kv_tokens:
            blocks = max(needed, -(-rollout.kv_tokens // MAX_BLOCK_SIZE) + 1)
        else:
            copied = sum(parameter.nbytes for parameter in self._policy.parameters())
            affordable = cache_budget(str(self._policy.device), reserved=copied) // block
            blocks = min(rollout.max_running * needed, affordable)
        if blocks < needed:
            raise ResourceError(
                f"vLLM's KV cache has room for {blocks * MAX_BLOCK_SIZE} tokens and the longest sequence needs"
                f" {needed * MAX_BLOCK_SIZE}; lower rollout.max_new_tokens, or set rollout.backend=native"
            )
        return blocks * block


def extend(running: Running, output: RequestOutput, *, greedy: bool) -> None:
    """Add what one forward gave to a rollout: the tokens drafted and accepted, and the one sampled after them."""
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    running.token_ids += tokens
    # greedy sampling is certain of its token, whatever the logits
    running.logprobs += [0.0] * len(tokens) if greedy else sampled_logprobs(tokens, completion.logprobs)
    running.forwards += 1
    accepted = len(tokens) - 1  # vLLM does not tell where a response ends with a draft
    if accepted:
        running.drafted.append((len(running.token_ids) - len(tokens), accepted))
    running.accepted_by_depth += [0] * (accepted - len(running.accepted_by_depth))
    for level in range(accepted):
        running.accepted_by_depth[level] += 1
    if output.finished:
        assert completion.finish_reason in ("stop", "length"), completion.finish_reason
        running.finish = completion.finish_reason


def sampled_logprobs(token_ids: list[int], logprobs: Any) -> list[float]:
    """Each token's own log-prob, from vLLM's table of candidates by position."""
    return [candidates[token].logprob for token, candidates in zip(token_ids, logprobs, strict=True)]


def shut_down(llm: weakref.ref[LLM]) -> None:
    """End what vLLM runs, if it still does."""
    if (running := llm()) is not None:
        running.llm_engine.engine_core.shutdown()


@contextmanager
def own_threads() -> abc.Iterator[None]:
    """Give this process back its threads: vLLM leaves torch one, and on a CPU takes away the means to set more."""
    count, setter = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = setter
        torch.set_num_threads(count)
