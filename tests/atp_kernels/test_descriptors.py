"""The Triton kernel of tensor descriptors: natively on a GPU that has them, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from backends_here import DEVICE, ON_GPU, on_device
from kept_cases import ORDERS, assert_error_rule
from kept_cases import run as run_kept
from linear_cases import Shape, assert_as_good_as_unfused, every_combination, operands

from atp_kernels import KeptSlice, checks, masked_lora_linear, triton_runtime

if not triton_runtime.AVAILABLE:
    pytest.skip(triton_runtime.REASON, allow_module_level=True)

from kernel_linear import FACTOR, run

from atp_kernels.kept import aten as kept_aten
from atp_kernels.kept import triton as kept_launcher
from atp_kernels.kept.operands import Operands as KeptOperands
from atp_kernels.linear import descriptors, tiles
from atp_kernels.linear import triton as launcher
from atp_kernels.linear.operands import Operands, Options
from atp_kernels.linear.tiles import TILE_VARIABLE, DescriptorConfig, descriptor_tiles

if ON_GPU and descriptors.generation(torch.device("cuda")) is None:
    pytest.skip("the GPU has no tensor memory accelerator", allow_module_level=True)

# Small tiles, so that small shapes have several of them with ragged edges in every direction; every generation.
TILE = DescriptorConfig(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=2, archs=(90, 100, 120))
TILE = TILE if ON_GPU else replace(TILE, block_m=16, block_n=16, block_k=16)
ONE_PASS = replace(TILE, one_pass=True)
CONFIGS = pytest.mark.parametrize("config", [TILE, ONE_PASS], ids=["split", "one-pass"])
SMALL = Shape(m=19, n=24, k=40, rank=5)


@pytest.fixture
def launches(monkeypatch):
    """The tiles with which the kernel of descriptors was launched."""
    noted, launch = [], descriptors.launch

    def note(*arguments, **options):
        noted.append(arguments[6])
        launch(*arguments, **options)

    monkeypatch.setattr(descriptors, "launch", note)
    return noted


# Each combination with one of the two forms, each form with every kind of masks.
@pytest.mark.parametrize(
    ("shape", "config"),
    [(shape, (TILE, ONE_PASS)[(i + i // 4) % 2]) for i, shape in enumerate(every_combination(SMALL))],
    ids=lambda value: str(value) if isinstance(value, Shape) else "one-pass" if value.one_pass else "split",
)
def test_every_combination_in_float32(launches, shape, config):
    tensors = on_device(operands(shape, torch.float32))
    assert_as_good_as_unfused(run(shape, tensors, config), shape, tensors)
    assert len(launches) == 2


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 50])
@pytest.mark.parametrize(("mask_lora", "own_input", "rank"), [(False, False, 8), (True, True, 64), (True, False, 16)])
def test_half_precision(launches, dtype, config, m, mask_lora, own_input, rank):
    shape = Shape(m=m, n=24, k=40, rank=rank, mask_lora=mask_lora, dropout=own_input, out_mask="hard")
    tensors = on_device(operands(shape, dtype))
    assert_as_good_as_unfused(run(shape, tensors, config), shape, tensors, FACTOR[dtype])
    assert len(launches) == 2


def plain(*size, dtype=torch.float16, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def product(x, weight, n, config=TILE, **options):
    """x weight^T on the first of n columns, by the kernel alone."""
    y, lora_b = x.new_empty(x.shape[0], n), x.new_zeros(n, 1)
    options = {"lora_a": None, "s": None, "lora_b": lora_b} | options
    first = (options.pop(name) for name in ("lora_a", "lora_b", "s"))
    descriptors.launch(x, weight, *first, y, config, launcher.numerics(x), **options)
    return y


@CONFIGS
def test_removed_weights_are_never_read_and_their_tiles_get_the_adapter_alone(config):
    """The head of the outputs and inputs is kept; what is removed of W is NaN, as what lies behind the adapter."""
    (m, n, k, rank), (kept_n, kept_k) = (40, 160, 136, 8), (40, 72)
    x, lora_a, lora_b = plain(m, k), plain(rank, k, seed=1), plain(n, rank, seed=2)
    bias = torch.full((n,), torch.nan, dtype=x.dtype, device=DEVICE)[:kept_n].copy_(plain(kept_n, seed=3))
    whole = torch.full((n, k), torch.nan, dtype=x.dtype, device=DEVICE)
    weight = whole[:kept_n, :kept_k].copy_(plain(kept_n, kept_k, seed=4))
    s = (x @ lora_a.t()).mul_(0.5)
    given = {"lora_a": lora_a, "s": torch.full_like(s, torch.nan)} if config.one_pass else {"s": s}
    got = product(x, weight, n, config, lora_b=lora_b, bias=bias, scaling=0.5, **given)
    exact = 0.5 * (x.double() @ lora_a.double().t()) @ lora_b.double().t()
    exact[:, :kept_n] += x[:, :kept_k].double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=5e-2)
    torch.testing.assert_close(given["s"], s, rtol=1e-2, atol=1e-2)


def test_without_an_adapter_removed_tiles_are_zero():
    x, weight = plain(19, 40), plain(16, 40, seed=1)
    got = product(x, weight, 64)
    torch.testing.assert_close(got[:, :16].double(), x.double() @ weight.double().t(), rtol=1e-2, atol=1e-2)
    assert not got[:, 16:].any()


@CONFIGS
@pytest.mark.parametrize("mask_lora", [False, True])
def test_a_tile_whose_mask_is_zero_reads_no_weight(config, mask_lora):
    width = config.block_n
    shape = Shape(m=19, n=3 * width, k=40, rank=8, in_mask=None, mask_lora=mask_lora, dropout=False, bias=False)
    tensors = on_device(operands(shape, torch.float16))
    mask = tensors["out_mask"].detach().clone()
    mask[width : 2 * width] = 0
    tensors |= {"out_mask": mask}
    poisoned = tensors["weight"].detach().clone()
    poisoned[width : 2 * width] = torch.nan
    options = Options(shape.scaling, mask_lora)
    results = [
        launcher.forward(Operands(**{**tensors, "weight": weight}), options, config=config).y
        for weight in (tensors["weight"].detach(), poisoned)
    ]
    assert torch.equal(*results)
    keeps_the_sum = launcher.forward(
        Operands(**{**tensors, "weight": poisoned}), options._replace(keep_sum=True), config=config
    )
    assert keeps_the_sum.total[:, width : 2 * width].isnan().all()


@CONFIGS
@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("own_input", [False, True])
def test_kept_first_slices(launches, monkeypatch, config, first, own_input):
    outs, ins = ("hard" if ordered else None for ordered in first)
    shape = Shape(m=19, n=48, k=56, rank=8, out_mask=outs, in_mask=ins, dropout=own_input)
    tensors = on_device(operands(shape, torch.float16))
    monkeypatch.setattr(tiles, "named_tile", lambda dtype: config)
    assert_error_rule(run_kept(shape, tensors, "triton", first=first), shape, tensors)
    assert len(launches) == 2


def test_gathered_sides_of_a_slice_go_to_the_vendor(launches):
    kept = KeptSlice(plain(48, 56), out_mask=torch.arange(48, device=DEVICE) < 8, pad_to=8)
    x, lora_a, lora_b = plain(5, 56), plain(4, 56), plain(48, 4)
    ours = KeptOperands(x, kept.weight(x.dtype), None, lora_a, lora_b, None, *kept.sides, 1.0)
    for config in (TILE, ONE_PASS):
        assert torch.equal(kept_launcher.forward(ours, config=config)[0], kept_aten.forward(ours)[0])
    assert launches == []


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (24, 1), (1, 1)])
def test_steps_along_an_axis_of_one_entry_do_not_matter(rows, columns):
    x, weight = plain(3, 40)[:, :columns], plain(rows, 40, seed=1)[:, :columns]
    strange = [2**40 + 1 if size == 1 else step for size, step in zip(weight.shape, weight.stride(), strict=True)]
    assert torch.equal(product(x, weight.as_strided(weight.shape, strange), 24), product(x, weight, 24))


def laid(matrix, offset=0, spare=0, step=1):
    """The same values from `offset` on, with `spare` elements behind each row and steps of `step` in it."""
    m, k = matrix.shape
    storage = matrix.new_full((offset + m * (k * step + spare) + step,), torch.nan)
    return storage.as_strided((m, k), (k * step + spare, step), offset).copy_(matrix)


OTHERWISE = {"in steps": dict(step=2), "rows at odd bytes": dict(spare=4), "from an odd byte": dict(offset=4)}


@pytest.mark.parametrize("how", [*OTHERWISE, "spare"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_input"])
def test_what_a_descriptor_cannot_address_goes_to_the_other_kernel(launches, name, how):
    shape = Shape(m=19, n=24, k=40, rank=4, mask_lora=True, out_mask="hard")
    tensors = {key: tensor.detach() for key, tensor in on_device(operands(shape, torch.float16)).items()}
    options = Options(shape.scaling, True)
    expected = launcher.forward(Operands(**tensors), options, config=ONE_PASS).y
    assert launches == [ONE_PASS]
    tensors[name] = laid(tensors[name], **OTHERWISE.get(how, dict(offset=8, spare=8)))
    got = launcher.forward(Operands(**tensors), options, config=ONE_PASS).y
    assert len(launches) == (2 if how == "spare" else 1)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def far(shape, strides):
    return torch.empty_strided(shape, strides, dtype=torch.float16, device="meta")


NARROW, WIDE = replace(ONE_PASS, one_pass_rank=4), replace(TILE, block_n=256)
SIDE = plain(8, 40)
REFUSED = [
    (TILE, SIDE, 28, {}, "rows of 28 results do not begin at multiples of 16 bytes"),
    (TILE, SIDE[:1], 28, {}, None),
    *((TILE, far(*sides), 8, {}, "no descriptor addresses x")
      for sides in (((2**31, 1), (8, 1)), ((2, 2**31), (2**31, 1)), ((0, 8), (8, 1)))),
    (TILE, plain(1, 200).view(-1).as_strided((8, 40), (8, 1)), 8, {}, "no descriptor addresses x"),
    (NARROW, SIDE, 8, {"lora_a": plain(5, 40)}, "S of rank 5 does not fit beside the tile"),
    (NARROW, SIDE, 8, {"lora_a": plain(4, 40)}, None),
    (WIDE, SIDE, 8, {"other": SIDE}, "the gradient of a mask does not fit beside 256 columns"),
    (WIDE, SIDE, 8, {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("tile", "x", "n", "more", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_a_tile_cannot_take_is_refused(tile, x, n, more, said):
    assert descriptors.refuses(tile, x, plain(28, 40) if n == 28 else SIDE, n, **more) == said


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(descriptors, "INTERPRETED", False)
    for generation, refused in ((90, False), (100, True), (None, True)):
        monkeypatch.setattr(descriptors, "generation", lambda device, known=generation: known)
        said = descriptors.refuses(replace(TILE, archs=(90,)), plain(8, 40), plain(8, 40), 8)
        assert said == (f"{DEVICE}{':0' * ON_GPU} is none of the generations (90,)" if refused else None)


def test_a_tile_waits_for_a_triton_that_compiles_it(monkeypatch):
    """Triton 3.6 leaves an empty kernel behind, whose results nobody would have written."""
    tile = descriptor_tiles(torch.bfloat16)["128x256x64-warps"]
    x, weight = torch.ones(8, 64, dtype=torch.bfloat16), torch.ones(16, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(descriptors, "INTERPRETED", False)
    monkeypatch.setattr(descriptors, "generation", lambda device: 100)
    for release, refused in (((3, 6), True), ((3, 9), False), ((3, 10), False)):
        monkeypatch.setattr(descriptors, "RELEASE", release)
        said = descriptors.refuses(tile, x, weight, 16)
        assert (said is not None and "compiles the tile to an empty kernel" in said) == refused


@pytest.mark.parametrize(("capability", "known"), [((8, 9), None), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)])
def test_generations(monkeypatch, capability, known):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert descriptors.generation(torch.device("cuda", 0)) == known
    assert descriptors.generation(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert descriptors.generation(torch.device("cuda", 0)) is None


def test_the_environment_names_a_tile(monkeypatch, launches):
    shape = Shape(m=5, n=24, k=40, rank=4, dropout=False)
    tensors = on_device(operands(shape, torch.float32))
    call = lambda: masked_lora_linear(**tensors, **shape.options, backend="triton")  # noqa: E731
    call()
    assert launches == []
    monkeypatch.setenv(TILE_VARIABLE, "64x64x32")
    with monkeypatch.context() as patch:  # a graph may capture it
        patch.setattr(checks, "is_capturing", lambda device: True)
        y = call()
        torch.autograd.grad(y, tensors["x"], torch.ones_like(y))
    assert launches == [descriptor_tiles(torch.float32)["64x64x32"]] * 2
    monkeypatch.setenv(TILE_VARIABLE, "128x128x64")  # of 16-bit data
    call()
    assert len(launches) == 2
    monkeypatch.setenv(TILE_VARIABLE, "1x1")
    with pytest.raises(ValueError, match="ATP_KERNELS_LINEAR_TILE is 1x1: name one of 128x256x64, .*, or unset it"):
        call()


def test_dropout_goes_to_the_other_kernel(launches):
    shape = Shape(m=5, n=24, k=40, rank=4, p=0.4)
    tensors = {name: tensor.detach() for name, tensor in on_device(operands(shape, torch.float32)).items()}
    options = Options(shape.scaling, dropout=shape.drawn)
    got, same = (launcher.forward(Operands(**tensors), options, config=config).y for config in (TILE, None))
    assert torch.equal(got, same) and launches == []
