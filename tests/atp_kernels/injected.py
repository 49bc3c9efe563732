"""What a child process is given to do in tests: it works, crashes, hangs, fails or is wrong, as its job says."""

import os
import time

import torch

from atp_kernels.linear import aten, ways
from atp_kernels.selftest import cases
from atp_kernels.tuning import apart
from atp_kernels.tuning import candidates as tuned

OPERATIONS = ("rms_norm", "compact", "group_prox_", "masked_lora_qkv", "masked_lora_swiglu", "rotary_embedding")


def behaves(job, note):
    """The end that a job asks for, after a note of it."""
    note(job)
    if job == "crashes":
        os.abort()
    if job == "hangs":
        time.sleep(600)
    if job == "raises":
        raise ValueError("no\nmore")
    if job == "exits":
        print("the last words")
        os._exit(3)
    if job == "hangs at its end":
        os.closerange(3, 64)
        time.sleep(600)
    print("what a library prints")
    return {"pid": os.getpid(), "tables": os.environ.get("ATP_KERNELS_TABLES")}


def operations_fail(job, note):
    """The self-test of some operations, most of which fail in ways of their own."""
    op = job.get("op")
    if op is None:
        return list(OPERATIONS)
    if op == "rms_norm":
        behaves("crashes", note)
    if op == "compact":
        behaves("hangs", note)
    if op == "group_prox_":
        behaves("raises", note)
    if op == "masked_lora_qkv":
        right = cases.masked_lora_qkv
        cases.masked_lora_qkv = lambda *a, **options: tuple(1.01 * part for part in right(*a, **options))
    if op == "masked_lora_swiglu":
        right_mlp = cases.masked_lora_swiglu
        cases.masked_lora_swiglu = lambda *a, **options: right_mlp(*a, **options) * torch.tensor(float("nan"))
    return cases.tested(job, note)


def no_device(job, note):
    """As where the GPU is another process's alone."""
    raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")


def no_memory(job, note):
    """As where another process has the GPU's memory."""
    if "op" not in job:
        return ["compact"]

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    cases.compact = full
    return cases.tested(job, note)


def tunes(job, note):
    """Tuning with candidates that crash, hang, or crash when they are timed, and a folded product that is wrong."""
    right, listed, calls = tuned.linear_by, tuned.candidates, []

    def linear_by(way, operands, scaling, mask_lora):
        if way.name in ("crashes", "hangs"):
            behaves(way.name, lambda at: None)
        if way.name == "crashes late":
            calls.append(way.name)
            if len(calls) == 3:  # after the check, and the call that compiles
                os.abort()
            way = way._replace(module=aten)
        return right(way, operands, scaling * (1.01 if way.name == "folded" else 1.0), mask_lora)

    more = [tuned.Candidate(name, ways.Way(name, "")) for name in ("crashes", "hangs", "crashes late")]
    tuned.linear_by, apart.candidates = linear_by, lambda case: [*listed(case), *more]
    try:
        return apart.served(job, note)
    finally:
        tuned.linear_by = right
