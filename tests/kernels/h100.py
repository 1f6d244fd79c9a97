"""Compiles what the kernels' callers would launch on an H100, without one: python h100.py, with TRITON_INTERPRET=0.

CPU tensors stand for the GPU's; nothing is computed. Ends with an error, and the launch that it is about, where a
kernel does not compile, asks for more shared memory than a program may have, or is launched by none of the cases.
"""

import importlib
import pkgutil
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels
from kernels import lowbit
from kernels.attention import BlockMaxima, PackedSequences, PagedSequences, paged_attention, paged_sequences
from kernels.cache import compact
from kernels.cycle import Drafts, Rows, Texts, commit, prepare
from kernels.describe import describe, empty_descriptors
from kernels.eagle import Candidates, KvRings, catch_up, grow, join_inputs, rank
from kernels.features import NUM_AUX, Rings, keep_features
from kernels.gate import GateWeights, Rotation, compress, empty_compressed, gate_choose, gate_scores
from kernels.linear import Norm, gated_linear, linear, silu_mul
from kernels.logprob import selected_logprobs
from kernels.ngram import empty_index, propose
from kernels.paged_attention import MAX_SELECT_BLOCK
from kernels.pooled_attention import pooled_attention
from kernels.rope_attention import rope_and_attend
from kernels.sample import sample
from kernels.select import BlockLists, Choice, bound_scores, choose_blocks, mean_scores, verified_scores
from kernels.sparse_attention import sparse_attention

SHARED_BYTES = 227 << 10  # that a program may have
PROCESSORS = 132
MOST_PROGRAMS = (1 << 31) - 1, 65535, 65535  # along each axis of a grid
BLOCK_SIZE = 128
SMOLLM2, QWEN3_8B, WIDEST = (9, 3, 64), (32, 8, 128), (16, 2, 256)  # query heads, key heads, their dimension

launched: list[tuple[str, Any]] = []  # every kernel's name and what was compiled for it


class H100:
    """Triton's driver, as far as compiling asks it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_launches() -> None:
    """From now on the kernels' callers take every tensor for one on an H100, and compile what they launch."""
    run = JITFunction.run

    def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        assert all(0 < size <= most for size, most in zip(grid, MOST_PROGRAMS, strict=False)), f"{name}: grid {grid}"
        try:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            raise AssertionError(f"{name} does not compile with {options}") from error
        shared = compiled.metadata.shared
        assert shared <= SHARED_BYTES, f"{name} asks for {shared} bytes of shared memory with {options}"
        launched.append((name, compiled))

    triton.runtime.driver.set_active(H100())
    JITFunction.run = compile_launch
    torch.Tensor.is_cuda = property(lambda tensor: True)
    for module in modules():
        if hasattr(module, "overlaps"):
            module.overlaps = lambda device: True
        if hasattr(module, "num_programs"):
            module.num_programs = lambda device, per_sm: PROCESSORS * per_sm


def modules() -> list[Any]:
    """All of kernels."""
    return [importlib.import_module(f"kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]


def ints(*shape: int) -> torch.Tensor:
    """Zeros, int32."""
    return torch.zeros(shape, dtype=torch.int32)


def longs(*shape: int) -> torch.Tensor:
    """Zeros, int64."""
    return torch.zeros(shape, dtype=torch.int64)


def sequences(num_rows: int, num_new: int, max_context: int, *, is_tree: bool = False) -> PagedSequences:
    """Rows of as many new tokens each, in blocks of BLOCK_SIZE."""
    tokens = num_rows * num_new
    tree = {"ancestors": longs(tokens), "num_drafted": ints(num_rows), "positions": longs(tokens)} if is_tree else {}
    return paged_sequences(
        cu_seqlens_q=torch.arange(num_rows + 1, dtype=torch.int32) * num_new,
        max_seqlen_q=num_new,
        context_lens=ints(num_rows),
        max_context=max_context,
        block_tables=ints(num_rows, -(-(max_context + num_new) // BLOCK_SIZE)),
        slots=longs(tokens),
        block_size=BLOCK_SIZE,
        **tree,
    )


def halves(*shape: int) -> torch.Tensor:
    """Zeros, bfloat16."""
    return torch.zeros(shape, dtype=torch.bfloat16)


def attention() -> None:
    """Decoding, verification and prefill, with rotary embeddings too, and where blocks' largest scores are kept."""
    for num_heads, num_kv_heads, head_dim in (SMOLLM2, QWEN3_8B):
        keys, angles = halves(2, BLOCK_SIZE, num_kv_heads, head_dim), torch.zeros(8192, head_dim)
        norm = None if head_dim == 64 else halves(head_dim)
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "q_norm": norm, "k_norm": norm}
        for num_new, is_tree in ((1, False), (6, True), (300, False)):
            seqs, positions = sequences(4, num_new, 8192, is_tree=is_tree), longs(4 * num_new)
            qkv = halves(4 * num_new, (num_heads + 2 * num_kv_heads) * head_dim)
            rope_and_attend(qkv, positions, angles, angles, keys, keys, seqs, eps=1e-6, scale=1.0, **heads)
    query, keys = halves(4 * 17, 16, 256), halves(2, BLOCK_SIZE, 8, 256)
    seqs = sequences(4, 17, 8192, is_tree=True)
    paged_attention(query, keys, keys, seqs, scale=1.0, sliding_window=4096, softcap=50.0)
    for heads, num_new, select_block in ((SMOLLM2, 6, 16), (QWEN3_8B, 6, 64), (WIDEST, 64, MAX_SELECT_BLOCK)):
        num_heads, num_kv_heads, head_dim = heads
        query, keys = halves(4 * num_new, num_heads, head_dim), halves(2, BLOCK_SIZE, num_kv_heads, head_dim)
        scores, lse = torch.zeros(4 * num_new, num_heads, 600), torch.zeros(4 * num_new, num_heads)
        seqs, maxima = sequences(4, num_new, 8192, is_tree=True), BlockMaxima(scores, lse, select_block)
        paged_attention(query, keys, keys, seqs, scale=1.0, sliding_window=None, softcap=None, maxima=maxima)
        verified_scores(maxima, seqs, torch.zeros(5, num_kv_heads, 700), longs(4))
    packed, keys = PackedSequences(torch.tensor([0, 200], dtype=torch.int32), 200), halves(200, 2, 128)
    pooled_attention(halves(200, 8, 128), keys, keys, packed, scale=1.0, select_block=64)
    compact(halves(3, 2, 2, BLOCK_SIZE, 3, 64), longs(4, 6), longs(4, 6))


def selection() -> None:
    """Describing blocks, scoring and choosing them, and attending to the chosen."""
    for (num_heads, num_kv_heads, head_dim), select_block in ((SMOLLM2, 16), (QWEN3_8B, 64)):
        storage = halves(3, 2, 2, BLOCK_SIZE, num_kv_heads, head_dim)
        tables = {"block_tables": ints(4, 200), "begins": ints(4), "ends": ints(4)}
        for num_new in (1, 5):
            query, seqs = halves(4 * num_new, num_heads, head_dim), sequences(4, num_new, 8192)
            for kind, scored in (("minmax", bound_scores), ("mean", mean_scores)):
                described = empty_descriptors(kind, storage, select_block=select_block)
                describe(kind, storage, described, max_tokens=num_new, **tables)
                scores = scored(query, described[0], seqs)
            for threshold in (None, 0.1):
                choice = Choice(max_blocks=300, budget_blocks=16, threshold=threshold)
                lists = choose_blocks(scores, seqs, choice, select_block=select_block)
            for held in (False, True):
                first = len(launched)
                listed = BlockLists(lists.blocks, lists.counts, select_block, held)
                sparse_attention(query, *storage[0], seqs, listed, scale=1.0)
                # Triton gives up on a loop that hands a value on through two iterations, without a word
                ((_, compiled),) = launched[first:]
                assert compiled.asm["ptx"].count("cp.async.cg") >= 16, "keys and values are not loaded ahead"


def gates() -> None:
    """Compressing keys, and scoring and choosing by gates of 64 to 256, in both types of descriptors."""
    for heads, context, dtype in (
        (SMOLLM2, 8192, None),
        (QWEN3_8B, 1 << 17, None),
        (QWEN3_8B, 1 << 17, torch.float8_e4m3fn),
        (WIDEST, 1 << 18, None),
    ):
        num_heads, num_kv_heads, head_dim = heads
        sides = (num_kv_heads, num_heads // num_kv_heads, head_dim), (num_kv_heads, 3 * head_dim)
        rotation = Rotation(torch.ones(head_dim // 2), 1.0)
        weights = GateWeights(
            *(halves(2, *side, head_dim) for side in sides), *halves(2, 2, head_dim),
            rotation=rotation, gate_rotation=rotation, eps=1e-6,
        )  # fmt: skip
        storage, tables = halves(2, 2, 2, BLOCK_SIZE, num_kv_heads, head_dim), ints(4, 200)
        descriptors = empty_compressed(weights, storage, select_block=64, dtype=dtype)
        compress(weights, storage, descriptors, block_tables=tables, begins=ints(4), ends=ints(4), max_tokens=6)
        for num_new, threshold in ((1, None), (80, 0.1)):
            seqs, query = sequences(4, num_new, context), halves(4 * num_new, num_heads, head_dim)
            choice = Choice(max_blocks=300, budget_blocks=16, threshold=threshold)
            gate_choose(weights, 1, query, longs(4 * num_new), descriptors[1], seqs, choice)
            assert launched[-1][1].asm["ptx"].count("shared.global") >= 12, "descriptors are not loaded ahead"
    gate_scores(weights, 1, query, longs(4 * num_new), descriptors[1], seqs)


def products() -> None:
    """Norms and products in bfloat16 and eight bits, as decoding, verification and prefill have them."""
    for width, features in ((576, 1536), (4096, 12288)):
        norm = Norm(halves(width), 1e-6)
        weights = halves(width, features), halves(features, width), halves(features, width)
        stored = [
            [lowbit.empty_lowbit(kind, *weight.shape, device="cpu") for weight in weights] for kind in ("int8", "fp8")
        ]
        for num_tokens in (1, 8, 64, 384):
            x = halves(num_tokens, width)
            linear(gated_linear(x, *weights[1:], norm=norm), weights[0], residual=x)
            silu_mul(x, x)
            for down, gate, up in stored:
                first = len(launched)
                lowbit.linear(lowbit.gated_linear(x, gate, up, norm=norm), down, residual=x)
                for name, compiled in launched[first:]:
                    if num_tokens >= 8 and name.endswith("_lowbit_kernel"):
                        lines = compiled.asm["ptx"].splitlines()
                        assert any("mma" in line and "bf16" in line for line in lines), "no tensor core multiplies"
                        assert sum("cp.async.cg" in line for line in lines) >= 8, "weights are not loaded ahead"


def cycles() -> None:
    """A cycle's two ends, its noise, drafts from n-grams and from a head, and the log-probs of training."""
    num_texts, num_nodes, vocabulary = 9, 6, 49152
    for num_rows in (1, 4):
        texts = Texts(ints(num_texts, 900), ints(num_texts), ints(num_texts))
        rows = Rows(ints(num_rows), longs(num_rows), ints(num_rows), ints(num_rows), ints(num_rows, 20))
        trees = Drafts(ints(num_rows, num_nodes), ints(num_rows, num_nodes), ints(num_rows))
        rings = Rings(ints(num_texts), ints(4), ints(4), halves(4, 64, (NUM_AUX + 2) * 576), ints(4, 64))
        kv = KvRings(halves(2, 4 * 10, 16, 3, 64), ints(4), ints(4), ints(4), window=64)
        cycle = {"num_rows": num_rows, "block_size": BLOCK_SIZE}
        for drafts in (None, trees):
            inputs = prepare(texts, rows, drafts, dummy_slot=0, **cycle)
            tokens = len(inputs.token_ids)
            logits, hidden = halves(tokens, vocabulary), halves(tokens, 576)
            for filters in ({"top_k": 0, "top_p": 1.0}, {"top_k": 50, "top_p": 0.9}):
                drawn = sample(logits, inputs.keys, inputs.sample_positions, temperature=1.0, min_p=0.0, **filters)
            sample(logits, inputs.keys, inputs.sample_positions, temperature=0.0, min_p=0.0, **filters)
            done = commit(texts, rows, drafts, inputs, *drawn, stop_ids=ints(2), **cycle)
            keep_features(
                rings, texts, rows.text, aux=(hidden,) * NUM_AUX, hidden=hidden, counts=done.counts, path=done.path,
                num_valid=inputs.num_valid, drafts=drafts,
            )  # fmt: skip
        propose(empty_index(texts, min_match=2), texts, rows, trees, depth=4, top_k=2)
        steps = catch_up(texts, rows, rings, kv, ints(1), num_rows=num_rows, num_positions=num_nodes, levels=3, top_k=2)
        norm = Norm(halves(576), 1e-6)
        states, embedding = halves(len(steps.token_ids), 576), halves(vocabulary, 576)
        join_inputs(steps.token_ids, embedding, states, None, embed_norm=norm, state_norm=norm)
        found = Candidates(longs(num_rows, 10), ints(num_rows, 10), ints(num_rows, 10))
        beams = None
        for level in (0, 1):
            logits = halves(num_rows * (1 if beams is None else 2), 32000)
            places = steps.sample_positions[level]
            beams = grow(logits, rows.keys, places, ints(32000), torch.zeros(2), beams, found, level=level, top_k=2)
        rank(found, steps.drafting, trees)
    logits = halves(64, vocabulary).requires_grad_()
    logprobs, entropy = selected_logprobs(logits, longs(64), temperature=1.0)
    (logprobs + entropy).sum().backward()


def main() -> None:
    """All cases, and whether they are."""
    compile_launches()
    for case in (attention, selection, gates, products, cycles):
        before = len(launched)
        case()
        print(f"{case.__name__}: {len(launched) - before} launches", flush=True)
    there = {
        f"{module.__name__}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    assert not (missing := there - {name for name, _ in launched}), f"never launched: {sorted(missing)}"


if __name__ == "__main__":
    main()
