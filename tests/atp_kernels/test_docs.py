"""The pages of the kernels say what the code does: one for every operation, its tile tables and its FLOPs."""

import doctest
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from block_cases import Case
from linear_cases import Shape, operands
from torch.utils.flop_counter import FlopCounterMode

import atp_kernels
from atp_kernels.linear import tiles

ROOT = Path(__file__).parents[2]
FILES = list((ROOT / "atp_kernels").glob("*/*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
SECTIONS = ["Formula", "Saved for backward", "Gradients", "FLOPs", "Bytes", "Backends", "Tiles"]
NOT_OPERATIONS = {"available_backends", "explain", "layers", "new_seed", "nn", "selftest"}
LINEAR = PAGES["atp_kernels/linear/README.md"]


def test_every_public_operation_has_a_page():
    titles = " ".join(page.splitlines()[0] for page in PAGES.values())
    assert set(re.findall(r"`(\w+)`", titles)) == set(atp_kernels.__all__) - NOT_OPERATIONS
    index = ROOT / "docs" / "kernels.md"
    links = re.findall(r"\]\((\.\./atp_kernels/[\w./]+\.md)\)", index.read_text(encoding="utf-8"))
    linked = {(index.parent / link).resolve() for link in links}
    assert linked == set(FILES)


def test_every_public_name_has_an_example_that_runs():
    public = [getattr(atp_kernels, name) for name in atp_kernels.__all__ if name not in ("nn", "layers")]
    for thing in (*public, atp_kernels.nn.MaskedLoRALinear):
        names = vars(importlib.import_module(thing.__module__)) | {"torch": torch, "Projection": atp_kernels.Projection}
        (found,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs=dict(names))
        assert found.examples, f"{thing.__name__} shows no call"
        said = []
        result = doctest.DocTestRunner().run(found, out=said.append)
        assert result.failed == 0, "".join(said)


@pytest.mark.parametrize("name", PAGES)
def test_page_has_every_section(name):
    assert re.findall(r"^## (.+)$", PAGES[name], re.MULTILINE) == SECTIONS


def table_after(page, sentence):
    """The body of the first table after a sentence, cell by cell; whole numbers as such."""
    lines = page[page.index(sentence) :].split("\n\n")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[int(cell) if cell.isdigit() else cell for cell in row] for row in cells]


def shape_of(config):
    return [config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages]


@pytest.mark.parametrize(
    ("sentence", "dtype"),
    [("GEMM tiles of 16-bit data", torch.bfloat16), ("GEMM tiles of float32", torch.float32)],
)
def test_tile_tables_are_those_of_the_code(sentence, dtype):
    table = table_after(LINEAR, sentence)
    previous = 0
    for limit, *tile in table:
        largest = 10**6 if limit == "any" else limit
        for m in (previous + 1, largest):
            assert shape_of(tiles.gemm_config(m, 4096, 8, dtype)) == tile
        previous = largest
    assert previous == 10**6


def test_one_pass_tiles_are_those_of_the_code():
    (half, *half_tile), (single, *single_tile) = table_after(LINEAR, "One-pass tiles")
    assert (half, single) == ("16-bit", "float32")
    for dtype, tile in ((torch.bfloat16, half_tile), (torch.float16, half_tile), (torch.float32, single_tile)):
        config = tiles.gemm_config(4096, 2 * tile[1], 16, dtype)
        assert config.one_pass and shape_of(config) == tile
        assert not tiles.gemm_config(4096, 2 * tile[1] + 1, 16, dtype).one_pass
    assert not tiles.gemm_config(4096, 64, 17, torch.float32).one_pass


def test_tiles_of_descriptors_are_those_of_the_code():
    known = {torch.bfloat16: {}, torch.float32: {}}
    for name, *shape, where in table_after(LINEAR, "Tiles of descriptors"):
        archs = tuple(10 * int(major) for major in re.findall(r"(\d+)\.0", where))
        ranks = re.search(r"r up to (\d+)", where)
        tile = (shape, archs, int(ranks[1]) if ranks else tiles.LARGEST_RANK, "one-pass" in name, "warps" in name)
        known[torch.float32 if "float32" in where else torch.bfloat16][name] = tile
    for dtype, table in known.items():
        found = tiles.descriptor_tiles(dtype)
        assert table == {
            name: (shape_of(tile), tile.archs, tile.one_pass_rank, tile.one_pass, tile.warp_specialize)
            for name, tile in found.items()
        }


def evaluated(formula, sizes):
    """A sum of products such as 2MNK + 4MKr."""
    products = re.findall(r"(\d+)([MNKCr]+)", formula)
    assert " + ".join(number + letters for number, letters in products) == formula
    return sum(int(number) * math.prod(sizes[letter] for letter in letters) for number, letters in products)


def counting():
    """torch's counter, taught the in-place product, which it leaves out."""
    in_place = {torch.ops.aten.addmm_: lambda own, left, right, **_: 2 * left[0] * left[1] * right[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


@pytest.mark.parametrize("mask_lora", [False, True])
def test_flops_are_those_that_the_reference_backend_spends(mask_lora):
    forward, frozen, full = (row[1].strip("`") for row in table_after(LINEAR, "## FLOPs"))
    sizes = {"M": 12, "N": 20, "K": 28, "r": 4}
    for trained, backward in ((False, frozen), (True, full)):
        tensors = operands(Shape(dropout=False, mask_lora=mask_lora), torch.float32)
        tensors["weight"].requires_grad_(trained)
        with counting() as counter:
            y = atp_kernels.masked_lora_linear(**tensors, scaling=1.0, mask_lora=mask_lora, backend="reference")
        assert counter.get_total_flops() == evaluated(forward, sizes)
        with counting() as counter:
            y.sum().backward()
        assert counter.get_total_flops() == evaluated(backward, sizes)


MLP = Case(((28, 20), (28, 20), (24, 28)), rows=(12,), rank=4, frozen=True)
HEADS = Case(((24, 20), (8, 20), (8, 20)), rows=(12,), rank=4, frozen=True)
BLOCKS = [
    ("swiglu", "Those of three linears", {"C": 28, "N": 24},
     lambda: atp_kernels.masked_lora_swiglu(MLP.x, *MLP.linears())),
    ("qkv", "With N the sum", {"N": 40},
     lambda: torch.cat(atp_kernels.masked_lora_qkv(HEADS.x, *HEADS.linears((1.0,) * 3)), -1)),
]  # fmt: skip


@pytest.mark.parametrize(("room", "sentence", "sizes", "call"), BLOCKS, ids=["swiglu", "qkv"])
def test_flops_of_blocks(room, sentence, sizes, call):
    formulas = [row[1].strip("`") for row in table_after(PAGES[f"atp_kernels/{room}/README.md"], sentence)]
    with counting() as forward:
        y = call()
    with counting() as backward:
        y.sum().backward()
    spent = [forward.get_total_flops(), backward.get_total_flops()]
    assert spent == [evaluated(formula, {"M": 12, "K": 20, "r": 4} | sizes) for formula in formulas]
