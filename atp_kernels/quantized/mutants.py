"""Broken lines of a quantised weight: what it holds, what is made of it, and what it refuses.

That an NF4 weight is made contiguous, and that an empty one is not given to bitsandbytes, have no entries: on a CPU it
takes both.
"""

WEIGHT = "atp_kernels/quantized/weight.py"

ITSELF = "tests/atp_kernels/test_quantized.py -k 'not test_linear and not mlp and not kept_slice and not outlives'"
OPERATIONS = "tests/atp_kernels/test_quantized.py -k 'functional_linear or lives_in_a_module or refuse'"

TABLE = {
    (WEIGHT, ITSELF): (
        ("if weight.shape[1] % BLOCK:", "if False:"),
        ("if given.dtype == torch.float64:", "if False:"),
        ("values.abs().amax(over, keepdim=True)", "values.abs().amax(1, keepdim=True)"),
        ("torch.where(scale == 0, 1, scale)", "scale"),
        (".clamp_(-_LARGEST[dtype], _LARGEST[dtype])", ""),
        ("shares.round_() if dtype == torch.int8 else shares", "shares"),
        ("or state.blocksize != BLOCK or", "or"),
        ("or state.shape[-1] % BLOCK:", ":"),
        ('if getattr(state, "packing_format_for_cpu", False):', "if False:"),
        ("if state.nested:", "if False:"),
        (" + state.offset", ""),
        (
            "return (self.codes, self.scale) if self.columns is None",
            "return (self.codes, self.scale) if True",
        ),
        ("values = values.to(self.source)", "pass"),
        ("values = select(", "_ = select("),
        ("return values.to(self.dtype)", "return values"),
        ("self.source if self.source in _DIRECT else torch.float32", "self.source"),
        ("codes.reshape(-1, 1)", "codes"),
        ("scale if scale.shape[0] != self.shape[0] else scale.index_select(0, rows)", "scale.index_select(0, rows)"),
        ("scale if scale.shape[0] != self.shape[0] else scale.index_select(0, rows)", "scale"),
        ("columns is not None and self.columns is not None:", "False:"),
        ("self.columns if columns is None else columns)", "columns)"),
        ("self.source, dtype or self.dtype)", "self.source, self.dtype)"),
        ('["codes", "scale"] if self.columns is None else', '["codes", "scale"] if True else'),
        ("return weight._map(torch.clone)", "return weight._map(lambda part: part)"),
        ('lambda part: part.to(**where) if where else part, kwargs.get("dtype"))', "lambda part: part)"),
        ("weight.ndim != 2 or", ""),
        ("not weight.is_floating_point() or isinstance(weight, QuantizedWeight)", "not weight.is_floating_point()"),
    ),
    (WEIGHT, OPERATIONS): (
        ("if torch.compiler.is_compiling():", "if False:"),
        ("if weight.requires_grad:", "if False:"),
        ("refuse_training(weight)\n    device", "device"),
        ("if torch.is_autocast_enabled(device):", "if False:"),
        ("rows.sum(0) if need_bias else None", "None"),
        (".view(ctx.shape) if need_x", " if need_x"),
    ),
}
