"""Every option, its type and its default. Frozen dataclasses; no torch, so that reading a config is instant."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What the run is called and where it writes."""

    name: str = "run"
    dir: str = ""  # "" means runs/NAME-TIME
    seed: int = 0
    max_recoveries: int = 3  # times that lost workers are started again from the newest checkpoint, then exit code 7
    silence_s: float = 300.0  # without a sign of life a worker counts as lost; writing tens of GB shows none meanwhile
    collective_s: float = 1800.0  # that ranks wait for one another: for the slowest one's share of a step


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """Where the run computes."""

    backend: Literal["inline", "ray"] = "inline"  # one process, or one Ray actor a worker
    workers: int = 1
    # colocated: every worker trains and samples; separate: workers train, rollout_workers sample, each on its own GPU
    placement: Literal["colocated", "separate"] = "colocated"
    rollout_workers: int = 1  # separate only
    bucket_mb: int = 256  # separate only: of weights sent at a time
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the processor has it fast


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where prompts come from, and how a row becomes one."""

    source: Literal["reasoning_gym", "file", "hub"] = "reasoning_gym"
    name: str = ""  # reasoning-gym task, path of a .jsonl or .parquet file, or hub data set id
    split: str = "train"  # hub only
    options: dict[str, Any] = field(default_factory=dict)  # reasoning-gym generator options
    size: int = 10_000  # rows generated (reasoning_gym) or at most used (file, hub)
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    solution_field: str = "solution"  # worked solution for the warm start; optional in the rows
    system: str = ""  # system message; "" means none
    template: str = "{question}"
    max_prompt_tokens: int = 1024
    max_bad_fraction: float = 0.01  # share of quarantined rows above which the run stops with exit code 8


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """What is rewarded: weights by function name, summed."""

    functions: dict[str, float] = field(default_factory=lambda: {"task": 1.0})
    # "task": reasoning-gym's own scorer; "math": math-verify; "format": reward.format matches; "code": the response's
    # Python passes the row's tests; or "module:function"
    format: str = r"(?s).*<answer>.*</answer>\s*"  # what "format" must match in full
    answer: str = r"(?s).*<answer>(.*?)</answer>"  # group 1 is what the scorer reads; no match: the whole text
    timeout_s: float = 10.0
    workers: int = 2
    memory_mb: int = 4096
    # Where "code" runs programs. auto: bubblewrap where it works, else Landlock, else no run. none: unconfined
    sandbox: Literal["auto", "bubblewrap", "landlock", "none"] = "auto"
    tests: Literal["all", "share"] = "all"  # "code" gives 1 for all tests passed and else 0, or the share passed
    on_error: Literal["stop", "zero"] = "stop"  # a reward that raises, hangs or dies: exit 8, or count it and score 0


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How rollouts are sampled."""

    backend: Literal["native", "vllm"] = "native"  # vllm: in this process, from a copy of the weights; an extra
    prompts_per_step: int = 8
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0  # 0 means no limit
    top_p: float = 1.0
    min_p: float = 0.0
    max_running: int = 256  # sequences decoded together
    prefill_tokens: int = 2048  # prompt tokens forwarded in one cycle
    block_size: int = 16  # tokens in a KV block
    kv_tokens: int = 0  # capacity of the KV cache; 0 means what max_running sequences can need, within memory
    graph_mb: int = 4096  # GPU memory that CUDA graphs may take; 0 launches every kernel by itself
    tensor_parallel: int = 1  # rollout workers that share one engine, on GPUs of one node; compute.placement=separate


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """How rollouts are drafted. No value here can change a sample, only the speed."""

    # off: none; suffix: what siblings and earlier epochs said; eagle: a trained head; auto: suffix and eagle both
    source: Literal["off", "suffix", "eagle", "auto"] = "suffix"
    # Which draft, how long. "goodput": the most tokens a second by measured times and acceptance, off among the arms;
    # "beg_mab": TLT's bandit; "fixed": always depth, top_k and num_verify. auto: goodput on a GPU, fixed on a CPU.
    choice: Literal["auto", "goodput", "beg_mab", "fixed"] = "auto"
    below: int = 0  # draft only while fewer sequences run, 0 for always; with beg_mab, and 32, this is TLT's policy
    depth: int = 6  # levels drafted at most
    top_k: int = 1  # children kept a node; 1 drafts a chain
    num_verify: int = 6  # drafted tokens verified at most, a sequence and cycle
    min_match: int = 2  # shortest suffix that may propose


SelectorName = Literal["quest", "resa", "gate", "streaming", "duo", "mean", "verified"]


@dataclass(frozen=True, slots=True)
class LayersConfig:
    """What differs in a range of layers."""

    selector: Literal["default", "dense", SelectorName] = "default"  # default: sparse.selector; dense reads everything
    budget_tokens: int = 0  # 0: sparse.budget_tokens


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """Attention to the blocks of the KV cache that are worth reading, for long contexts (docs/sparse.md)."""

    # off: none. draft: the policy under sparse attention drafts, dense verification commits: no sample changes.
    # rectified (ReSA) and plain (SeerAttention-R) change samples, and mark every rollout
    mode: Literal["off", "draft", "rectified", "plain"] = "off"
    # Who picks the blocks. quest, resa (one and the same): a bound from each block's smallest and largest keys, of no
    # fewer than 16 blocks; gate: trained gates; streaming: the newest; duo: all for retrieval heads, the newest for
    # others; mean: the mean key (MoBA); verified: what the last dense verification attended to
    selector: SelectorName = "quest"
    gate: str = ""  # gate: folder of trained gates; duo: DuoAttention's full_attention_heads.tsv
    learn: bool = False  # gate: in draft, gates learn on from what verification computes; sparse.gate stays as it is
    # gate: what the descriptors that it scores are kept in, the policy's type or eight bits, half as much to read
    descriptors: Literal["policy", "fp8"] = "policy"
    select_block: int = 0  # tokens in a block that is picked or not; 0 is 64 for gate and mean, 16 for others
    budget_tokens: int = 1024  # that a token attends to at most, those it always does included
    budget_share: float = 0.0  # of a sequence's tokens, where that is more
    threshold: float = 0.0  # pick every block that scores more, up to the budget; 0 fills the budget with the best
    dense_layers: int = 0  # first layers that attend to everything
    # What differs by layer, numbered from 0: in one (4), a range (2-9), or all from one on (10-), as in
    # {0: {selector: dense}, 2-9: {selector: streaming}, 10-: {budget_tokens: 512}}; no layer in two of them
    layers: dict[str, LayersConfig] = field(default_factory=dict)
    sinks: int = 1  # first blocks that are always picked
    window: int = 64  # newest tokens, rounded up to blocks, that are always picked; drafted ones are in any case
    depth: int = 8  # draft: tokens drafted at most
    # draft: the weights it reads, the policy's own or a copy in eight bits, smoothed, remade with every version
    weights: Literal["policy", "int8", "fp8"] = "policy"
    inner: Literal["off", "suffix", "eagle"] = "off"  # draft: who drafts for the drafting policy (three tiers)
    every: int = 32  # rectified: tokens after which the last ones are forwarded densely

    @property
    def block_tokens(self) -> int:
        """Tokens in a block that is picked or not."""
        return self.select_block or (64 if self.selector in ("gate", "mean") else 16)

    @property
    def recent_blocks(self) -> int:
        """Newest complete blocks that are read whatever is picked: the window's, and those that a draft fills.

        Nothing is known of these before their tokens are verified. Of d drafted tokens the last is read by none.
        """
        drafted = self.depth - 1 if self.mode == "draft" else 0
        return -(-max(self.window, drafted) // max(self.block_tokens, 1))

    @property
    def min_blocks(self) -> int:
        """The fewest that a list holds of a long context: by the bound 16, as in ReSA (arXiv 2506.04108)."""
        return 16 if self.selector in ("quest", "resa") else 1

    @property
    def always_tokens(self) -> int:
        """Tokens that are read whatever is picked: sinks, recent blocks and the block that is being written."""
        return (self.sinks + self.recent_blocks + 1) * max(self.block_tokens, 1)

    @property
    def least_tokens(self) -> int:
        """Tokens of a long context that are read under any budget."""
        return max(self.always_tokens, self.min_blocks * max(self.block_tokens, 1))


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The learned drafter (spec.source eagle or auto): how it is trained beside the policy."""

    init: str = ""  # folder of a trained drafter to start from; "" starts from random weights
    draft_vocab: int = 8192  # tokens it can propose, the most frequent of the rollouts; at most the policy's vocabulary
    window: int = 512  # tokens it attends to
    train: bool = True  # False keeps it as it was loaded
    loss: Literal["lk", "kl", "ce", "tv"] = "lk"
    unroll: int = 4  # steps of training-time test: how many of its own predictions it learns to go on from
    lr: float = 1e-3
    batch_tokens: int = 4096  # feature tokens of an optimiser step, after which it can be called away
    feature_window: int = 128  # consecutive tokens kept of a sequence at a time
    buffer_mb: int = 1024  # memory for features
    budget: float = 0.05  # share of a step's time that training it may add where no GPU is idle


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How the policy learns: GRPO and its optimiser."""

    steps: int = 100
    lr: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0  # weight of the k3 estimate of KL(policy || reference); 0 keeps no reference
    importance_cap: float = 2.0  # truncation of exp(training - rollout log-prob); 0 turns the correction off
    advantage: Literal["std", "mean"] = "std"  # centre by the group mean, and with "std" divide by its deviation
    updates_per_step: int = 1  # optimiser updates a batch is split into
    micro_tokens: int = 4096  # tokens of a rank that are packed into one forward and backward pass
    # Ranks share optimiser states (1), gradients too (2), parameters too (3: rollouts then sample from a whole copy)
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_checkpointing: bool = False
    sequence_parallel: int = 1  # ranks that share every sequence: by tokens, and in attention by heads (Ulysses)
    offload: Literal["none", "rollout"] = "none"  # rollout: optimiser states wait in host memory while others sample


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Greedy evaluation on held-out problems."""

    every: int = 0  # steps between evaluations; 0 means none
    num_prompts: int = 64
    attention: Literal["dense", "rollout"] = "dense"  # rollout: under sparse attention where rollouts are sampled so


@dataclass(frozen=True, slots=True)
class WarmstartConfig:
    """Supervised steps on worked solutions before the first rollout."""

    steps: int = 0
    solutions: str = "field"  # "field": data.solution_field; or "module:function" called with a Prompt
    examples_per_step: int = 64
    lr: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """When state is saved, and how much of it is kept."""

    every: int = 10  # steps; the last step is always saved
    keep: int = 2


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """Who watches the run from beside it, in a process of its own that reads its files."""

    port: int = 0  # of the page and /metrics, on this machine alone (127.0.0.1); 0 means none
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where steps are shown besides; extras of their names


@dataclass(frozen=True, slots=True)
class Config:
    """One run."""

    model: str = "smollm2-135m-instruct"  # shipped name, folder, or hub id
    run: RunConfig = field(default_factory=RunConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    spec: SpecConfig = field(default_factory=SpecConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
