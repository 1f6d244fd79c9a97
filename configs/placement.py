"""What workers can share, and what they cannot: checks of a configuration, each a key and what is wrong with it."""

from collections.abc import Iterator

from configs.schema import Config


def placement(config: Config) -> Iterator[tuple[str, str]]:
    """What workers can share, and what they cannot."""
    compute, train = config.compute, config.train
    if compute.placement == "separate" and compute.backend == "inline":
        yield "compute.placement", "compute.backend=inline is one process; set compute.backend=ray"
    if compute.placement == "colocated" and compute.rollout_workers > 1:
        yield "compute.rollout_workers", "colocated workers all sample; set compute.placement=separate"
    yield from _teams(config)
    if compute.workers % max(train.sequence_parallel, 1):  # a smaller one is refused by its own check
        yield "train.sequence_parallel", f"does not divide compute.workers={compute.workers}"
    if train.offload == "rollout" and compute.placement == "separate":
        yield "train.offload", "compute.placement=separate samples on other GPUs; set none"
    if train.offload == "rollout" and config.rollout.backend == "vllm":
        yield "train.offload", "rollout.backend=vllm keeps its KV cache while the policy trains; set none, or native"
    if train.zero_stage == 3 and train.kl_coef > 0:
        yield "train.kl_coef", "train.zero_stage=3 keeps no reference policy; set 0, or train.zero_stage=2"
    if train.zero_stage == 3 and config.rollout.backend == "vllm":
        yield "train.zero_stage", "rollout.backend=vllm samples from the weights that are trained; set 2, or native"


def _teams(config: Config) -> Iterator[tuple[str, str]]:
    """What rollout workers that share one engine need."""
    compute, size = config.compute, config.rollout.tensor_parallel
    if size <= 1:  # a smaller one is refused by its own check
        return
    if compute.placement == "colocated":
        yield "rollout.tensor_parallel", "colocated workers sample from what they train; set compute.placement=separate"
    elif compute.rollout_workers % size:
        yield "rollout.tensor_parallel", f"does not divide compute.rollout_workers={compute.rollout_workers}"
    if config.spec.source in ("eagle", "auto"):
        yield "spec.source", f"a trained drafter reads the head that rollout.tensor_parallel={size} cuts; set suffix"
    if config.sparse.mode != "off":
        yield "sparse.mode", f"blocks are chosen from all heads, which rollout.tensor_parallel={size} cuts; set off"
