"""The Triton kernels of this room as `atp_kernels.offline` compiles them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
import triton

from atp_kernels.linear import descriptor_kernels, descriptors, tiles
from atp_kernels.linear import triton_kernels as kernels
from atp_kernels.offline import TYPES, WITH_PRODUCTS, OfflineCase

_SIZE = 4096
_MANY = 32768
_OTHER_RANKS = (16, 128)
"""A usual and the widest one, for what is seldom launched."""
_ON_DEVICE = ", device seed"
_DRAWN: dict[str, object] = {"THRESHOLD": 2**32 // 10, "SCALE": 1 / 0.9}


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """Every kernel in the variants that a training step launches, with every tile of its table."""
    for dtype, rank in product(dtypes, ranks):
        launched = [*_gemms(dtype, rank), *_descriptor_gemms(dtype, rank), *_reductions(dtype, rank)]
        yield from launched
        if rank in _OTHER_RANKS:
            yield from _tried_gemms(dtype, rank)
            yield from _other_numerics(launched)


def _gemms(dtype: torch.dtype, rank: int) -> Iterator[OfflineCase]:
    for name, m, n, mask_lora, absent in (
        ("gemm fwd split", _SIZE, _SIZE, False, "in_mask_ptr other_ptr dot_ptr a_ptr l_ptr"),
        ("gemm fwd decision", _SIZE, _SIZE, True, "other_ptr dot_ptr a_ptr l_ptr"),
        ("gemm fwd narrow", _SIZE, 128, False, "sum_ptr other_ptr dot_ptr"),
        ("gemm fwd decision narrow", _SIZE, 128, True, "other_ptr dot_ptr"),
        ("gemm fwd 1024 rows", 1024, _SIZE, True, "other_ptr dot_ptr a_ptr l_ptr"),
        ("gemm fwd 128 rows", 128, _SIZE, True, "other_ptr dot_ptr a_ptr l_ptr"),
        ("gemm fwd decode", 16, _SIZE, False, "in_mask_ptr sum_ptr other_ptr dot_ptr a_ptr l_ptr"),
        ("gemm dx", _SIZE, _SIZE, False, "bias_ptr sum_ptr a_ptr l_ptr"),
        ("gemm dx decision", _SIZE, _SIZE, True, "bias_ptr sum_ptr a_ptr l_ptr"),
        ("gemm dx dropout", _SIZE, _SIZE, False, "bias_ptr sum_ptr a_ptr l_ptr"),
        ("gemm dx decision dropout", _SIZE, _SIZE, True, "bias_ptr sum_ptr a_ptr l_ptr"),
        ("gemm dx dropout, device seed", _SIZE, _SIZE, False, "bias_ptr sum_ptr a_ptr l_ptr"),
        ("gemm dx narrow dropout", _SIZE, 128, False, "bias_ptr sum_ptr a_ptr l_ptr"),
    ):
        config = tiles.gemm_config(m, n, rank, dtype)
        constants = {
            "MASK_LORA": mask_lora, "ONE_PASS": config.one_pass and "fwd" in name, "EVEN_K": True,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
            **(_DRAWN if "dropout" in name else {}),
        }  # fmt: skip
        wide_tile = dtype != torch.float32 and config.block_m >= 64
        case = _case(name, kernels.masked_lora_gemm_kernel, dtype, rank, absent.split(), constants, config, wide_tile)
        yield replace(case, extra=name == "gemm fwd decision narrow" or name.endswith(_ON_DEVICE))


def _tried_gemms(dtype: torch.dtype, rank: int) -> Iterator[OfflineCase]:
    """Every tile that the tuner tries, of a decision step, with `--all`."""
    for tile, (way, absent) in product(
        tiles.gemm_tiles(dtype),
        (
            ("fwd", "other_ptr dot_ptr a_ptr l_ptr"),
            ("dx", "bias_ptr sum_ptr a_ptr l_ptr"),
        ),
    ):
        config = tiles.GemmConfig(*tile)
        constants = {
            "MASK_LORA": True, "ONE_PASS": False, "EVEN_K": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        }  # fmt: skip
        name = f"gemm {way} {'x'.join(map(str, tile))}"
        wide_tile = dtype != torch.float32
        case = _case(name, kernels.masked_lora_gemm_kernel, dtype, rank, absent.split(), constants, config, wide_tile)
        yield replace(case, extra=True)


def _other_numerics(launched: Sequence[OfflineCase]) -> Iterator[OfflineCase]:
    """With offsets of 64 bits, which operands of 2^31 elements take, and with TF32, where a user allows it."""
    for case in launched:
        if case.extra or "dropout" in case.name or not {"WIDE", "PRECISION"} <= case.constants.keys():
            continue
        yield replace(case, name=f"{case.name}, wide", constants=case.constants | {"WIDE": True}, extra=True)
        if case.dtype == torch.float32:
            tf32 = case.constants | {"PRECISION": "tf32"}
            yield replace(case, name=f"{case.name}, tf32", constants=tf32, extra=True)


def _descriptor_gemms(dtype: torch.dtype, rank: int) -> Iterator[OfflineCase]:
    """Every tile of every generation: the forward pass of a LoRA step, with `--all` that of a decision step and dx."""
    kernel = descriptor_kernels.masked_lora_descriptor_kernel
    rest = "l_desc other_ptr dot_ptr"
    for (name, config), (way, mask_lora, absent) in product(
        tiles.descriptor_tiles(dtype).items(),
        (
            ("fwd", False, f"sum_desc {rest}"),
            ("decision", True, rest),
            ("dx", False, "a_desc l_desc bias_ptr sum_desc"),
        ),
    ):
        one_pass = config.one_pass and way != "dx"
        if (one_pass and rank > config.one_pass_rank) or descriptors.RELEASE < config.triton:
            continue
        if config.block_n > tiles.WIDEST_DOT:
            absent += " other_ptr dot_ptr"
        absent += "" if one_pass else " a_desc"
        constants = {
            "MASK_LORA": mask_lora, "ONE_PASS": one_pass, "W_BY_K": way == "dx",
            "WARP_SPECIALIZE": config.warp_specialize, "STEP_R": tiles.descriptor_rank_step(rank, dtype),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        }  # fmt: skip
        case = _case(f"{way} {name}", kernel, dtype, rank, absent.split(), constants, config, dtype != torch.float32)
        kinds = _descriptors(config, dtype, rank, way == "dx")
        arguments = {name: None if kind is None else kinds.get(name, kind) for name, kind in case.arguments.items()}
        narrow = dtype != torch.float32 and config.block_m < 128
        extra = way == "decision" or (way == "dx" and (config.one_pass or narrow))
        yield replace(case, arguments=arguments, archs=config.archs, descriptors=True, extra=extra)


def _descriptors(config: tiles.DescriptorConfig, dtype: torch.dtype, rank: int, by_k: bool) -> dict[str, str]:
    m, n, k = config.block_m, config.block_n, config.block_k
    blocks = {
        **{"x_desc": (m, k), "w_desc": (k, n) if by_k else (n, k), "a_desc": (tiles.rank_block(rank), k)},
        **{"l_desc": (m, k), "y_desc": (m, n), "sum_desc": (m, n)},
    }
    return {name: f"tensordesc<{TYPES[dtype]}[{height}, {width}]>" for name, (height, width) in blocks.items()}


def _reductions(dtype: torch.dtype, rank: int) -> Iterator[OfflineCase]:
    for name, rows in (("down", _SIZE), ("down many rows", _MANY), ("down decode", 16)):
        narrow = tiles.down_config(rows, rank, dtype)
        constants: dict[str, object] = {"EVEN_K": True, "BLOCK_M": narrow.block_wide, "BLOCK_K": narrow.block_long}
        yield replace(_case(name, kernels.lora_down_kernel, dtype, rank, [], constants, narrow), extra=rows == 16)
        dropped = _case(f"{name} dropout", kernels.lora_down_kernel, dtype, rank, [], constants | _DRAWN, narrow)
        yield replace(dropped, extra=rows != _SIZE)
        seeded = _case(
            f"{dropped.name}{_ON_DEVICE}", kernels.lora_down_kernel, dtype, rank, [], dropped.constants, narrow
        )
        yield replace(seeded, extra=True)
    reduce = tiles.reduce_config(rank, dtype)
    constants = {"BLOCK_M": reduce.block_long, "BLOCK_C": reduce.block_wide}
    yield _case("column reduce", kernels.column_reduce_kernel, dtype, rank, [], constants, reduce)
    factor_only = ["z_ptr", "dot_ptr", "sum_ptr"]
    constants |= _DRAWN
    yield _case("column reduce dropout", kernels.column_reduce_kernel, dtype, rank, factor_only, constants, reduce)
    name = f"column reduce dropout{_ON_DEVICE}"
    seeded = _case(name, kernels.column_reduce_kernel, dtype, rank, factor_only, constants, reduce)
    yield replace(seeded, extra=True)
    constants = {"BLOCK_C": 64}
    yield _case("sum partials", kernels.sum_partials_kernel, dtype, rank, [], constants, reduce)


def _case(
    name: str,
    kernel: triton.runtime.JITFunction,
    dtype: torch.dtype,
    rank: int,
    absent: Sequence[str],
    constants: Mapping[str, object],
    config: tiles.GemmConfig | tiles.ReduceConfig,
    tensor_core_loop: bool = False,
) -> OfflineCase:
    float32 = {"out_mask_ptr", "in_mask_ptr", "mask_ptr", "dot_ptr", "part_ptr"}
    if kernel is kernels.column_reduce_kernel:
        float32 |= {"factor_ptr", "sum_ptr"}
    every: dict[str, object] = {
        "WIDE": False, "UPCAST": False, "PRECISION": "ieee", "RANK": rank, "R": rank, "BLOCK_R": tiles.rank_block(rank),
        "STEP_R": tiles.rank_step(rank, dtype), "THRESHOLD": 0, "SCALE": 1.0, **constants,
    }  # fmt: skip
    # A contiguous operand has stride 1 on its last axis; the JIT makes that a constant, and so does this.
    every |= {"stride_xk": 1, "stride_wk": 1, "stride_ak": 1, "stride_br": 1, "stride_lk": 1, "stride_on": 1}
    every |= {"stride_gc": 1, "stride_zc": 1, "stride_or": 1}
    if name.startswith(("gemm dx", "dx ")):
        # weight.t() and lora_a.t(): contiguous along the output, not along the reduced side.
        every |= {"stride_wn": 1, "stride_bn": 1}
        del every["stride_wk"], every["stride_br"]
    arguments: dict[str, str | None] = {}
    for argument in kernel.arg_names:
        if argument == "seed_ptr":
            arguments[argument] = "*i64" if name.endswith(_ON_DEVICE) else None
        elif argument in absent:
            arguments[argument] = None
        elif argument in every:
            continue
        elif argument.endswith("_ptr"):
            arguments[argument] = "*" + ("fp32" if argument in float32 else TYPES[dtype])
        else:
            arguments[argument] = {"scaling": "fp32", "seed": "i64"}.get(argument, "i32")
    used = {name: value for name, value in every.items() if name in kernel.arg_names}
    launch = config.num_warps, config.num_stages, tensor_core_loop
    return OfflineCase(name, kernel, dtype, rank, arguments, used, *launch, archs=WITH_PRODUCTS)
