"""Rotary embedding of queries and keys: every backend against float64, in any memory layout, width and pairs."""

import pytest
import torch
from backends_here import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from atp_kernels import call, rotary_embedding
from atp_kernels.rotary import definition

BACKENDS = backends("rotary_embedding")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")


def problem(shape=(2, 5, 3, 2, 6), *, angles=None, dtype=torch.float32, of_cos=None, one_sample=False, seed=0):
    """(q, k, cos, sin, index): shape is (batch, tokens, heads, kv heads, D); angles A > D for heads without some pairs.

    Cosines and sines of the two halves differ, which RoPE's own do not.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, tokens, heads, kv_heads, size = shape
    randn = lambda *sizes: torch.randn(sizes, generator=rng, dtype=torch.float64)  # noqa: E731
    q, k = (randn(batch, tokens, n, size).to(DEVICE, dtype).requires_grad_() for n in (heads, kv_heads))
    cos, sin = (randn(1 if one_sample else batch, tokens, angles or size).to(DEVICE, of_cos or dtype) for _ in range(2))
    index = None if angles is None else torch.randperm(angles, generator=rng)[:size].to(DEVICE)
    return q, k, cos, sin, index


def results(q, k, cos, sin, index=None, width=None, backend="auto", upstream=None):
    """Both results, and the gradients of q and k for upstream ones of a dtype, that of q by default."""
    call_ = definition.rotary_embedding if backend is None else rotary_embedding
    options = {} if backend is None else {"backend": backend}
    y = call_(q, k, cos, sin, index=index, width=width, **options)
    rng = torch.Generator().manual_seed(9)
    grads = [torch.randn(x.shape, generator=rng).to(upstream or q.dtype).to(q) for x in y]
    return [*(part.detach() for part in y), *torch.autograd.grad(y, (q, k), grads)]


def assert_within_rounding(got, given, width=None):
    """Each entry as close to float64 as one rounding of float32 sums allows, which is less than the dtype's own."""
    q, k, cos, sin, index = given
    exact = results(*(tensor.detach().double().requires_grad_() for tensor in (q, k)), cos.double(), sin.double(),
                    index, width, None, q.dtype)  # fmt: skip
    for value, truth in zip(got, exact, strict=True):
        assert value.shape == truth.shape and value.dtype == q.dtype
        # Two products may cancel; the interpreter cuts bfloat16 off where a GPU rounds.
        allowed = torch.finfo(q.dtype).eps * truth.abs() + 8 * torch.finfo(torch.float32).eps
        assert ((value.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [None, 8, 13])
@pytest.mark.parametrize("angles", [None, 10])
def test_each_entry_is_rounded_once(backend, dtype, width, angles):
    given = problem(angles=angles, dtype=dtype)
    got = results(*given, width, backend)
    assert_within_rounding(got, given, width)
    assert backend != "triton" or all(value.is_contiguous() for value in got)


@given(
    shape=st.tuples(
        *(st.sampled_from(sizes) for sizes in ([0, 1, 3], [0, 1, 2, 19], [0, 1, 9], [0, 1, 2], [0, 2, 4, 38, 130])),
    ),
    more=st.sampled_from([None, 0, 6]),
    beyond=st.sampled_from([None, 0, 1, 7]),
    dtype=st.sampled_from(DTYPES),
    of_cos=st.sampled_from([None, torch.float32, torch.bfloat16]),
    one_sample=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)  # fmt: skip
@settings(max_examples=24, derandomize=True, deadline=None)
def test_any_shape(shape, more, beyond, dtype, of_cos, one_sample, backend):
    if one_sample and shape[0] == 0:
        shape = (1, *shape[1:])
    size = shape[-1]
    angles = None if more is None else size + more
    given = problem(shape, angles=angles, dtype=dtype, of_cos=of_cos, one_sample=one_sample)
    width = None if beyond is None else size + beyond
    assert_within_rounding(results(*given, width, backend), given, width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_of_both_is_rotated_back_where_the_other_needs_no_gradient(backend, monkeypatch):
    q, k, cos, sin, _ = problem()
    module = call.select("rotary_embedding", q.device, q.dtype, backend).module
    backward, given = module.backward, []

    def counted(grads, *rest):
        given.append(len(grads))
        return backward(grads, *rest)

    monkeypatch.setattr(module, "backward", counted)
    sum(part.sum() for part in rotary_embedding(q.detach(), k, cos, sin, backend=backend)).backward()
    assert given == [1] and k.grad is not None


@needs_triton
def test_offsets_beyond_two_to_the_31():
    q, k, cos, sin, _ = problem((3, 3, 3, 1, 4), dtype=torch.float16)
    expected = results(q, k, cos, sin, backend="triton")
    step = 2**30 + 7
    pages = torch.empty(2 * step + 100, dtype=torch.float16, device=DEVICE)  # a CPU takes them when they are used
    for strides in ((step, 24, 8, 1), (24, step, 8, 1), (24, 8, step, 1)):
        far = pages.as_strided(q.shape, strides).copy_(q.detach())
        got = results(far.requires_grad_(), k, cos, sin, backend="triton")
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_that_of_transformers(backend):
    q, k, *_ = problem((2, 7, 4, 2, 16))
    frequencies = torch.arange(7, device=DEVICE)[None, :, None] * 10000 ** (-torch.arange(8, device=DEVICE) / 8)
    cos, sin = (torch.cat([part, part], -1) for part in (frequencies.cos(), frequencies.sin()))
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert_close(rotary_embedding(q, k, cos, sin, backend=backend), expected)


def test_wrong_arguments_are_refused_with_the_remedy():
    q, k, cos, sin, index = problem(angles=10)
    refused = [
        ((q[0], k, cos, sin), {"index": index}, "q and k have shapes"),
        ((q, k[..., :4], cos, sin), {"index": index}, "one even D"),
        ((q[..., :5], k[..., :5], cos, sin), {"index": index[:5]}, "one even D"),
        ((q, k.double(), cos, sin), {"index": index}, "give one floating dtype"),
        ((q, k, cos, sin), {}, r"cos has shape \[2, 5, 10\], but q .* needs \[2 or 1, 5, 6\]"),
        ((q, k, cos, sin[:, :4]), {"index": index}, "sin has shape"),
        ((q, k, cos.clone().requires_grad_(), sin), {"index": index}, "cos must be floating and constant"),
        ((q, k, cos, sin), {"index": index[:4]}, r"give int64 \[6\]"),
        ((q, k, cos, sin), {"index": index.int()}, "index is torch.int32"),
        ((q, k, cos, sin.to("meta")), {"index": index}, f"sin is on meta and q on {q.device}"),
        ((q, k, cos, sin), {"index": index, "width": 4}, "width is 4, but the heads have 6"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            rotary_embedding(*arguments, **options)
    *on_cpu, index = (tensor.cpu() for tensor in (q, k, cos, sin, index))
    with pytest.raises(ValueError, match=r"index holds positions from .* must lie in \[0, 10\)"):
        rotary_embedding(*on_cpu, index=index + 5)
