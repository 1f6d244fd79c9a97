# mypy: allow-untyped-defs
"""Cosines and sines of rotary angles (Triton)."""

import triton
import triton.language as tl


@triton.jit
def cos_sin(angle):
    """Cosines and sines of float32 angles of at most 2^19, to 2e-7.

    tl.cos and tl.sin keep a way for any angle besides; with them kernels that turn a tile spill registers, and take
    twice as long to compile (sm_90, Triton 3.7).
    Source: Cephes, sinf.c (Cody and Waite's reduction, the polynomials).
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in parts whose products are exact, so that what cancels is
    rest = (angle - quarters * 1.5625) - quarters * 0.00830078125 + quarters * 4.454455103442e-06
    square = rest * rest
    sine = rest + rest * square * ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1)
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = 1.0 - 0.5 * square + cosine * square * square
    quarter = quarters.to(tl.int32)
    is_odd = (quarter & 1) != 0
    along, across = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -along, along), tl.where((quarter & 2) != 0, -across, across)
