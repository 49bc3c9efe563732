"""The Triton kernels over all factors of a model at once; triton.py launches them.

A slot is one row or column of one factor: the part of the factor that belongs to one group. Every factor is one line of
a table on the device, so one launch takes any number of them. No atomics are needed, so results are deterministic: one
program sums a slot, one program adds up the slots of a group in their order, one program adds up what those report.
"""

import triton
import triton.language as tl

FIELDS = 6
"""int64 values per line: addresses of a factor's data and of its result; number of slots, length of a slot, first slot;
kind, which is 2 * dtype (0 float32, 1 bfloat16, 2 float16) + axis (0 where rows are slots, 1 where columns are).
"""
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _tile(address, slot, entry, slots, length, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers and bounds of a tile in the order of memory: [slot, entry] of rows, [entry, slot] of columns."""
    TYPE: tl.constexpr = tl.float32 if KIND < 2 else tl.bfloat16 if KIND < 4 else tl.float16
    base_ptr = address.to(tl.pointer_type(TYPE))
    if KIND % 2 == 0:
        ptrs = base_ptr + slot[:, None] * length + entry[None, :]
        ok = (slot < slots)[:, None] & (entry < length)[None, :]
    else:
        ptrs = base_ptr + entry[:, None] * slots + slot[None, :]
        ok = (entry < length)[:, None] & (slot < slots)[None, :]
    if ALIGNED:
        # The compiler cannot know what a table holds: tell it that eight neighbours may move at once.
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, 16)), (1, 8))
        ok = tl.max_constancy(ok, (1, 8))
    return ptrs, ok


@triton.jit
def slot_squares_kernel(
    table_ptr, squares_ptr, ALIGNED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """squares [all slots] = sum of squares of every slot. Grid: slot blocks of the factor with most slots x factors.

    CUDA takes 2**31 - 1 programs along the first axis and 65535 along the second.
    """
    line_ptr = table_ptr + tl.program_id(1) * _FIELDS
    data = tl.load(line_ptr)
    slots = tl.load(line_ptr + 2)
    length = tl.load(line_ptr + 3)
    kind = tl.load(line_ptr + 5)
    first = tl.program_id(0).to(tl.int64) * BLOCK_S
    if first < slots:
        slot = first + tl.arange(0, BLOCK_S)
        for KIND in tl.static_range(6):
            if kind == KIND:
                squares = tl.zeros((BLOCK_S,), dtype=tl.float32)
                for start in range(0, length, BLOCK_L):
                    entry = start + tl.arange(0, BLOCK_L)
                    ptrs, ok = _tile(data, slot, entry, slots, length, KIND, ALIGNED)
                    values = tl.load(ptrs, mask=ok, other=0.0).to(tl.float32)
                    squares += tl.sum(values * values, axis=1 - KIND % 2)
                tl.store(squares_ptr + tl.load(line_ptr + 4) + slot, squares, mask=slot < slots)


@triton.jit
def group_norms_kernel(
    squares_ptr, order_ptr, starts_ptr, removed_ptr, norms_ptr, part_ptr, n_groups, eps,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """norms [n_groups] = sqrt(sum of the squares of a group's slots + eps), added up in float64.

    Group g owns the slots order[starts[g]], ..., order[starts[g + 1] - 1]. part [programs] takes the sums
    of the norms of a program's removed groups that own a slot.
    """
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    ok = group < n_groups
    first = tl.load(starts_ptr + group, mask=ok, other=0)
    count = tl.load(starts_ptr + group + 1, mask=ok, other=0) - first
    sums = tl.zeros((BLOCK_G, BLOCK_S), dtype=tl.float64)
    for start in range(0, tl.max(count, axis=0), BLOCK_S):
        at = start + tl.arange(0, BLOCK_S)
        owned = at[None, :] < count[:, None]
        slot = tl.load(order_ptr + first[:, None] + at[None, :], mask=owned, other=0)
        sums += tl.load(squares_ptr + slot, mask=owned, other=0.0).to(tl.float64)
    norms = tl.sqrt(tl.sum(sums, axis=1) + eps)
    tl.store(norms_ptr + group, norms.to(tl.float32), mask=ok)
    removed = tl.load(removed_ptr + group, mask=ok, other=0) != 0
    tl.store(part_ptr + tl.program_id(0), tl.sum(tl.where(removed & (count > 0), norms, 0.0), axis=0))


@triton.jit
def total_kernel(part_ptr, value_ptr, n_parts, BLOCK: tl.constexpr):
    """value = the sum of all parts, by one program."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n_parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + at, mask=at < n_parts, other=0.0)
    tl.store(value_ptr, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def scale_kernel(
    table_ptr, index_ptr, removed_ptr, norms_ptr, by_ptr,
    PROX: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """result = data * scale of the group index[slot], on the grid of `slot_squares_kernel`; ADD: result += that.

    Without PROX, the gradient: scale = by[0] / norm of removed groups with a norm above zero, 0 of others.
    With PROX, in place: scale = max(0, 1 - by[group] / norm) of removed groups, 1 of others.
    """
    line_ptr = table_ptr + tl.program_id(1) * _FIELDS
    data = tl.load(line_ptr)
    result = tl.load(line_ptr + 1)
    slots = tl.load(line_ptr + 2)
    length = tl.load(line_ptr + 3)
    kind = tl.load(line_ptr + 5)
    first = tl.program_id(0).to(tl.int64) * BLOCK_S
    if first < slots:
        slot = first + tl.arange(0, BLOCK_S)
        group = tl.load(index_ptr + tl.load(line_ptr + 4) + slot, mask=slot < slots, other=0)
        removed = tl.load(removed_ptr + group) != 0
        norm = tl.load(norms_ptr + group, mask=removed, other=0.0)
        by = tl.load(by_ptr + (group if PROX else group * 0), mask=removed, other=0.0)
        ratio = tl.div_rn(by, tl.where(norm == 0, 1.0, norm))
        if PROX:
            # Written this way, a NaN norm stays visible as NaN instead of becoming a clean zero.
            scale = tl.where(removed, tl.where(norm <= by, 0.0, 1.0 - ratio), 1.0)
        else:
            scale = tl.where(norm == 0, 0.0, ratio)
        for KIND in tl.static_range(6):
            if kind == KIND:
                factor = tl.expand_dims(scale, 1 - KIND % 2)
                for start in range(0, length, BLOCK_L):
                    entry = start + tl.arange(0, BLOCK_L)
                    ptrs, ok = _tile(data, slot, entry, slots, length, KIND, ALIGNED)
                    # Kept rows are skipped; kept columns lie between others, and skipping them breaks up wide accesses.
                    some = ok & (factor != 0) if KIND % 2 == 0 else ok
                    values = tl.load(ptrs, mask=some, other=0.0).to(tl.float32)
                    # Zero times what is not finite would not be zero.
                    scaled = tl.where(factor == 0, 0.0, values * factor)
                    out_ptrs, _ = _tile(result, slot, entry, slots, length, KIND, ALIGNED)
                    if ADD:
                        scaled += tl.load(out_ptrs, mask=some, other=0.0).to(tl.float32)
                        written = some
                    else:
                        written = ok & (factor != 1) if PROX and KIND % 2 == 0 else ok
                    tl.store(out_ptrs, scaled.to(out_ptrs.dtype.element_ty), mask=written)
