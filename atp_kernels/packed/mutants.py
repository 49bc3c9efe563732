"""Broken lines of packed linears."""

PACK, OP, NATIVE = "atp_kernels/packed/__init__.py", "atp_kernels/packed/op.py", "csrc/cpu/packed.cpp"

TESTS = "tests/atp_kernels/test_packed.py"
LINEARS = f"{TESTS} -k 'one_input or extreme'"
MLP = f"{TESTS} -k gated"
STALE = f"{TESTS} -k 'anew or held or refused'"

TABLE = {
    (PACK, LINEARS): (
        ("return torch.addmm(d_x, d_s, self.down) if", "return d_x if"),
        ("if self.bias is None else torch.addmm(self.bias,", "if True else torch.addmm(self.bias,"),
    ),
    (PACK, STALE): (
        ("p.weight._version == version and", "True and"),
        ("and len(p.lora_a) == rank", ""),
    ),
    (OP, MLP): (
        ("(ctx.between.gated(ctx.activation, gate, up), s)", "(gate, s)"),
        ("sums=ctx.sums)", "sums=None)"),
    ),
    (OP, STALE): (("        packed.load(factors)", "        packed.down.numel() or packed.load(factors)"),),
    (NATIVE, LINEARS): (
        ("static_cast<float>(scaling), to_down", "1.0f, to_down"),
        ("static_cast<float>(scaling), a + at", "1.0f, a + at"),
        ("(place.row + row) * width + whole.inputs + place.rank;", "(place.row + row) * width + whole.inputs;"),
        ("(place.row + row) * whole.ranks + place.rank,", "(place.row + row) * whole.ranks,"),
        ("value != value ? 0x7fc0u : even", "even"),
        ("bits + 0x7fffu + ((bits >> 16) & 1u)", "bits"),
    ),
}
