"""Broken lines of packed linears, and of the blocks that are made of them."""

PACK, OP, NATIVE = "atp_kernels/packed/__init__.py", "atp_kernels/packed/op.py", "csrc/cpu/packed.cpp"
ATTENTION, ROWS = "csrc/cpu/attention.cpp", "csrc/cpu/attention_impl.h"

TESTS = "tests/atp_kernels/test_packed.py"
LINEARS = f"{TESTS} -k 'one_input or extreme'"
MLP = f"{TESTS} -k gated"
HEADS = f"{TESTS} -k attention"
AROUND = f"{TESTS} -k residual"
STALE = f"{TESTS} -k 'anew or held or refused'"

TABLE = {
    (PACK, STALE): (
        ("p.weight._version == version and", "True and"),
        ("and len(p.lora_a) == rank", ""),
    ),
    (OP, MLP): (("need_x, ctx.sums, *around", "need_x, None, *around"),),
    (OP, HEADS): (("                total += part", "                pass"),),
    (NATIVE, STALE): (("  pack.load();", "  if (x.size(0) > 1000) pack.load();"),),
    (NATIVE, LINEARS): (
        ("static_cast<float>(scaling), to_down", "1.0f, to_down"),
        ("static_cast<float>(pack.scaling), a + at", "1.0f, a + at"),
        ("(place.row + row) * width() + layout.inputs + place.rank;", "(place.row + row) * width() + layout.inputs;"),
        ("(place.row + row) * whole.ranks + place.rank,", "(place.row + row) * whole.ranks,"),
        ("value != value ? 0x7fc0u : even", "even"),
        ("bits + 0x7fffu + ((bits >> 16) & 1u)", "bits"),
        ("return product(d_s, down, x_of(d_wide));", "return product(d_s, down);"),
        ("return bias.has_value() ? product(wide, transposed(weight), *bias) :", "return"),
    ),
    (NATIVE, MLP): (
        (
            "swiglu_into(gate, up, packs.last.x_of(hidden), gelu);\n  packs",
            "swiglu_into(up, gate, packs.last.x_of(hidden), gelu);\n  packs",
        ),
        ("    copy_rows(s, packs.last.s_of(hidden));", "    copy_rows(s, s);"),
    ),
    (NATIVE, AROUND): (
        ("to[i] = stream[i] + widened(added[i]);", "to[i] = widened(added[i]);"),
        ("to[i] += passed[i];", "to[i] += 0.0f;"),
    ),
    (ATTENTION, HEADS): (
        ("+ head % shared()) * tokens", ") * tokens"),
        ("at = (angles.each ? row : t) * dim;\n      const", "at = t * dim;\n      const"),
        ("mask_stride = mask->size(0) == 1 ? 0 :", "mask_stride = true ? 0 :"),
        ("const int64_t b = begin + row / each,", "const int64_t b = row / each,"),
        ("from = begin * shape.groups;", "from = 0 * begin;"),
        (
            "q + shape.query(b, head, t) * dim, angles.cos + at, angles.sin + at, dim / 2, factor, d);",
            "q + shape.query(b, head, t) * dim, angles.cos + at, angles.sin + at, dim / 2, 1.0f, d);",
        ),
    ),
    (ROWS, HEADS): (
        ("- other * load_some(sin + i, count);", "+ other * load_some(sin + i, count);"),
        ("+ other * load_some(sin + half + i, count);", "- other * load_some(sin + half + i, count);"),
        ("is_seen ? scores[col] * scale : least", "scores[col] * scale"),
        ("(load_some(d_p + at, count) - mean)", "load_some(d_p + at, count)"),
    ),
}
