"""What a configuration's values must satisfy beyond their types."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from configs.layers import Setting, layer_problems, settings
from configs.placement import placement
from configs.redact import holds_secret, is_secret, redact
from configs.schema import Config, SparseConfig


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: the dotted key, and a line with key, value and remedy."""

    key: str
    text: str


_AT_LEAST: dict[str, float] = {
    "run.seed": 0,
    "run.max_recoveries": 0,
    "run.silence_s": 1,
    "run.collective_s": 1,
    "compute.workers": 1,
    "compute.rollout_workers": 1,
    "compute.bucket_mb": 1,
    "data.size": 1,
    "data.max_prompt_tokens": 1,
    "data.max_bad_fraction": 0,
    "reward.workers": 1,
    "reward.memory_mb": 64,
    "rollout.prompts_per_step": 1,
    "rollout.max_new_tokens": 1,
    "rollout.top_k": 0,
    "rollout.min_p": 0,
    "rollout.max_running": 1,
    "rollout.graph_mb": 0,
    "rollout.prefill_tokens": 1,
    "rollout.block_size": 1,
    "rollout.kv_tokens": 0,
    "rollout.tensor_parallel": 1,
    "spec.below": 0,
    "sparse.select_block": 0,
    "sparse.budget_tokens": 1,
    "sparse.budget_share": 0,
    "sparse.threshold": 0,
    "sparse.dense_layers": 0,
    "sparse.sinks": 0,
    "sparse.window": 0,
    "sparse.depth": 1,
    "sparse.every": 1,
    "drafter.draft_vocab": 1,
    "drafter.window": 1,
    "drafter.unroll": 1,
    "drafter.batch_tokens": 1,
    "drafter.feature_window": 1,
    "drafter.buffer_mb": 1,
    "drafter.budget": 0,
    "train.steps": 1,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.clip_low": 0,
    "train.clip_high": 0,
    "train.kl_coef": 0,
    "train.importance_cap": 0,
    "train.max_grad_norm": 0,
    "train.updates_per_step": 1,
    "train.micro_tokens": 1,
    "train.sequence_parallel": 1,
    "eval.every": 0,
    "eval.num_prompts": 1,
    "warmstart.steps": 0,
    "warmstart.warmup_steps": 0,
    "warmstart.examples_per_step": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "monitor.port": 0,
}
_ABOVE_ZERO = (
    "reward.timeout_s",
    "rollout.top_p",
    "rollout.temperature",
    "drafter.lr",
    "train.lr",
    "warmstart.lr",
)
_AT_MOST: dict[str, float] = {
    "rollout.top_p": 1,
    "data.max_bad_fraction": 1,
    "drafter.budget": 1,
    "train.clip_low": 1,
    "spec.num_verify": 63,  # a node's ancestors are the bits of a word
    "spec.depth": 63,
    "spec.min_match": 16,  # longer agreements are not told apart
    "sparse.depth": 16,  # further, few drafts are right to the end
    "sparse.budget_share": 1,
    "monitor.port": 65535,
}
# selection blocks of a sequence; kernels/select_triton.py has room for 16384, rows longer than any sequence among them
MOST_BLOCKS = 15000
# tokens of a block whose largest weight verification leaves behind; kernels/paged_attention.py has room for as many
MOST_WEIGHED = 128
_BELOW: dict[str, float] = {"rollout.min_p": 1, "sparse.threshold": 1}  # of a softmax no weight is more
_REWARDS = ("task", "math", "format", "code")


def check(config: Config) -> list[Problem]:
    """Every value that cannot work, with its remedy; an empty list when all can."""
    problems = []
    for key, minimum in _AT_LEAST.items():
        if value_of(config, key) < minimum:
            problems.append((key, f"must be at least {minimum}"))
    problems += [(key, "must be greater than 0") for key in _ABOVE_ZERO if value_of(config, key) <= 0]
    problems += [(key, f"must be at most {limit}") for key, limit in _AT_MOST.items() if value_of(config, key) > limit]
    problems += [(key, f"must be below {limit}") for key, limit in _BELOW.items() if value_of(config, key) >= limit]
    problems += [*_run_and_data(config), *_reward(config), *_rollout(config), *_train(config), *placement(config)]
    problems += _sparse(config)
    problems += _secrets(config)
    plain, found = asdict(config), dict.fromkeys(problems)
    return [Problem(key, redact(f"{key}={value_of(plain, key)!r}: {remedy}")) for key, remedy in found]


def value_of(config: Any, key: str) -> Any:
    """The value under a dotted key, of a Config or of its mappings."""
    value = config
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def _secrets(config: Any, section: str = "") -> Iterator[tuple[str, str]]:
    """What must not stand in a run directory, where the configuration is kept."""
    for field in fields(config):
        name, value = f"{section}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from _secrets(value, f"{name}.")
        named = value if isinstance(value, Mapping) else {field.name: value}
        if any(isinstance(item, str) and (is_secret(key, item) or holds_secret(item)) for key, item in named.items()):
            yield name, "holds a secret, and a run directory keeps its configuration; set it in the environment instead"


def _run_and_data(config: Config) -> Iterator[tuple[str, str]]:
    if not config.model:
        yield "model", "name a model: smollm2-135m-instruct, a folder, or a hub id"
    if not config.run.name or "/" in config.run.name:
        yield "run.name", "must be a plain name without '/'; set run.dir to choose the folder"
    if config.compute.backend == "inline" and config.compute.workers > 1:
        yield "compute.workers", "compute.backend=inline is one process; set compute.backend=ray"
    if not config.data.name:
        wanted = {"reasoning_gym": "a reasoning-gym task such as chain_sum", "file": "a .jsonl or .parquet file"}
        yield "data.name", f"name {wanted.get(config.data.source, 'a hub data set')} (data.source={config.data.source})"
    if "{question}" not in config.data.template:
        yield "data.template", "must contain {question}, which the problem replaces"


def _reward(config: Config) -> Iterator[tuple[str, str]]:
    reward = config.reward
    if not reward.functions:
        yield "reward.functions", "name at least one, as in reward.functions.task=1"
    for name in reward.functions:
        if name not in _REWARDS and not re.fullmatch(r"[\w.]+:\w+", name):
            yield "reward.functions", f"{name!r} is none of {', '.join(_REWARDS)} and not of the form module:function"
    if "code" in reward.functions and config.data.source == "reasoning_gym" and reward.on_error == "stop":
        yield "reward.functions", "'code' runs a row's tests, and data.source=reasoning_gym has none; leave it out"
    for key in ("reward.format", "reward.answer"):
        try:
            pattern = re.compile(value_of(config, key))
        except re.error as error:
            yield key, f"is not a regular expression ({error})"
        else:
            if key == "reward.answer" and pattern.groups < 1:
                yield key, "needs a group (...) around what the scorer reads"


def _rollout(config: Config) -> Iterator[tuple[str, str]]:
    rollout, spec = config.rollout, config.spec
    if rollout.group_size < 2:
        yield "rollout.group_size", "must be at least 2: an advantage compares the rollouts of one prompt"
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    block_size = max(rollout.block_size, 1)  # a smaller one is refused by its own check
    needed = -(-longest // block_size) * block_size
    # the cache has whole blocks only: kv_tokens is rounded down to them, a sequence up
    if 0 < rollout.kv_tokens < needed:
        yield (
            "rollout.kv_tokens",
            f"one sequence may take {longest} (data.max_prompt_tokens + rollout.max_new_tokens), {needed} in blocks of"
            f" {block_size}; 0 means enough",
        )
    if rollout.backend == "vllm":
        yield from _vllm(config)
    if spec.source != "off":
        for name in ("depth", "top_k", "num_verify", "min_match"):
            if getattr(spec, name) < 1:
                yield f"spec.{name}", "must be at least 1; set spec.source=off to decode without drafts"
    if spec.source in ("eagle", "auto") and (rollout.backend == "native" or config.drafter.init):
        yield from _drafter(config)


def _sparse(config: Config) -> Iterator[tuple[str, str]]:
    """What sparse attention needs of the cache, the selectors and the others that draft."""
    sparse, found = config.sparse, list(settings(config.sparse))
    selectors, key = {setting.sparse.selector for setting in found}, found[0].selector_key
    if sparse.weights != "policy" and sparse.mode != "draft":
        yield "sparse.weights", "is of drafts, which dense verification corrects; set policy, or sparse.mode=draft"
    yield from _gates(sparse, found)
    if sparse.mode == "off":
        return
    if config.rollout.backend == "vllm":
        yield "sparse.mode", "rollout.backend=vllm attends to everything; set off, or rollout.backend=native"
    yield from layer_problems(sparse)
    for setting in found:
        yield from _setting(config, setting)
    needed = {"gate": "the folder of trained gates", "duo": "DuoAttention's full_attention_heads.tsv"}
    readers = [setting for setting in found if setting.sparse.selector in needed]
    if {"gate", "duo"} <= selectors:
        yield "sparse.gate", "names gates, or DuoAttention's heads: select by one of them, not by both"
    elif readers and not sparse.gate:
        reader = readers[0].sparse.selector
        yield "sparse.gate", f"name {needed[reader]}, which {readers[0].selector_key}={reader} reads"
    elif sparse.gate and not readers:
        yield (
            "sparse.gate",
            f"{key}={found[0].sparse.selector} reads none; set '', or {key}=gate",
        )
    if sparse.mode == "draft" and sparse.inner == "eagle" and config.spec.source not in ("eagle", "auto"):
        yield "sparse.inner", "there is no head; set spec.source=eagle or auto, or sparse.inner=suffix"
    # where spec.source drafts, this is judged with the rest of spec
    is_judged = config.spec.source != "off" or (sparse.mode, sparse.inner) != ("draft", "suffix")
    if config.spec.min_match < 1 and not is_judged:
        yield "spec.min_match", "must be at least 1: sparse.inner=suffix goes by it"
    if sparse.mode in ("rectified", "plain"):
        yield from _lossy(config)


def _setting(config: Config, setting: Setting) -> Iterator[tuple[str, str]]:
    """What one selector needs of the cache and its budget, and what its modes keep from it."""
    sparse, block_size, selector_key = setting.sparse, config.rollout.block_size, setting.selector_key
    if sparse.threshold > 0 and sparse.selector not in ("gate", "duo", "verified"):
        yield "sparse.threshold", f"the scores of {selector_key}={sparse.selector} are no weights; set 0"
    if sparse.budget_share > 0 and sparse.selector == "duo":  # heads see everything, or a window that is the budget
        yield "sparse.budget_share", f"the window of {selector_key}=duo is as long for every sequence; set 0"
    block = max(sparse.block_tokens, 1)  # a smaller one is refused by its own check
    whole = -(-block_size // block) * block
    if block_size % block:
        yield (
            "sparse.select_block" if sparse.select_block else "rollout.block_size",
            f"a KV block must hold whole blocks of {block} tokens; set rollout.block_size={whole}",
        )
    learns = sparse.learn and sparse.selector == "gate"
    if (learns or sparse.selector == "verified") and (block & (block - 1) or block > MOST_WEIGHED):
        remedy = "take gates of such blocks, or set sparse.learn=false" if learns else "set 16"
        yield "sparse.select_block", f"verification weighs 1, 2, 4 to {MOST_WEIGHED} tokens together; {remedy}"
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > block * MOST_BLOCKS:
        wanted = block << (-(-longest // (block * MOST_BLOCKS)) - 1).bit_length()
        yield "sparse.select_block", f"{longest} tokens are more than {MOST_BLOCKS} blocks of {block}; set {wanted}"
    if sparse.least_tokens > sparse.budget_tokens > 0:
        yield setting.budget_key, _too_little(setting)
    if sparse.mode == "plain" and sparse.selector == "verified":
        yield selector_key, "goes by what was verified, and sparse.mode=plain verifies nothing; set quest"
    if sparse.mode == "rectified" and sparse.selector == "verified":
        yield (
            selector_key,
            "forgets a preempted sequence, which sparse.mode=rectified is to remake alike; set quest",
        )


def _too_little(setting: Setting) -> str:
    """What reads more than the budget in any case, and the remedy."""
    sparse = setting.sparse
    least, block = sparse.least_tokens, max(sparse.block_tokens, 1)
    if least > sparse.always_tokens:
        return (
            f"{setting.selector_key}={sparse.selector} reads {sparse.min_blocks} blocks in any case; set {least} or"
            " more, or a smaller sparse.select_block"
        )
    recent = "depth" if sparse.recent_blocks > -(-sparse.window // block) else "window"
    return f"sparse.sinks, sparse.{recent} and the present block take {least} tokens by themselves; set {least} or more"


def _gates(sparse: SparseConfig, found: Sequence[Setting]) -> Iterator[tuple[str, str]]:
    """What needs a layer that goes by gates, and the mode in which they may learn."""
    # where gates decide what is sampled, they may not depend on what a machine had time for
    if sparse.learn and sparse.mode != "draft":
        yield "sparse.learn", f"is of sparse.mode=draft, not of {sparse.mode}; set false"
    if any(setting.sparse.selector == "gate" for setting in found):
        return
    needs = {"sparse.learn": "false"} if sparse.learn else {}
    if sparse.descriptors != "policy" and sparse.mode != "off":
        needs["sparse.descriptors"] = "policy"
    key, selector = found[0].selector_key, found[0].sparse.selector
    for name, instead in needs.items():
        yield name, f"{key}={selector} has no gates; set {instead}, or {key}=gate"


def _lossy(config: Config) -> Iterator[tuple[str, str]]:
    """What sampling from another distribution than the policy's needs of training, and what it leaves no room for."""
    sparse, spec = config.sparse, config.spec
    if config.train.importance_cap == 0:
        yield "train.importance_cap", f"sparse.mode={sparse.mode} samples from another distribution; set 2"
    if spec.source != "off":
        yield "spec.source", f"drafts are verified densely, which sparse.mode={sparse.mode} is to avoid; set off"
    if spec.choice not in ("auto", "fixed"):
        yield "spec.choice", f"sparse.mode={sparse.mode} leaves nothing to choose; set auto"
    if spec.below:
        yield "spec.below", f"sparse.mode={sparse.mode} is for any number of sequences; set 0"
    if sparse.inner != "off":
        yield "sparse.inner", f"is of sparse.mode=draft, not of {sparse.mode}; set off"
    if sparse.mode == "rectified" and sparse.every > 64:  # a window is verified as a chain of one less
        yield "sparse.every", "at most 64 tokens are forwarded again at once; set 64 or less"
    if sparse.mode == "rectified" and sparse.window < sparse.every:
        yield "sparse.window", f"tokens are always read until they are rectified; set {sparse.every}"


def _vllm(config: Config) -> Iterator[tuple[str, str]]:
    """What vLLM cannot do: it drafts chains with a head that was exported, or not at all."""
    spec = config.spec
    if config.compute.backend == "ray":
        yield "rollout.backend", "Ray workers move sequences between their engines, which vllm does not; set native"
    if spec.source not in ("off", "eagle"):
        yield "spec.source", "rollout.backend=vllm drafts with a trained drafter or not at all; set off or eagle"
    if spec.source == "eagle":
        if not config.drafter.init:
            yield "drafter.init", "name the folder of an exported drafter, which rollout.backend=vllm drafts with"
        if spec.top_k > 1:
            yield "spec.top_k", "rollout.backend=vllm drafts chains; set 1"
    if config.rollout.min_p > 0:
        yield "rollout.min_p", "rollout.backend=vllm does not apply it to drafts; set 0"
    if spec.below:
        yield "spec.below", "rollout.backend=vllm drafts for any number of sequences; set 0"


def _drafter(config: Config) -> Iterator[tuple[str, str]]:
    """What a learned drafter needs beyond its bounds."""
    spec, drafter = config.spec, config.drafter
    if not drafter.train and not drafter.init:
        yield "drafter.init", "name a trained drafter's folder: drafter.train=false leaves random weights as they are"
    if drafter.batch_tokens < drafter.feature_window:
        yield "drafter.batch_tokens", f"holds no window of drafter.feature_window={drafter.feature_window} tokens"
    levels = min(spec.depth, spec.num_verify)
    if (levels - 1) * spec.top_k > 63:  # the bits that say what a node sees
        yield "spec.top_k", f"a trained head's trees of {levels} levels are no wider; set {63 // (levels - 1)} or less"


def _train(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    if not all(0 <= beta < 1 for beta in train.betas):
        yield "train.betas", "both must be at least 0 and below 1"
    if train.warmup_steps > train.steps:
        yield "train.warmup_steps", f"exceeds train.steps={train.steps}; the learning rate would never be reached"
    warmstart = config.warmstart
    if warmstart.warmup_steps > warmstart.steps:
        yield "warmstart.warmup_steps", f"exceeds warmstart.steps={warmstart.steps}; warmstart.lr is never reached"
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    if 0 < rollouts < train.updates_per_step:
        yield "train.updates_per_step", f"exceeds the {rollouts} rollouts of a step, of which each update needs one"
    solutions = warmstart.solutions
    if solutions != "field" and not re.fullmatch(r"[\w.]+:\w+", solutions):
        yield "warmstart.solutions", "must be field, or module:function"
