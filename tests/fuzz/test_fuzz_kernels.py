"""A slice of the random kernel calls, and that the harness notices what it is there for."""

from collections import Counter

import fuzz_kernels
import pytest
import torch
from kernel_cases import CALLS

import atp_kernels


def test_calls_are_equal_to_their_definitions_or_refused_in_a_sentence():
    outcomes = Counter(fuzz_kernels.run_case(number) for number in range(400))
    assert {f"{name}: equal" for name in CALLS} <= outcomes.keys()
    assert {name.split(": ")[1] for name in outcomes} == {"equal", "accepted", "refused"}


@pytest.mark.parametrize("wrong", [1.0, torch.nan])
def test_a_wrong_result_is_a_failure(wrong, monkeypatch):
    rms_norm = atp_kernels.rms_norm
    monkeypatch.setattr(atp_kernels, "rms_norm", lambda *given, **named: rms_norm(*given, **named) + wrong)
    failed = []
    for number in range(100):
        try:
            fuzz_kernels.run_case(number)
        except AssertionError as error:
            failed.append(str(error))
    assert failed and all("rms_norm, result" in message for message in failed)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch, got 3"), ValueError("x.\nAnd y."), KeyError("x")])
def test_anything_but_a_sentence_is_a_failure(error, monkeypatch):
    def refuse(*given, **named):
        raise error

    for name in ("masked_lora_linear", "kept_lora_linear", "rms_norm", "lora_dropout"):
        monkeypatch.setattr(atp_kernels, name, refuse)
    failed = 0
    for number in range(40):
        try:
            fuzz_kernels.run_case(number)
        except (AssertionError, KeyError):
            failed += 1
    assert 0 < failed < 40
