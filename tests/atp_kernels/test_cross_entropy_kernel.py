"""Cross-entropy in the place of its logits, on every backend that has it, against float64."""

import pytest
import torch
from backends_here import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st

import atp_kernels
from atp_kernels import cross_entropy_, extension, triton_runtime

BACKENDS = backends("cross_entropy_")
DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
# The interpreter cuts a float32 off to bfloat16 where a GPU rounds it.
ROUNDING = {name: 1.0 if name == "triton" else 0.5 for name in BACKENDS}


def problem(rows, vocab, dtype, scale=3.0, seed=0, device=DEVICE):
    rng = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, vocab, generator=rng)).to(device, dtype)
    return logits, torch.randint(vocab, (rows,), generator=rng).to(device)


def exact(logits, targets):
    """Losses and gradient by autograd in float64."""
    logits = logits.detach().clone().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def computed(logits, targets, backend):
    slope = logits.clone()
    return cross_entropy_(slope, targets, backend=backend), slope


def assert_close_to_exact(logits, targets, backend):
    (losses, slope), (true_losses, true_slope) = computed(logits, targets, backend), exact(logits, targets)
    assert losses.dtype == torch.float32 and slope.dtype == logits.dtype
    # float32 rounds a difference of logits to its own size, which exp makes a relative error.
    unit, spread = torch.finfo(torch.float32).eps, float((logits.max() - logits.min()).double()) + 8
    assert ((losses - true_losses).abs() <= 2 * spread * unit).all()
    allowed = ROUNDING[backend] * torch.finfo(logits.dtype).eps * true_slope.abs() + 2 * spread * unit * (
        true_slope.abs() + 1e-30
    )
    rows = torch.arange(len(targets), device=DEVICE)
    allowed[rows, targets] += 2 * spread * unit  # 1 is taken off in float32
    assert ((slope - true_slope).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.sampled_from([0, 1, 3, 40]),
    vocab=st.sampled_from([1, 2, 7, 16, 31, 32, 33, 95, 300, 4095, 4097, 9000]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 3.0, 60.0]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_error_is_a_few_units(backend, rows, vocab, dtype, scale):
    if rows:
        assert_close_to_exact(*problem(rows, vocab, dtype, scale), backend)
    else:
        losses, slope = computed(*problem(rows, vocab, dtype, scale), backend)
        assert losses.shape == (0,) and slope.shape == (0, vocab)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_a_large_vocabulary_stay_exact(backend):
    """Equal logits: 300,000 equal terms, of which a float32 sum loses some."""
    logits, targets = torch.zeros(2, 300_000, device=DEVICE), torch.tensor([5, 299_999], device=DEVICE)
    losses, slope = computed(logits, targets, backend)
    rounding = 1e-7 if backend == "native" else 1e-6
    torch.testing.assert_close(losses, torch.full_like(losses, 300_000.0).log(), rtol=rounding, atol=0)
    torch.testing.assert_close(slope[0, 0], torch.tensor(1 / 300_000, device=DEVICE), rtol=rounding, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [7, 40, 131])
def test_a_shift_of_all_logits_changes_nothing(backend, vocab):
    """Integers, which float32 shifts without an error: far from zero exp alone would be zero or infinite."""
    logits, targets = problem(9, vocab, torch.float32)
    logits = logits.round()
    expected = computed(logits, targets, backend)
    for shift in (-300, 300):
        torch.testing.assert_close(computed(logits + shift, targets, backend), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(backend, dtype):
    row = [0.0] * 40
    cases = [row[:-1] + [-INF], row[:-1] + [INF], row[:-1] + [NAN], [-INF] * 40, [-3e38] + [3e38] * 39]
    logits = torch.tensor(cases, device=DEVICE).to(dtype)
    losses, slope = computed(logits, torch.zeros(5, dtype=torch.int64, device=DEVICE), backend)
    wide = logits.float().log_softmax(1)
    torch.testing.assert_close(losses, -wide[:, 0], equal_nan=True)
    expected = wide.exp()
    expected[:, 0] -= 1
    torch.testing.assert_close(slope, expected.to(dtype), equal_nan=True)


def test_other_dtypes_go_to_the_reference():
    logits, targets = problem(5, 60, torch.float64)
    losses, slope = computed(logits, targets, "auto")
    assert losses.dtype == torch.float64
    torch.testing.assert_close((losses, slope), exact(logits, targets), rtol=1e-12, atol=1e-14)
    assert computed(logits.half(), targets, "auto")[0].dtype == torch.float32
    assert "reference" in atp_kernels.explain("cross_entropy_", logits)


def test_wrong_input_is_one_sentence():
    logits, targets = problem(3, 5, torch.float32)
    with pytest.raises(ValueError, match=r"shape \[5\]: give floating ones \[rows, vocab\]"):
        cross_entropy_(logits[0], targets)
    with pytest.raises(ValueError, match="give floating ones"):
        cross_entropy_(logits.long(), targets)
    with pytest.raises(ValueError, match="give floating ones"):
        cross_entropy_(logits[:, :0], targets)
    with pytest.raises(ValueError, match=r"the logits need int64 \[3\] on " + DEVICE):
        cross_entropy_(logits, targets[:2])
    with pytest.raises(ValueError, match="torch.int32"):
        cross_entropy_(logits, targets.int())
    with pytest.raises(ValueError, match="detach them first"):
        cross_entropy_(logits.requires_grad_(), targets)


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
class TestNative:
    def test_targets_outside_the_vocabulary(self):
        for target in (-1, 5):
            logits = problem(2, 5, torch.float32, device="cpu")[0]
            before = logits.clone()
            with pytest.raises(ValueError, match=r"^targets hold .*: every target must lie in \[0, 5\)\.$"):
                cross_entropy_(logits, torch.tensor([0, target]))
            assert torch.equal(logits, before)


@pytest.mark.skipif("triton" not in BACKENDS, reason=str(triton_runtime.REASON))
class TestTriton:
    @pytest.mark.parametrize("block", [16, 64])
    @pytest.mark.parametrize("vocab", [1, 15, 16, 17, 64, 1001])
    def test_any_number_of_blocks(self, block, vocab):
        from atp_kernels.loss import triton as backend

        logits, targets = problem(5, vocab, torch.float16)
        logits[1] = logits[1].sort().values  # every block has a new largest logit
        logits[2] = logits[2].sort(descending=True).values  # and none after the first
        slope = logits.clone()
        losses = backend.cross_entropy_(slope, targets, block=block)
        true_losses, true_slope = exact(logits, targets)
        torch.testing.assert_close(losses, true_losses.float(), rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(slope, true_slope.half(), rtol=1e-3, atol=2e-6)

    def test_a_target_outside_the_vocabulary_spoils_its_own_loss_alone(self):
        from atp_kernels.loss import triton as backend

        logits, targets = problem(4, 33, torch.float32)
        beyond = targets.clone()
        beyond[1], beyond[2] = -1, 33
        slope, losses, expected = logits.clone(), torch.empty(4, device=DEVICE), logits.clone()
        whole = backend.cross_entropy_(expected, targets)
        backend.cross_entropy_kernel[(4,)](slope, beyond, losses, 33, 33, 1, BLOCK=64, num_warps=backend.warps_for(64))
        assert losses[1:3].isnan().all() and torch.equal(losses[[0, 3]], whole[[0, 3]])
        assert torch.equal(slope[[0, 3]], expected[[0, 3]])
        torch.testing.assert_close(slope[1:3], logits[1:3].softmax(1))
