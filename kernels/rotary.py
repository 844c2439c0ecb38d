"""Rotary embedding of a tile as it is loaded; see fastattn/rotary.py for the method."""

import triton
import triton.language as tl


@triton.jit
def load_rotated(x, offsets, rows_ok, positions, rotation, VARIANT: tl.constexpr):
    """Rows of an `Array` at these offsets, padded to BLOCK_D, rotated to their positions and rounded to their type."""
    WIDTH: tl.constexpr = VARIANT.BLOCK_D
    half: tl.constexpr = VARIANT.ROTARY_DIM // 2
    offs_d = tl.arange(0, WIDTH)
    if VARIANT.INTERLEAVED:
        pair = offs_d // 2
        partner = tl.where(offs_d % 2 == 0, offs_d + 1, offs_d - 1)
        second = offs_d % 2 == 1
    else:
        pair = offs_d % half
        partner = tl.where(offs_d < half, offs_d + half, offs_d - half)
        second = offs_d >= half
    rotated = (offs_d < VARIANT.ROTARY_DIM)[None, :] & rows_ok[:, None]
    ok = (offs_d < VARIANT.HEAD_DIM)[None, :] & rows_ok[:, None]
    rows = x.data + offsets[:, None]
    a = tl.load(rows + offs_d.to(tl.int64)[None, :] * x.column, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(rows + partner.to(tl.int64)[None, :] * x.column, mask=rotated, other=0.0).to(tl.float32)
    positions = tl.minimum(tl.maximum(positions, 0), rotation.max_positions - 1).to(tl.int64)
    entries = positions[:, None] * half + pair[None, :]
    cos = tl.load(rotation.cos + entries, mask=rotated, other=1.0)
    sin = tl.load(rotation.sin + entries, mask=rotated, other=0.0)
    turned = a * cos + tl.where(second[None, :], b, -b) * sin
    return tl.where(rotated, turned, a).to(x.data.dtype.element_ty)
