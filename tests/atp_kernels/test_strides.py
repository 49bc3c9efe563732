"""Operands of every operation as slices, transposes, windows and repetitions of other memory, and with sides of one.

The results are those of contiguous operands.
"""

from dataclasses import dataclass

import pytest
import torch
from backends_here import backends
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layouts import layouts
from operation_cases import CASES, K, M, N, R
from torch import Tensor

SIDES = st.sets(st.sampled_from([M, N, K, R])) | st.just(set())


@dataclass(frozen=True)
class Call:
    """Each field is an axis of the grid, of which the quick run takes pairs."""

    name: str
    dtype: torch.dtype
    backend: str

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}-{self.backend}"


CALLS = [
    Call(name, dtype, backend)
    for name, case in CASES.items()
    for dtype in (torch.float32, torch.bfloat16)
    for backend in backends(case.op, dtype)
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@given(data=st.data())
@settings(max_examples=3, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_strides_do_not_change_a_result(call, data):
    name, dtype, backend = call.name, call.dtype, call.backend
    case = CASES[name].sized(dict.fromkeys(data.draw(SIDES, "sides of one"), 1))
    drawn = {operand: data.draw(layouts(operand not in case.written), operand) for operand in case.shapes}
    upstream = data.draw(layouts(), "upstream")
    dense = {operand: drawn[operand].values(tensor) for operand, tensor in case.operands(dtype).items()}
    laid = {operand: drawn[operand].lay(tensor) for operand, tensor in dense.items()}

    def gradient(result: Tensor) -> Tensor:
        return torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result)

    got = case.run(laid, backend, lambda result: upstream.lay(gradient(result)))
    expected = case.run(dense, backend, lambda result: upstream.values(gradient(result)))
    assert got.keys() == expected.keys()
    for key, value in got.items():
        # The vendor's products add up in another order.
        size = max(1.0, expected[key].detach().abs().max().item())
        rounded = torch.bfloat16 if name == "linear-merged" else dtype
        allowed = (512 if rounded == torch.float32 else 16) * torch.finfo(rounded).eps * size
        torch.testing.assert_close(
            value, expected[key], rtol=0, atol=allowed, msg=lambda said, key=key: f"{key}: {said}"
        )
