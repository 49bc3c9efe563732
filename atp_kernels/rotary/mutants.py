"""Broken lines of the rotary embedding."""

DEFINITION, OP, ATEN, TRITON = (f"atp_kernels/rotary/{name}.py" for name in ("definition", "op", "aten", "triton"))

TESTS = "tests/atp_kernels/test_rotary.py"
TRANSFORMERS = f"{TESTS} -k transformers"
ROUNDED = f"{TESTS} -k rounded_once"
LAYOUT = "tests/atp_kernels/test_strides.py -k 'rotary and triton'"
SHAPES = f"{TESTS} -k any_shape"
UNWRITTEN = "tests/atp_kernels/test_passes.py -k 'bits_repeat and rotary'"
FAR = f"{TESTS} -k two_to_the_31"
ALONE = f"{TESTS} -k one_of_both"

TABLE = {
    (DEFINITION, TRANSFORMERS): (("torch.cat((-second, first), -1)", "torch.cat((second, first), -1)"),),
    (DEFINITION, ROUNDED): (("wide = x.to(torch.promote_types(x.dtype, torch.float32))", "wide = x"),),
    (OP, ALONE): (
        ("needs = ctx.needs_input_grad[1:3]", "needs = (True, True)"),
        ("zip(grads, needs, strict=True) if need]", "zip(grads, needs, strict=True)]"),
    ),
    (ATEN, ROUNDED): (
        ("[-half for half in reversed(sin.chunk(2, -1))]", "[-half for half in sin.chunk(2, -1)]"),
        ("[-half for half in reversed(sin.chunk(2, -1))]", "[half for half in reversed(sin.chunk(2, -1))]"),
        ("grad[..., :size].transpose(1, 2)", "grad[..., -size:].transpose(1, 2)"),
    ),
    (TRITON, ROUNDED): (
        ("x1 * cos1 - x2 * sin1", "x1 * cos1 + x2 * sin1"),
        ("x2 * cos2 + x1 * sin2", "x2 * cos1 + x1 * sin2"),
        ("sin1, sin2 = -sin2, -sin1", "sin1, sin2 = -sin1, -sin2"),
        ("at2 = tl.load(index_ptr + half + d,", "at2 = tl.load(index_ptr + d,"),
        ("at1, at2 = d, half + d", "at1, at2 = d, d"),
    ),
    (TRITON, SHAPES): (
        ("(tl.program_id(0) // blocks)", "(tl.program_id(0) * 0)"),
        ("tl.program_id(1).to(tl.int64) * HEADS", "tl.program_id(1).to(tl.int64)"),
    ),
    (TRITON, LAYOUT): (
        ("tensor if tensor.stride(-1) == 1 or", "tensor if True or"),
        ("b * sin_b + (t * sin_t)", "b * sin_b + (t * cos_t)"),
        ("b * q_b + h * q_h + (t * q_t)", "b * q_b + h * q_h + (t * k_t)"),
        ("(h - heads) * k_h + (t * k_t)", "h * k_h + (t * k_t)"),
    ),
    (TRITON, UNWRITTEN): (("(z < beyond)[None, :]", "(z < 1)[None, :]"),),
    (TRITON, FAR): (("first = tl.program_id(1).to(tl.int64) * HEADS", "first = tl.program_id(1) * HEADS"),),
}
