"""Broken lines of RMSNorm."""

DEFINITION, OP, ATEN, NATIVE = (f"atp_kernels/norm/{name}.py" for name in ("definition", "op", "aten", "native"))

RMS = "tests/atp_kernels/test_rms_norm.py -k 'reference and no_worse'"
RMS_DTYPES = "tests/atp_kernels/test_rms_norm.py -k other_dtypes"

TABLE = {
    (DEFINITION, RMS): (
        ("wide.square().mean(-1, keepdim=True) + eps", "wide.square().mean(-1, keepdim=True)"),
        ("(weight * normed).to", "normed.to"),
    ),
    (DEFINITION, RMS_DTYPES): (
        ("wide.square().mean(-1, keepdim=True) + eps", "wide.square().sum(-1, keepdim=True) + eps"),
    ),
    (ATEN, RMS): (
        ("(wide.square().mean(1) + eps).rsqrt()", "wide.square().mean(1).rsqrt()"),
        ("(wide.square().mean(1) + eps).rsqrt()", "(wide.square().sum(1) + eps).rsqrt()"),
        ("weight * (wide * scales.unsqueeze(1))", "wide * scales.unsqueeze(1)"),
        ("weight * (wide * scales.unsqueeze(1))", "weight * wide"),
        ("direct = d_y.to(scales.dtype) * weight", "direct = d_y.to(scales.dtype)"),
        ("(direct * wide).mean(1, keepdim=True)", "(direct * wide).sum(1, keepdim=True)"),
        ("mean(1, keepdim=True) * scale.square()", "mean(1, keepdim=True) * scale"),
        ("((direct - wide * pull) * scale)", "(direct * scale)"),
        ("((direct - wide * pull) * scale)", "(direct - wide * pull)"),
        ("(d_y.to(scales.dtype) * x * scales.unsqueeze(1))", "(d_y.to(scales.dtype) * scales.unsqueeze(1))"),
        ("(d_y.to(scales.dtype) * x * scales.unsqueeze(1))", "(d_y.to(scales.dtype) * x)"),
    ),
    (OP, RMS_DTYPES): (("backend, result=dtype)", "backend)"),),
    (NATIVE, RMS_DTYPES): (("if call.result is not None and call.result not in extension.DTYPES:", "if False:"),),
    (NATIVE, "tests/atp_kernels/test_rms_norm.py -k 'native and no_worse'"): (
        ("x if dtype == torch.bfloat16 else x.to(dtype)", "x"),
    ),
}
