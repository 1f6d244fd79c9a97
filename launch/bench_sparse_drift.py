"""How far lossy sparse decoding drifts from dense: KL per token against position, with dense rectification and without.

Every mode is led along the same texts, which the policy sampled densely, and at each position its next-token
distribution is held against the dense one's. So what differs is what the mode has left in its KV cache, and what it
does not read of it. Right after a rectification all that is cached is dense: there the second is alone. ReSA (arXiv
2506.04108) shows the like for its rectification.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import lcm
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig

from configs.errors import ConfigError
from configs.layers import by_layer, settings
from configs.schema import SparseConfig
from drafter.types import OFF, Rows
from kernels.attention import PagedSequences, paged_sequences
from launch.agreement import divergence
from launch.bench_options import require_part
from launch.bench_report import plain_table, provenance, say, shape
from launch.bench_rollout import generate, make_engine, sampling, subject_prompts
from launch.geometry import Subject
from rollout.decoder import make_decoder
from rollout.graphs import GraphPool
from rollout.model import PagedCache, context_length, kv_shape
from rollout.selectors import make_sparse, require_sparse
from rollout.sparse import SparseAttention
from rollout.strategy import FixedChooser

GRAPH_BYTES = 4 << 30
BLOCK_SIZE = 16  # of the cache, or what the selectors' divide where that is larger
CHUNK = 512  # tokens of each text forwarded at once where all are known


@dataclass(frozen=True, slots=True)
class Job:
    """batch texts of so many tokens, prompts included; bin_tokens: positions that share a figure."""

    batch: int
    tokens: int
    bin_tokens: int
    sparse: SparseConfig
    seed: int


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to decode. every: tokens after which the last ones are forwarded densely, 0 for never; 1 is dense."""

    name: str
    every: int


def run(subject: Subject, job: Job) -> dict[str, Any]:
    """Sample texts, then walk every mode along them; JSON-able. Of a job that was held against the model's config.

    Raises ConfigError for texts no longer than a prompt.
    """
    model, sparse = subject.model, job.sparse
    found = provenance(device=str(model.device), seed=job.seed)
    texts, start = sample_texts(subject, job)
    walk = Walk(subject, texts, start, sparse)
    modes = [Mode("dense", 1), Mode("rectified", sparse.every), Mode("plain", 0)]
    drifts = {}
    for mode in modes:
        say(f"{mode.name}: {job.batch} texts from token {start} to {job.tokens}")
        drifts[mode.name] = walk.drift(mode).tolist()
    return {
        "what": "drift of lossy sparse decoding",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "begins_at": start,
        "kl": {name: binned(values, start, job.bin_tokens) for name, values in drifts.items()},
        "kl_just_rectified": binned(drifts["rectified"], start, job.bin_tokens, step=sparse.every),
        "kl_by_place": by_place(drifts["rectified"], sparse.every),
    }


def require_fit(job: Job, model_config: PretrainedConfig) -> None:
    """Hold the job against a model's config, before its weights are read. Raises ConfigError, PreflightError."""
    if job.tokens > (limit := context_length(model_config)):
        raise ConfigError(f"--tokens {job.tokens} exceeds the model's context of {limit}; give fewer")
    found = [setting for setting in by_layer(job.sparse, kv_shape(model_config)[0]) if setting]
    if not found:
        raise ConfigError("every layer of the policy attends to everything, and nothing drifts; leave fewer dense")
    least = min(found, key=lambda setting: setting.sparse.budget_tokens)
    budget = least.sparse.budget_tokens
    require_part(f"{least.budget_key}={budget}", budget, job.tokens, "set less, or give more --tokens")
    require_sparse(job.sparse, model_config)


def sample_texts(subject: Subject, job: Job) -> tuple[torch.Tensor, int]:
    """Texts the policy samples densely at temperature 1, never stopping, [B, tokens] int64, and the longest prompt."""
    prompts = subject_prompts(subject, job.batch, seed=job.seed)
    start = max(len(prompt.token_ids) for prompt in prompts)
    if job.tokens <= start + 1:
        raise ConfigError(f"--tokens {job.tokens} leaves no answer to a prompt of {start}; give more")
    engine = make_engine(subject.model, max_running=job.batch, tokens_each=job.tokens, chooser=FixedChooser(OFF))
    texts = []
    # each to the same length, whatever its prompt's: one generate a prompt length
    for length in sorted({len(prompt.token_ids) for prompt in prompts}):
        alike = [prompt for prompt in prompts if len(prompt.token_ids) == length]
        for rollout in generate(engine, alike, sampling(job.tokens - length, seed=job.seed)).rollouts:
            (prompt,) = (prompt for prompt in alike if prompt.id == rollout.prompt_id)
            texts.append([*prompt.token_ids, *rollout.token_ids])
    return torch.tensor(texts, device=subject.model.device), start


class Walk:
    """Leads modes of decoding along known texts [B, N], from a position on, before which all was prefilled densely."""

    @torch.inference_mode()
    def __init__(self, subject: Subject, texts: torch.Tensor, start: int, sparse: SparseConfig) -> None:
        model, device = subject.model, texts.device
        self._texts, self._start = texts, start
        block = lcm(*(setting.sparse.block_tokens for setting in settings(sparse)))
        self._block_size = -(-BLOCK_SIZE // block) * block
        count, length = texts.shape
        width = -(-length // self._block_size)
        self._tables = torch.arange(count * width, dtype=torch.int32, device=device).view(count, width)
        self._cache = PagedCache(
            model.config, num_blocks=count * width, block_size=self._block_size, device=str(device), dtype=model.dtype
        )
        nothing = torch.zeros(count, dtype=torch.int32, device=device)
        self._rows = Rows(
            text=torch.arange(count, dtype=torch.int32, device=device),
            keys=nothing.long(),
            max_lengths=nothing + length,
            active=nothing + 1,
            block_tables=self._tables,
        )
        self._decoder = make_decoder(model)
        self._decoder.reach(length)
        self._sparse: SparseAttention = make_sparse(sparse, model)
        self._sparse.attach(self._cache, num_texts=count, num_rows=count, table_width=width)
        self._graphs = GraphPool(device, max_bytes=GRAPH_BYTES)  # of steps, by how many tokens they forward densely
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # of the token forwarded last
        self._kl = torch.zeros(length, dtype=torch.float64, device=device)
        self._hidden = self._known(length)

    @torch.inference_mode()
    def drift(self, mode: Mode) -> torch.Tensor:
        """KL(dense || mode) over the vocabulary for each token from start on, the mean over texts: [N - start]."""
        self._kl.zero_()
        self._sparse.begin(list(range(len(self._texts))))
        self._known(self._start - 1)
        first, last = self._start - 1, self._texts.shape[1] - 2
        self._at.fill_(first - 1)
        for position in range(first, last + 1):
            num_dense = mode.every if mode.every and (position - first + 1) % mode.every == 0 else 0
            self._graphs.run(num_dense, partial(self._step, num_dense))
        return (self._kl[first : last + 1] / len(self._texts)).cpu()

    def _step(self, num_dense: int) -> None:
        """Advance by a token under the selector, or by one with the last num_dense forwarded densely, and compare."""
        self._at += 1
        num_tokens = max(1, num_dense)
        index = self._at + torch.arange(1 - num_tokens, 1, device=self._at.device)
        seqs = self._sequences(index, self._texts.shape[1])
        attend = self._sparse.watch if num_dense else self._sparse.forward
        hidden, _ = self._decoder.forward_with_aux(
            self._texts[:, index].flatten(),
            index.repeat(len(self._texts)),
            seqs,
            self._cache,
            (),
            attend(self._rows, len(self._texts)),
        )
        self._sparse.prefilled(seqs)
        lossy = self._decoder.logits(hidden.view(len(self._texts), num_tokens, -1)[:, -1].contiguous())
        dense = self._decoder.logits(self._hidden[:, self._at].flatten(0, 1))
        self._kl.index_add_(0, self._at, divergence(dense, lossy).sum().double()[None])

    def _known(self, count: int) -> torch.Tensor:
        """Forward the first tokens of every text densely, a chunk at a time: hidden states [B, count, H]."""
        parts = []
        for first in range(0, count, CHUNK):
            index = torch.arange(first, min(first + CHUNK, count), device=self._at.device)
            seqs = self._sequences(index, first)
            hidden = self._decoder.forward(
                self._texts[:, index].flatten(), index.repeat(len(self._texts)), seqs, self._cache
            )
            self._sparse.prefilled(seqs)
            parts.append(hidden.view(len(self._texts), len(index), -1))
        return torch.cat(parts, dim=1) if parts else self._texts.new_zeros(0)

    def _sequences(self, index: torch.Tensor, max_context: int) -> PagedSequences:
        """All texts, whose new tokens are those at index [Q]."""
        count, num_tokens = len(self._texts), len(index)
        device, size = index.device, self._block_size
        slots = self._tables[:, index // size].long() * size + index % size
        return paged_sequences(
            cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32, device=device) * num_tokens,
            max_seqlen_q=num_tokens,
            context_lens=index[:1].int().repeat(count),
            max_context=max_context,
            block_tables=self._tables,
            slots=slots.flatten(),
            block_size=size,
        )


def binned(values: Sequence[float], start: int, size: int, *, step: int = 1) -> list[dict[str, float]]:
    """The mean of every so many positions: where they begin in the text, how many count, nats a token.

    step: only each so-manieth of all counts. A bin without any is left out.
    """
    bins = []
    for begin in range(0, len(values), size):
        part = [values[at] for at in range(begin, min(begin + size, len(values))) if at % step == 0]
        if part:
            bins.append({"position": start + begin, "tokens": len(part), "mean": sum(part) / len(part)})
    return bins


def by_place(values: Sequence[float], every: int) -> list[float]:
    """The mean at each place of a rectified window, the last of which is dense."""
    places: list[Sequence[float]] = [values[place::every] for place in range(min(every, len(values)))]
    return [sum(part) / len(part) for part in places]


def table(result: dict[str, Any]) -> Table:
    """KL by position, a line a bin."""
    sparse, kl = result["sparse"], result["kl"]
    title = f"{result['what']}, {result['model']}, {sparse['selector']}, {sparse['budget_tokens']} tokens"
    title += ", but for sparse.layers" if sparse["layers"] else ""
    shown = plain_table(title, ["from token", "dense", "just rectified", f"rectified, f={sparse['every']}", "plain"])
    fresh = {line["position"]: f"{line['mean']:.2e}" for line in result["kl_just_rectified"]}
    for dense, rectified, plain in zip(kl["dense"], kl["rectified"], kl["plain"], strict=True):
        means = [f"{each['mean']:.2e}" for each in (dense, rectified, plain)]
        shown.add_row(str(dense["position"]), means[0], fresh.get(dense["position"], ""), *means[1:])
    return shown
