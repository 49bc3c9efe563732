"""Broken lines of the self-test: of what it compares, of what it keeps, and of what calls make of it."""

CALL = "atp_kernels/call.py"
CASES = "atp_kernels/selftest/cases.py"
RESULTS = "atp_kernels/selftest/results.py"
SELFTEST = "atp_kernels/selftest/__init__.py"
TILED = "atp_kernels/tuning/tiled.py"

FOUND = (
    "tests/atp_kernels/test_selftest.py -k 'gradient or in_a_result or written_in_place or right_here or same_kernels'"
)
KEPT = "tests/atp_kernels/test_selftest.py -k 'damaged or version_changes or tables_are_off or failure_is_known'"
TAKEN = "tests/atp_kernels/test_selftest.py -k 'made_before or same_kernels or tuned_table or reference_itself'"

TABLE = {
    (CASES, FOUND): (
        ("for sizes in SIZES:", "for sizes in SIZES[:1]:"),
        ("for dtype in DTYPES:", "for dtype in DTYPES[:1]:"),
        ("if not error <= allowed:", "if error < 0:"),
        ("ALLOWED = 4.0", "ALLOWED = 4e9"),
        ("ROUNDINGS = 4.0", "ROUNDINGS = 4e9"),
        ("exact = _computed(case, case.definition, _wide(", "exact = _computed(case, case.call, _wide("),
        ('found |= {f"the gradient of', 'found = {f"the gradient of'),
        ("(*learn, *more),\n        )\n\n\ndef _kept_linears", "learn,\n        )\n\n\ndef _kept_linears"),
        ('t["first_before"], t["second_before"]\n\n    def', 't["first_before"], t["first_before"]\n\n    def'),
    ),
    (RESULTS, KEPT): (
        ("content != header(device) or", ""),
        ('"torch": torch.__version__,', ""),
        ('"triton": triton_runtime.VERSION,', ""),
        ('"kernels": _kernels(),', ""),
        ("or found.keys() != OPERATIONS.keys()", ""),
        ("found if all(map(_is_sound, found.values())) else None", "found"),
        ("and (problem is None or isinstance(problem, str))", ""),
        ("0 <= value < math.inf", "True"),
        (" or str(place) == os.devnull", ""),
    ),
    (SELFTEST, KEPT): (("None if fresh else results.read(device)", "results.read(device)"),),
    (SELFTEST, TAKEN): (
        ("call.set_aside(device.type, reasons)", "pass"),
        ('"" if outcome.backend == "reference" else', ""),
    ),
    (CALL, TAKEN): (
        ("        del _SET_ASIDE[key]\n", "        pass\n"),
        ('if aside is not None and name != "reference":', "if False:"),
        ("return OPERATIONS[op].computed_by or op", "return op"),
        ("_SET_ASIDE.setdefault((_computed_by(op), device_type), why)\n    _select.cache_clear()",
         "_SET_ASIDE.setdefault((_computed_by(op), device_type), why)"),
    ),
    (TILED, TAKEN): (('if name != "reference" and why_aside(operation, device.type) is not None:', "if False:"),),
}  # fmt: skip
