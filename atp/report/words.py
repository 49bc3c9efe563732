"""What a run's page says in words: what was made of what, how to use it, and what the terms mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from atp.ground.errors import InputError
from atp.ground.reading import read_yaml
from atp.report.beside import MODELS, OTHERS, compared_text
from atp.report.files import RunFiles
from atp.report.text import number

GLOSSARY = (
    ("decoder", "All layers of the model, without embeddings and output head, which no decision cuts."),
    ("KV group", "A key and value head with the query heads that read it."),
    ("MLP channel", "One of the inner units of a layer's MLP, with its weights in all three matrices."),
    ("open, search, settle, tune", "The phases of a run: LoRA on the whole model; LoRA under masks that move; LoRA of "
     "removed structures shrinking to zero; LoRA on the model after the cut. A run need not have all of them."),
    ("refit", "The linears that end a block are fitted, in closed form, to what the whole model computes."),
    ("certificate", "Measurements that the cut and the export have changed nothing but the weights' place."),
    ("held-out", "Of documents that no training, decision or fit has seen."),
    ("perplexity", "How many tokens the model hesitates between, on average; 1 is certainty. Lower is better."),
    ("bits per byte", "The same per byte of text, in bits, so that models with other tokens compare. Lower is better."),
    ("macro-F1", "The mean over all labels of F1, which counts both wrong answers and missed ones; 1 is perfect."),
    ("majority label", "What one constant answer scores. A model that is no better has not learned the task."),
    ("relative performance", "The score as a share of that of the whole model after the same tuning."),
    ("prefill, decode", "Reading a prompt, and writing new tokens one by one."),
)  # fmt: skip
"""(term, meaning), in the order in which a page brings them up."""


def opening(run: RunFiles) -> list[str]:
    """Sentences that say what the run made and how good it is, as far as its records tell."""
    return [] if not run.summary.get("params_after") else list(_sentences(run.summary, _config(run)))


def usage(run: RunFiles) -> list[tuple[str, str]]:
    """(what for, command) of a finished run."""
    folder = _config(run).get("output_dir")
    if not run.summary.get("params_after") or not isinstance(folder, str):
        return []
    return [
        ("talk to it", f"atp chat {folder}"),
        ("one file for llama.cpp", f"atp export {folder} --to gguf"),
        ("weights in 8 bits", f"atp export {folder} --to int8"),
        ("in a program", f"the lines in {folder}/model/README.md"),
    ]


def _sentences(summary: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    name, recipe = (_text(config, section, key) for section, key in (("model", "path"), ("data", "recipe")))
    method = summary.get("method", "atp")
    done = {"atp": "tuned and cut in one run", "dense_lora": "tuned"}.get(method, f"cut by {method}, then tuned")
    before, after = summary["params_before"], summary["params_after"]
    left = f"{number(after / 1e6, 1)} of {number(before / 1e6, 1)} million parameters are left"
    if summary.get("keep_decoder") is not None:
        left += f", {summary['keep_decoder']:.0%} of the decoder"
    sizes = summary.get("megabytes") or {}
    if {"original", "final"} <= sizes.keys():
        left += f", in {number(sizes['final'], 0)} instead of {number(sizes['original'], 0)} MB"
    yield f"{name or 'The model'} was {done}{f' on {recipe}' if recipe else ''}: {left}."
    for task in summary.get("tasks") or ():
        scored = {model: values.get("macro_f1") for model, values in summary[task].items()}
        constant = ((summary.get("majority") or {}).get(task) or {}).get("macro_f1")
        yield from _compared(f"Its macro-F1 in {task}", scored | {"majority": constant}, 3)
    if summary.get("vocabulary"):
        words = summary["vocabulary"]["words"]
        yield f"It has {words['after']:,} of {words['before']:,} words, and spells all others with these."
    key, label, digits = compared_text(summary)
    what = "perplexity on held-out text" if key == "perplexity" else f"score on held-out text, in {label},"
    yield from _compared(f"Its {what}", summary.get(key) or {}, digits)
    speed = summary.get("speed") or {}
    if {"original", "final"} <= speed.keys():
        times = [
            f"{verb} {speed['final'][key] / speed['original'][key]:.2f} times"
            for verb, key in (("reads", "prefill_tokens_per_second"), ("writes", "decode_tokens_per_second"))
        ]
        yield f"On the machine of the run it {' and '.join(times)} as fast as the original."
    if summary.get("license"):
        yield f"The licence of the source model, {summary['license']}, and those of the data apply to it too."


def _compared(what: str, values: dict[str, float | None], digits: int) -> Iterator[str]:
    """A sentence with the final model's value and those beside it; nothing without the final one's."""
    known = {name: number(value, digits) for name, value in values.items() if value is not None}
    if "final" in known:
        others = ", ".join(f"{(MODELS | OTHERS)[name]} {value}" for name, value in known.items() if name != "final")
        yield f"{what} is {known['final']}{f' ({others})' if others else ''}."


def _config(run: RunFiles) -> dict[str, Any]:
    try:
        found = read_yaml(run.config, "config.yaml")
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(config: dict[str, Any], section: str, key: str) -> str:
    values = config.get(section)
    return str(values.get(key) or "") if isinstance(values, dict) else ""
