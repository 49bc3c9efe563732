"""What a finished run must have kept: a figure that is no number is never within its limit."""

import copy
import math

import pytest

from atp.ground.errors import NotReached
from atp.inputs.promises import check_promises

# fmt: off
KEPT = {
    "certificate": {"masked_vs_cut": 3e-7, "cut_vs_reloaded": 0.0, "removed_lora_norm": 0.0, "merge_error": 0.9,
                    "rounding_gap": 2e-7, "dtype": "float32"},
    "keep_decoder": 0.6001,
    "target_keep": 0.6,
    "perplexity": {"original": 20.0, "final": 15.0},
    "speed": {"final": {"prefill_tokens_per_second": 1000.0}},
    "train_tokens_per_second": {"tune": 500.0},
    "qa": {"final": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}},
}
# fmt: on


def with_value(path, value):
    changed = copy.deepcopy(KEPT)
    *parents, last = path
    place = changed
    for key in parents:
        place = place[key]
    place[last] = value
    return changed


def test_a_run_that_kept_everything_passes():
    check_promises(KEPT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        ("certificate", "masked_vs_cut"), ("certificate", "cut_vs_reloaded"), ("certificate", "removed_lora_norm"),
        ("certificate", "merge_error"), ("certificate", "rounding_gap"),
        ("keep_decoder",), ("perplexity", "final"), ("perplexity", "original"),
        ("speed", "final", "prefill_tokens_per_second"), ("train_tokens_per_second", "tune"),
        ("qa", "final", "accuracy_interval", 1),
    ],
)  # fmt: skip
def test_no_figure_passes_that_is_not_finite(path, value):
    with pytest.raises(NotReached, match=str(path[-2] if isinstance(path[-1], int) else path[-1])):
        check_promises(with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("certificate", "masked_vs_cut"), 0.01), (("certificate", "cut_vs_reloaded"), 0.01),
        (("certificate", "merge_error"), 1.5),
        (("certificate", "removed_lora_norm"), 1e-9), (("keep_decoder",), 0.61), (("keep_decoder",), 0.59),
    ],
)  # fmt: skip
def test_a_missed_promise_is_named(path, value):
    with pytest.raises(NotReached, match="budget" if path == ("keep_decoder",) else path[-1]):
        check_promises(with_value(path, value))
