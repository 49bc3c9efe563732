"""Draw settings that a config may have, run them on a tiny model, and see that nothing but a sentence stops them.

    python tests/fuzz/fuzz_runs.py                          cases 0 to 39
    python tests/fuzz/fuzz_runs.py --cases 200 --seed 3     others
    python tests/fuzz/fuzz_runs.py --seed 3 --case 17       one case, with its settings and its traceback

A case is a function of seed and number. What holds in each:

* `atp plan` refuses what `atp train` refuses before its first step, in one sentence, and nothing else.
* A run ends, though on a model this small it may miss a promise, and its report and its line in `atp runs` are written.
* A run that stops after a checkpoint and goes on leaves the same bytes.
* A target of a sweep is the run of its own, bit for bit, or a comparison of two methods ends.

Exit status 1 when one does not.
"""

from __future__ import annotations

import contextlib
import io
import json
import random

import pytest
from fuzz_draws import play
from tiny_command import results, start, stopping_at
from tiny_inputs import tiny_config

from atp.baselines.methods import BASELINES
from atp.config import ATPConfig
from atp.ground.errors import InputError, NotReached
from atp.ground.listing import runs_below
from atp.inputs.checks import check_reachable
from atp.plan import make_plan
from atp.report import write_report
from atp.studies.compare import Comparison
from atp.studies.sweep import Sweep
from atp.studies.sweep.units import UNITS
from atp.training.loop import Loop

MODELS = [
    {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"attention_bias": True, "mlp_bias": True},
    {"tie_word_embeddings": False}, {"hidden_size": 64, "head_dim": 8}, {"num_hidden_layers": 3},
]  # fmt: skip
VALUES = {
    "model": {"dtype": ["auto", "float32", "bfloat16", "float16"], "load_in": [None, None, None, "8bit"]},
    "data": {
        "packing": ["joined", "separate", "fitted", "padded"], "loss_on": ["all", "completion", "assistant"],
        "length": [16, 24], "general_share": [0, None],
    },
    "decisions": {
        "space": ["kv_group", "kv_group", "head_dim", "disp"], "target_keep": [0.35, 0.5, 0.6, 0.8],
        "source": [None, "static", "tuned", "running", "learned"], "decay": [0, 0.97], "margin": [0, 0.1],
        "generator": ["transformer", "gru", "free"], "init": ["paper", "saliency"], "budget": ["penalty", "exact"],
        "every": [1, 2, 3], "batch_size": [1, 2], "reach": [0, 0.4, 1], "saliency_windows": [1, 2, 4],
        "refit_windows": [0, 1, 4, 96], "rounds": [None, None, 1, 2], "cost_exponent": [0, 0.5, 1],
        "uniform": [False, False, True], "multiples": [None, {}, {"mlp": 8}, {"mlp": 8, "kv_group": 2}],
    },
    "lora": {"r": [1, 4, 16], "dropout": [0, 0, 0.2]},
    "training": {
        "open": [None, 0, 2, 4], "search": [0, 0, 2, 3], "settle": [0, 1, 2], "tune": [1, 3, 5], "batch_size": [1, 2],
        "gradient_accumulation": [1, 1, 2], "schedule": ["constant", "linear", "cosine"],
        "warmup": [0, 1, 20], "regularizer": ["lasso", "l0"], "precision": ["float32", "bfloat16"],
        "gradient_checkpointing": [False, True], "offload": [False, False, True], "save_every": [1, 2, 50],
        "keep_checkpoints": [1, 2], "log_every": [1, 2, 7], "keep_best": [False, True], "patience": [None, None, 1],
        "update_clipping": [None, False, True],
    },
    "evaluation": {
        "every": [None, 1, 3], "validation_windows": [None, 1], "generate": [False, True], "answers": [False, True],
        "samples": [0, 1], "dense_baseline": [False, True],
    },
}  # fmt: skip
"""Section -> key -> values that are drawn from; each may be refused in some company."""


def settings(draw, folder):
    """(config, what was drawn): the tiny model and data, written to the folder, under settings at random."""
    config = tiny_config(folder, **draw.choice(MODELS)).model_dump(mode="json")
    config["evaluation"] |= {"windows": 4, "questions": draw.choice((0, 2)), "dense_baseline": False}
    config["export"]["keep_adapter"] = True
    drawn, share = {}, draw.choice((0.15, 0.3, 0.6))
    for section, keys in VALUES.items():
        drawn[section] = {key: draw.choice(values) for key, values in keys.items() if draw.random() < share}
        config[section] |= drawn[section]
    if config["evaluation"]["every"] is None:
        config["training"] |= {"keep_best": False, "patience": None}
    return config, drawn


def sentence_or(work):
    """What it returns, or the sentence that it raises; a missed promise is the run's end, not its failure."""
    try:
        return work()
    except InputError as error:
        return str(error)
    except NotReached:
        return None


def run_case(seed, number, folder):
    """`refused` or the last thing that the case did; raises what no settings may raise."""
    draw = random.Random(f"runs {1000 * seed + number}")
    inputs = folder / "inputs"
    inputs.mkdir()
    values, drawn = settings(draw, inputs)
    with told(drawn):
        config = sentence_or(lambda: ATPConfig.parse(values))
        if isinstance(config, str):
            return "refused"
        planned = sentence_or(lambda: make_plan(config))
        whole, again = folder / "whole", folder / "again"
        trained = sentence_or(lambda: start(config, whole))
        assert isinstance(planned, str) == isinstance(trained, str), f"plan: {planned}; train: {trained}"
        if isinstance(trained, str):
            assert planned == trained and not whole.exists(), f"plan: {planned}; train: {trained}"
            return "refused"
        write_report(whole)
        stopped(config, again, draw.randrange(1, 5))
        sentence_or(lambda: start(config, again, resume=(again / "config.yaml").exists()))
        assert len(runs_below(folder)) == 2 and results(again) == results(whole), "a resumed run left other bytes"
        return swept(config, whole, folder) if draw.random() < 0.5 else compared(config, folder, draw)


@contextlib.contextmanager
def told(drawn):
    try:
        yield
    except BaseException as error:
        error.add_note(f"settings: {json.dumps(drawn)}")
        raise


def stopped(config, folder, checkpoints):
    """A run that ends as if killed after so many checkpoints; one with fewer ends by itself."""
    seen = iter(range(checkpoints - 1, -1, -1))
    with contextlib.suppress(NotReached), contextlib.suppress(pytest.fail.Exception):  # it was not stopped
        with stopping_at(Loop, "write", after=True, when=lambda *_, **__: next(seen, 1) == 0):
            start(config, folder)


def swept(config, whole, folder):
    target = config.decisions.target_keep
    targets = [one for unit in UNITS if unit.option == "keep" for one in unit.parse(f"0.75,{target}")]
    sentence_or(Sweep(config, targets, folder / "swept", resume=False, command="atp train").execute)
    assert results(folder / "swept" / f"keep-{target}") == results(whole), "a target is not the run of its own"
    return "swept"


def compared(config, folder, draw):
    """A comparison of two methods, which may be refused before it starts."""
    methods = draw.sample(["atp", *BASELINES], 2)
    comparison = Comparison(config, methods, [0], folder / "compared", resume=False, command="atp compare")
    return "compared" if not isinstance(sentence_or(comparison.execute), str) else "compared: refused"


def widen_budget(patch):
    """On the tiny model a channel is more than the real tolerance of a budget, which has two places."""
    patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.05)
    patch.setattr(check_reachable, "__defaults__", (0.05,))


@contextlib.contextmanager
def silently():
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        widen_budget(patch)
        with contextlib.redirect_stderr(io.StringIO()):
            yield


if __name__ == "__main__":
    play(__doc__, run_case, silently)
