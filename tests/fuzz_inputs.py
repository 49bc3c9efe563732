"""Feed the program broken input and see that it answers in one short sentence.

    python tests/fuzz_inputs.py                      all kinds, 5,000 cases
    python tests/fuzz_inputs.py --kinds csv parquet  some of them
    python tests/fuzz_inputs.py --scale 0.1          a tenth of the cases
    python tests/fuzz_inputs.py --case csv 17        one case, with its traceback

A case is a function of its kind and number alone. It may succeed, or raise `InputError` with a message of at most
LONGEST printable characters on one line, within SECONDS of processor time. Anything else is a failure. Exit status 1
when there is one.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a broken name must not be looked for

import pyarrow
import pyarrow.parquet
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from atp.checks import check_reachable
from atp.config import ATPConfig
from atp.data import DataSettings, chat_of, load_recipe, pack, read_examples
from atp.errors import InputError
from atp.experiments.spec import ExperimentSpec
from atp.report import write_report

SECONDS, WAITED = 5.0, 60.0  # of work, and of waiting for something or for a busy machine
LONGEST = 999  # a whole message is cut at 1,000: whatever it quotes must have been cut before

CONFIG = {
    "model": {"path": "some-model", "gguf_file": None, "dtype": "float32"},
    "output_dir": "runs/x",
    "preset": "quick",
    "seed": 3,
    "data": {"recipe": "custom", "train": "data.jsonl", "labels": ["yes", "no"], "length": 64, "limit": 20,
             "sources": {"mednli": "a.jsonl"}, "general_share": 0.0},
    "decisions": {"space": "head_dim", "target_keep": 0.6, "multiples": {"mlp": 8}, "init": "saliency"},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "training": {"search": 5, "settle": 2, "tune": 3, "lr": 1e-3, "report_to": [], "schedule": "cosine"},
    "evaluation": {"windows": 5, "generate": False},
}  # fmt: skip
EXPERIMENT = {
    "question": "Which?", "base": "base.yaml", "domains": ["custom", "health-mini"], "seeds": [0, 1],
    "arms": [{"method": "dense_lora"}, {"method": ["atp", "static"], "set": {"lora.r": 4},
                                        "vary": {"decisions.target_keep": [0.6, 0.8]}}],
    "picture": "curve", "x": "decisions.target_keep",
}  # fmt: skip
ROWS = {
    "text": [{"text": f"plain text number {n} about nothing"} for n in range(12)],
    "prompt": [{"prompt": f"is {n} odd?", "completion": " yes" if n % 2 else " no"} for n in range(12)],
    "premise": [{"premise": f"fact {n}", "hypothesis": "so it is", "label": "neutral"} for n in range(12)],
    "messages": [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "hi"}]}
        for n in range(12)
    ],
}
SCORES = {
    name: {"perplexity": 20.5, "perplexity_interval": [19.0, 22.0], "size": {"params": 1000, "megabytes": 4.0},
           "speed": {"prefill_tokens_per_second": 10.5, "decode_tokens_per_second": 2.0},
           "tasks": {"qa": {"accuracy": 0.5, "macro_f1": 0.4, "macro_f1_interval": [0.3, 0.5]}}}
    for name in ("original", "tuned_dense", "final")
}  # fmt: skip
MAJORITY = {"qa": {"label": "yes", "of": "train", "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "macro_f1": 0.3}}
RUN = {
    "summary.json": {
        "target_keep": 0.6, "keep_decoder": 0.6, "keep_total": 0.7, "params_before": 1000, "params_after": 700,
        "perplexity": {name: 20.5 for name in SCORES}, "perplexity_interval": {name: [19.0, 22.0] for name in SCORES},
        "tasks": ["qa"], "qa": {name: scores["tasks"]["qa"] for name, scores in SCORES.items()},
        "relative_performance": 0.9, "relative_performance_interval": [0.8, 1.0],
        "not_measurable": {"qa accuracy": "it is low"}, "majority": MAJORITY,
        "recorded_dense": {"command": "atp demo", "perplexity": 16.5, "tasks": {"qa": {"accuracy": 0.5}}},
        "answers": {"prompt": "is it?", "truth": "yes", "models": {"original": "no", "final": "yes"}, "chosen": "So."},
        "speed": {name: SCORES[name]["speed"] for name in ("original", "final")},
        "megabytes": {"original": 4.0, "final": 3.0}, "train_tokens_per_second": {"search": 5.0, "tune": 6.0},
        "seconds": {"search": 1.0, "tune": 2.0, "total": 4.0}, "seed": 7, "versions": {"torch": "2"}, "command": "atp",
        "data": {"train": "0a1b", "description": "texts"},
    },
    "evaluation.json": SCORES | {"majority": MAJORITY},
    "certificate.json": {"masked_vs_cut": 2e-6, "cut_vs_reloaded": 0.0, "removed_lora_norm": 0.0, "dtype": "float32"},
    "decisions.json": {
        "space": "head_dim", "sizes": {"qk": 4, "mlp": 6},
        "layers": [{"qk": [0, 1], "mlp": [2, 3, 4]}, {"qk": [3], "mlp": [0, 5]}],
    },
}  # fmt: skip
ODD_VALUES = [
    None, True, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 10**30, -(10**400), "", " ", "x" * 5000, "\ud800", "\0",
    "\x1b[31m", "<b>&`|[/red]", "é😀", [], {}, [[]], [None], {"a": {"b": {"c": [1, 2, {}]}}}, {"": ""}, ["x"] * 300,
    "2024-99-99", "~nobody-here/x.jsonl", "../../x", "/", "$\\frac$", {"train": 1}, [0.1, "a", None], "1e999", "0x1F",
]  # fmt: skip
GOOD_VALUES = [1, 2, 16, 0.5, 0.25, True, False, None, "cosine", "kv_group", "a.jsonl", ["a", "b"], {"mlp": 4}]
ODD_KEYS = ["", "lr", "learning_rate", "x" * 3000, "a.b", "\0", "rank", "__class__", "model_config", "é", "0", " "]
ODD_YAML = [
    "&a ", "*a", "&a [*a, *a]", "!!int abc", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x", "2024-99-99",
    "!!binary '*'", "!!set {a}", "!!python/object/apply:os.getcwd []", "!!omap [a: 1]", "9" * 5000, "[" * 300,
    "{" * 300, "{a: " * 80, "- " * 80, "? ", ": ", "\n", "\t", "  ", "\0", '"\\ud800"', '"\\UFFFFFFFF"', "<<: {a: 1}",
    "<<: 3", "%YAML 9.9\n", "---\n", "...\n", "|", ">", "'", '"', "#", "~", ".inf", ".nan", "1e999", "0b", "0o9",
    "1:60", "=", "\ufeff", "\x85", "\u2028", "!", "!!", "!<", "@", "`", ",", "]", "}", "null", "true", "x" * 5000,
]  # fmt: skip
ODD_JSON = [
    "NaN", "Infinity", "-Infinity", "9" * 5000, "[" * 5000, '{"a":' * 3000, '"\\ud800"', '"\\udc00\\ud800"', "null",
    "\0", "\ufeff", "'", '"', "\\", ",", "}", "]", "\n", "1e999", '"\\u0000"', "[]", "{}", '{"text": 1}', "x" * 200_000,
]  # fmt: skip
ODD_CSV = [
    '"', '""', ",", "\n", "\r", "\r\n", ";", "\t", "\0", "x" * 200_000, "\ufeff", '"\n', ",,,,", "'", "é", "\x1a",
]  # fmt: skip
SHAPES = LlamaConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip


class TooSlow(BaseException):
    """A case took longer than SECONDS, or WAITED longer than that."""


@functools.cache
def tokenizer():
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(["</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def places(value, path=()):
    """Paths of everything inside nested dictionaries and lists, the whole among them."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def rebuilt(draw, value, times):
    """The value with some of its parts replaced, removed, renamed or moved."""
    for _ in range(times):
        value = _changed(draw, value, draw.choice(list(places(value))))
    return value


def _changed(draw, value, path):
    if not path:
        return value if draw.random() < 0.9 else draw.choice(ODD_VALUES)
    copy = value.copy()
    key, *rest = path
    if rest:
        copy[key] = _changed(draw, value[key], rest)
    elif (what := draw.random()) < 0.6:
        copy[key] = draw.choice(ODD_VALUES)
    elif what < 0.7:
        del copy[key]
    elif isinstance(copy, dict):
        copy[draw.choice(ODD_KEYS)] = copy[key] if what < 0.85 else draw.choice(ODD_VALUES)
    else:
        copy.insert(key, draw.choice(ODD_VALUES))
    return copy


def scrambled(draw, text, odd, times):
    """The text with pieces cut out, doubled, moved, and odd ones put in."""
    for _ in range(times):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((1, 1, 2, 5, 20, 100)))
        piece = text[start:end]
        what = draw.random()
        if what < 0.5:
            text = text[:start] + draw.choice(odd) + text[start if what < 0.3 else end :]
        elif what < 0.7:
            text = text[:start] + text[end:]
        elif what < 0.8:
            text = text[:end] + piece + text[end:]
        elif what < 0.9:
            text = text[:start] + text[end:] + piece
        else:
            text = text[:start] + chr(draw.choice((0, 9, 10, 13, 27, 127, 0xA0, 0x2028, 0x1F600))) + text[end:]
    return text


def garbled(draw, content, times):
    """The bytes with some of them changed, cut off or doubled."""
    content = bytearray(content)
    for _ in range(times):
        place = draw.randrange(len(content) + 1)
        what = draw.random()
        if what < 0.75 and place < len(content):
            content[place] = draw.randrange(256)
        elif what < 0.85:
            del content[place : place + draw.choice((1, 4, 64))]
        elif what < 0.93:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 16))))
        else:
            del content[place:]
    return bytes(content)


def as_yaml(draw, values, times):
    """Bytes of a YAML text of the values, odd in its values, its text or its bytes."""
    values = rebuilt(draw, values, draw.randrange(times))
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=draw.random() < 0.2, allow_unicode=True)
    if draw.random() < 0.35:
        text = scrambled(draw, text, ODD_YAML, draw.randrange(1, 4))
    content = text.encode("utf-8", "surrogatepass")
    return garbled(draw, content, draw.randrange(1, 4)) if draw.random() < 0.15 else content


def as_json(draw, values, times):
    """The same as JSON."""
    text = json.dumps(rebuilt(draw, values, draw.randrange(times)), ensure_ascii=draw.random() < 0.7)
    if draw.random() < 0.4:
        text = scrambled(draw, text, ODD_JSON, draw.randrange(1, 3))
    content = text.encode("utf-8", "surrogatepass")
    return garbled(draw, content, draw.randrange(1, 3)) if draw.random() < 0.15 else content


def use_config(config):
    """What a run does with a config before it loads a model; the dump must read back as the same config."""
    if ATPConfig.parse(yaml.safe_load(config.dump())) != config:
        raise AssertionError("the dumped config differs")
    check_reachable(config, SHAPES)
    with contextlib.suppress(InputError):
        config.refuse_change_of(ATPConfig.parse(CONFIG).model_dump(mode="json"))


def config_case(draw, folder):
    """A YAML file."""
    path = folder / "config.yaml"
    path.write_bytes(as_yaml(draw, CONFIG, 3))
    use_config(ATPConfig.load(path))


def override_case(draw, folder):
    """Overrides of a good file."""
    keys = [f"{section}.{key}" for section, values in CONFIG.items() if isinstance(values, dict) for key in values]
    overrides = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        key = draw.choice(keys) if draw.random() < 0.9 else draw.choice([*ODD_KEYS, "a." * 3000, "seed.x", "data..x"])
        value = draw.choice(GOOD_VALUES if draw.random() < 0.6 else ODD_VALUES)
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        text = draw.choice(ODD_YAML) if draw.random() < 0.2 else text
        overrides.append(scrambled(draw, f"{key}={text}", ODD_YAML, draw.random() < 0.2))
    use_config(ATPConfig.parse(CONFIG, overrides))


def use_data(draw, path):
    """What a run does with a data file."""
    labels = draw.choice(((), (), (), ("yes", "no"), ("neutral", "contradiction")))
    examples = read_examples(str(path), labels, limit=draw.choice((None, None, 5)), chat=chat_of(tokenizer()))
    pack(examples, tokenizer(), 32, loss_on=draw.choice(("all", "completion")))
    splits = load_recipe(DataSettings(recipe="custom", train=str(path), labels=labels, general_share=0.0))
    pack(splits.train, tokenizer(), 32)


def jsonl_case(draw, folder):
    """A JSONL file."""
    path = folder / f"data{draw.choice(('.jsonl', '.jsonl', '.JSONL'))}"
    rows = [rebuilt(draw, row, draw.random() < 0.1) for row in ROWS[draw.choice(list(ROWS))]]
    text = "\n".join(json.dumps(row, ensure_ascii=draw.random() < 0.7) for row in rows)
    if draw.random() < 0.6:
        text = scrambled(draw, text, ODD_JSON, draw.randrange(1, 3))
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(garbled(draw, content, draw.randrange(1, 3)) if draw.random() < 0.2 else content)
    use_data(draw, path)


def csv_case(draw, folder):
    """A CSV file."""
    path = folder / "data.csv"
    rows = ROWS[draw.choice(("text", "prompt", "premise"))]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=draw.choice((",", ",", ",", ";", "\t")))
    writer.writeheader()
    writer.writerows(rows)
    text = scrambled(draw, file.getvalue(), ODD_CSV, draw.randrange(4))
    content = text.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
    path.write_bytes(garbled(draw, content, draw.randrange(1, 4)) if draw.random() < 0.3 else content)
    use_data(draw, path)


def parquet_case(draw, folder):
    """A Parquet file: odd types, or damage."""
    path = folder / "data.parquet"
    rows = ROWS[draw.choice(list(ROWS))]
    table = pyarrow.Table.from_pylist(rows)
    odd = [
        pyarrow.array(range(len(rows))), pyarrow.array([2.5] * len(rows)), pyarrow.array([b"\xff"] * len(rows)),
        pyarrow.array([None] * len(rows)), pyarrow.array([2**62 + 1] * len(rows), pyarrow.timestamp("ns")),
        pyarrow.array([-(2**62)] * len(rows), pyarrow.timestamp("ms")), pyarrow.array([[{"a": 1}]] * len(rows)),
        pyarrow.array(["a"] * len(rows)).dictionary_encode(), pyarrow.array([2**62] * len(rows), pyarrow.duration("s")),
    ]  # fmt: skip
    for _ in range(draw.randrange(3)):
        name = draw.choice([*table.column_names, "other", "document", "label"])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, draw.choice(odd))
        else:
            table = table.append_column(name, draw.choice(odd))
    options = {"compression": draw.choice(("none", "snappy", "gzip", "zstd")), "use_dictionary": draw.random() < 0.5}
    pyarrow.parquet.write_table(table, path, row_group_size=draw.choice((1, 5, 100)), **options)
    if draw.random() < 0.7:
        path.write_bytes(garbled(draw, path.read_bytes(), draw.choice((1, 1, 2, 8, 40))))
    use_data(draw, path)


def experiment_case(draw, folder):
    """An experiment's file and the config beside it."""
    path = folder / "which.yaml"
    path.write_bytes(as_yaml(draw, EXPERIMENT, 3))
    base = {key: value for key, value in CONFIG.items() if key != "output_dir"}
    (folder / "base.yaml").write_bytes(as_yaml(draw, base, 2 if draw.random() < 0.3 else 1))
    spec, found = ExperimentSpec.load(str(path))
    arms = spec.labelled_arms()
    for domain in spec.domains[:3]:
        config = spec.config(found, domain, [])
        for arm in list(arms.values())[:3]:
            ATPConfig.parse(config.model_dump(mode="json"), list(arm.overrides))


def report_case(draw, folder):
    """The records of a run."""
    for name, content in RUN.items():
        if draw.random() < 0.9:
            damaged = as_json(draw, content, 4) if draw.random() < 0.5 else json.dumps(content).encode()
            (folder / name).write_bytes(damaged)
    records = [
        {"step": step, "phase": ("search", "settle", "tune")[step // 4], "loss": 3.0, "keep": 0.6, "target_keep": 0.6,
         "changed": 0.1, "lasso": 1.0, "tokens_per_second": 5.0, "decision_loss": 3.0}
        for step in range(12)
    ]  # fmt: skip
    lines = [json.dumps(rebuilt(draw, record, draw.random() < 0.2)) for record in records]
    text = "\n".join(lines)
    text = scrambled(draw, text, ODD_JSON, draw.randrange(3)) if draw.random() < 0.5 else text
    (folder / "metrics.jsonl").write_bytes(text.encode("utf-8", "replace"))
    (folder / "config.yaml").write_bytes(as_yaml(draw, CONFIG, 2))
    page = write_report(folder).read_text(encoding="utf-8")
    if "<script" in page or page.split()[-3:] != ["</main>", "</body>", "</html>"]:
        raise AssertionError("not the page that was meant")


CASES = {
    "config": (config_case, 1200), "override": (override_case, 1200), "jsonl": (jsonl_case, 700),
    "csv": (csv_case, 500), "parquet": (parquet_case, 600), "experiment": (experiment_case, 400),
    "report": (report_case, 400),
}  # fmt: skip


def run_case(kind, number, folder):
    """`accepted` or `refused`; raises what the case must not raise, and `TooSlow`."""
    draw = random.Random(f"{kind} {number}")
    limits = (signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITED)
    before = [(signal.signal(sign, _too_slow), signal.setitimer(timer, seconds)) for sign, timer, seconds in limits]
    try:
        CASES[kind][0](draw, folder)
        return "accepted"
    except InputError as error:
        message = str(error)
        if not (len(message) <= LONGEST and message.isprintable() and message):
            raise AssertionError(f"a message of {len(message)} characters: {message[:300]}") from error
        return "refused"
    finally:
        for (sign, timer, _), (handler, left) in zip(limits, before, strict=True):
            signal.setitimer(timer, *left)
            signal.signal(sign, handler)


def _too_slow(*_):
    raise TooSlow


def main():
    """Runs the cases and prints a line a kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # as the command line does
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(options.case[0], int(options.case[1]), Path(folder)))
        return
    broken, total = 0, 0
    for kind in options.kinds:
        counts, slowest, started = Counter(), 0.0, time.process_time()
        for number in range(round(options.scale * CASES[kind][1])):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.process_time()
                try:
                    counts[run_case(kind, number, Path(folder))] += 1
                except (Exception, TooSlow) as error:
                    counts["FAILED"] += 1
                    print(f"--case {kind} {number}: {type(error).__name__}: {str(error)[:300]}")
                    print("".join(traceback.format_tb(error.__traceback__)[-3:]), flush=True)
                slowest = max(slowest, time.process_time() - begun)
        broken, total = broken + counts["FAILED"], total + counts.total()
        found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        work = f"slowest {slowest:.1f} s of work, all {time.process_time() - started:.0f} s"
        print(f"{kind}: {counts.total()} cases, {found}; {work}", flush=True)
    print(f"{total} cases, {broken} failed")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
