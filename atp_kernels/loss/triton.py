"""Cross-entropy in Triton: one program takes a row of logits, reads it twice and writes it once.

The first pass keeps, in each lane, the largest logit so far and the sum of exponentials relative to it, so it needs one
exponential per logit and no reduction across threads until its end. The second pass writes the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call
from atp_kernels.checks import check_range

_WIDEST_BLOCK = 8192
_PER_THREAD = 16
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16 on CUDA."""
    return triton_runtime.refuses(call)


def cross_entropy_(logits: Tensor, targets: Tensor, *, block: int | None = None) -> Tensor:
    """As `aten.cross_entropy_`; on a GPU the loss of a row whose target is outside the vocabulary is NaN.

    block: logits that a program holds at a time, a power of two, in place of the usual number.
    """
    rows, vocab = logits.shape
    if targets.device.type == "cpu":  # in the interpreter, where reading them makes no device wait
        check_range("targets hold", targets, vocab, "target")
    block = block or min(_WIDEST_BLOCK, triton.next_power_of_2(vocab))
    held = logits if logits.stride(1) == 1 else logits.contiguous()
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(rows,)](
                held, targets, losses, vocab, held.stride(0), targets.stride(0),
                BLOCK=block, num_warps=warps_for(block), enable_fp_fusion=True,
            )  # fmt: skip
    if held is not logits:
        logits.copy_(held)
    return losses


def warps_for(block: int) -> int:
    """Warps of a program: 16 logits per thread, at least one 16-byte access in every dtype."""
    return max(1, block // (32 * _PER_THREAD))


@triton.jit
def _load(row_ptr, cols, V):
    return tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)


@triton.jit
def cross_entropy_kernel(logits_ptr, target_ptr, loss_ptr, V, stride_zm, stride_t, BLOCK: tl.constexpr):
    """losses [M] = log(sum of exp(z)) - z[target]; z [M, V] becomes softmax(z) - onehot(target). A row per program."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_zm
    target = tl.load(target_ptr + row * stride_t)
    # Every thread has it before the reductions below let any of them write.
    at_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    # The lowest number and not -inf, from which the distance to another -inf is NaN.
    largest = tl.full((BLOCK,), _LOWEST, dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        z = _load(row_ptr, start + lanes, V)
        apart = tl.exp(-tl.abs(z - largest))
        higher = z > largest
        sums = tl.where(higher, sums * apart + 1, sums + apart)
        largest = tl.where(higher, z, largest)
    top = tl.max(largest, axis=0)
    total = tl.sum(sums * tl.exp(largest - top), axis=0)
    tl.store(loss_ptr + row, tl.log(total) + (top - at_target))
    for start in range(0, V, BLOCK):
        cols = start + lanes
        slope = tl.exp(_load(row_ptr, cols, V) - top) / total - (cols == target).to(tl.float32)
        tl.store(row_ptr + cols, slope.to(logits_ptr.dtype.element_ty), mask=cols < V)
