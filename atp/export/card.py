"""The cards (README.md) of exported models: metadata for the Hub, origin, loading, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from atp.config import ATPConfig
from atp.data.domains import C4, hub_sources
from atp.data.hub import HubName
from atp.ground.errors import shorten, visible
from atp.ground.files import write_text
from atp.ground.places import PACKAGED_MODEL
from atp.ground.reading import existing
from atp.models.base import FORMS
from atp.report.beside import NOT_MEASURABLE, counted, on_words, unclear
from atp.report.text import code, plain

_TAGS = ["structural-pruning", "lora"]
PACKAGED = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": "en"}
_RESULTS = "\n## Results\n"
_REGISTERS = "import atp  # registers the classes of cut models\n"
_PLAIN = "Its class comes with transformers, so every tool that loads models from there loads this one.\n"
_OWN = """Its layers differ in width, so transformers needs the class that package `atp-kernels` registers. Without it
loading fails with "model type `atp_...` ... Transformers does not recognize this architecture", and upgrading
transformers does not help. With `preset: stock` all layers get equal widths, and no tool needs the package.
"""
_LOADING = """
```python
{registers}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
_TOOLS = """
A tool that loads the folder itself must start after `import atp`; lm-eval, for example:

```sh
python -c "import atp, lm_eval.__main__ as tool; tool.cli_evaluate()" --model hf \\
    --model_args pretrained=path/to/this/folder --tasks arc_easy
```
"""
_LICENCES = "\nThe licences of the source model and of the data apply to this model too.\n"


def _usage(stock: bool) -> str:
    """How the folder is loaded; stock: whether its class comes with transformers."""
    if stock:
        return _PLAIN + _LOADING.format(registers="") + _LICENCES
    return _OWN + _LOADING.format(registers=_REGISTERS) + _TOOLS + _LICENCES


def model_card(
    config: ATPConfig, params_before: int, params_after: int, *, stock: bool = False,
    gone: Mapping[str, list[int]] | None = None,
) -> str:  # fmt: skip
    """README.md of model/: where it comes from, what was removed, how to load it.

    Counts are of all parameters. stock: whether the model's class comes with transformers. gone: the layers that lack
    attention or MLP, by these names.
    """
    lacking = "".join(
        f"* Without {name}: layers {', '.join(map(str, layers))}.\n" for name, layers in (gone or {}).items()
    )
    body = f"""# A smaller model, tuned and pruned in one run

Made by ATP (All-in-One Tuning and Structural Pruning, arXiv 2412.14426) from {_origin(config)}.

* Parameters: {params_after:,} of {params_before:,}; target share of decoder parameters {config.decisions.target_keep}.
* Mask space `{config.decisions.space}`; the width of each layer is in `config.json`.
{lacking}* Data recipe: {code(config.data.recipe)}.
{_beside_lora(config)}{_held(config)}{_words(config)}
{_usage(stock)}"""
    return _card(config, body, tags=["atp", *_TAGS])


def base_card(config: ATPConfig) -> str:
    """README.md of base/: the smaller model that an adapter belongs to."""
    merged = config.lora.variant == "dora"
    without = "with the tuning before the cut, without that after it, which is" if merged else "without the tuning"
    without = f"with its tuned embeddings, {without}" if config.training.embeddings else without
    body = f"""# The base of an adapter

{_origin(config)} with removed structures cut out, {without} in `../adapter`. With that adapter it is the model
in `../model`; alone it is worse than either.
{_words(config)}
The licence of the source model applies to this model too.
"""
    return _card(config, body, datasets=None)


def adapter_card(config: ATPConfig, *, stock: bool = False) -> str:
    """README.md of adapter/: which model it belongs to, and how to load both; stock: as in `model_card`."""
    name = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[config.lora.variant]
    body = f"""# A LoRA adapter for a cut model

{name} with rank {config.lora.r} and alpha {config.lora.alpha:g} for `../base`, which is {_origin(config)} with removed
structures cut out. It fits no other model: the uncut one has other shapes, and `../model` already has this adapter
merged in.
{_words(config)}
```python
{"" if stock else _REGISTERS}from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("path/to/this/run/base")
model = PeftModel.from_pretrained(base, "path/to/this/run/adapter")
```

The licences of the source model and of the data apply to this adapter too.
"""
    return _card(config, body, library_name="peft", tags=["atp", *_TAGS])


def baseline_card(config: ATPConfig, method: str, params_before: int, params_after: int, *, stock: bool = False) -> str:
    """README.md of model/ for a system that ATP is compared with; arguments: as in `model_card`."""
    embeddings = " and its input embeddings" if config.training.embeddings else ""
    body = f"""# A model to compare with: {method}

Made by the baseline `{method}` of the package atp-kernels from {_origin(config)}, then tuned with LoRA{embeddings}.

* Parameters: {params_after:,} of {params_before:,}; target share of decoder parameters {config.decisions.target_keep}.
* Data recipe: {code(config.data.recipe)}.

{_usage(stock)}"""
    return _card(config, body, tags=_TAGS)


def quantized_card(
    card: Path | None, facts: dict[str, Any], said: Sequence[str], rows: Sequence[tuple[str, str, str]],
    *, needs: str, stock: bool,
) -> str:  # fmt: skip
    """README.md of a model whose weights were quantized: its own, if it has one, and what changed.

    card: README.md of the model as it was. facts: its metadata, and its `name`; used where there is no card. said:
    sentences on the quantization. rows: a figure with its values before and after. needs: the command that installs
    what loading needs. stock: as in `model_card`. Scores leave the metadata, because they are the model's of before.
    """
    table = "\n".join(f"| {what} | {before} | {after} |" for what, before, after in rows)
    section = f"""
## Quantized weights

{". ".join(plain(line) for line in said)}. What stands above describes the model before that.

| | before | after |
|---|---|---|
{table}

Speed is that of the machine on which the weights were quantized, on a CPU. To load the folder: `{needs}`.
"""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True) if card is not None and card.is_file() else None
    except Exception:  # a foreign card may hold anything
        found = None
    if found is None:
        known = {name: facts[name] for name in ("base_model", "license", "language") if name in facts}
        data = ModelCardData(**known, library_name="transformers", pipeline_tag="text-generation")
        return visible(f"---\n{data.to_yaml()}\n---\n# {plain(facts['name'])}, quantized\n\n{_usage(stock)}{section}")
    found.data.eval_results = None
    return visible(f"---\n{found.data.to_yaml()}\n---\n{found.text.rstrip()}\n{section}")


def add_results(path: Path, config: ATPConfig, summary: dict[str, Any]) -> None:
    """Adds the scores in a run's summary, and the command that made the model, to its card, replacing earlier ones.

    path: README.md of model/. The metadata gets one `EvalResult` per score of the final model.
    """
    card = ModelCard.load(path)
    scores = {("perplexity", "perplexity"): summary["perplexity"]["final"]}
    for task in summary["tasks"]:
        found = summary[task]["final"]
        scores |= {(task, name): found[name] for name in found if f"{name}_interval" in found}
    recipe = shorten(config.data.recipe)
    card.data.model_name = _name(config)
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation", dataset_type=recipe, dataset_name=recipe, dataset_config=task,
            dataset_split="test", metric_type=metric, metric_value=round(value, 4),
        )
        for (task, metric), value in scores.items()
    ]  # fmt: skip
    majority = summary.get("majority", {})
    rows = "\n".join(
        f"| {task} | {metric} | {value:.4g} | {_figure(majority.get(task, {}).get(metric))} |"
        for (task, metric), value in scores.items()
    )
    told = "".join(f"{line}\n\n" for line in [*counted(summary.get("perplexity_of")), *on_words(summary)])
    command = code(summary["command"].replace(" --resume", ""), limit=1000)
    card.text = card.text.partition(_RESULTS)[0] + (
        f"{_RESULTS}\nOn held-out text of the recipe (seed {summary['seed']}):\n\n"
        f"| data | score | value | majority label |\n|---|---|---|---|\n{rows}\n\n{told}{_relative(summary)}"
        f"Made with {command}.\n"
    )
    write_text(path, visible(str(card)))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _relative(summary: dict[str, Any]) -> str:
    """Paragraphs on what is left of the tuned dense model's scores; empty if the run has no such model."""
    if "relative_performance" not in summary:
        return ""
    mean = summary["relative_performance"]
    if mean is None:
        found = NOT_MEASURABLE
    else:
        low, high = summary["relative_performance_interval"]
        found = f"{mean:.3f} (95 %: {low:.3f} to {high:.3f})"
    lines = [f"Relative performance, the share of the tuned dense model's task scores: {found}."]
    return "".join(f"{plain(line)}\n\n" for line in lines + unclear(summary.get("not_measurable", {})))


def _card(config: ATPConfig, body: str, **metadata: Any) -> str:
    """A card with the metadata that is known."""
    facts = {"library_name": "transformers", "datasets": _data_sets(config)}
    data = ModelCardData(**_source_facts(config) | facts | metadata, pipeline_tag="text-generation")
    return visible(f"---\n{data.to_yaml()}\n---\n{body}")


def _source_facts(config: ATPConfig) -> dict[str, Any]:
    """base_model, license and language of the source model, as far as its name and its own card tell them."""
    path = config.model.path
    if path == PACKAGED_MODEL:
        return PACKAGED
    folder = existing(path)
    if folder is not None:
        return facts_of_card(folder / "README.md")
    try:
        validate_repo_id(path)
    except ValueError:
        return {}
    cached = try_to_load_from_cache(path, "README.md")
    return {"base_model": path} | (facts_of_card(Path(cached)) if isinstance(cached, str) else {})


def license_of(config: ATPConfig) -> str | None:
    """The licence of the source model in words, as far as it is known without the network."""
    known = _source_facts(config).get("license")
    return None if known is None else shorten(", ".join(map(str, known)) if isinstance(known, list) else known)


def facts_of_card(path: Path, names: Sequence[str] = ("license", "language")) -> dict[str, Any]:
    """Metadata of these names from a model's card; nothing if there is none, or it is damaged."""
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception:  # a foreign card may hold anything
        return {}
    return {name: value for name in names if (value := data.get(name)) is not None}


def _data_sets(config: ATPConfig) -> list[str] | None:
    return sorted({HubName.parse(text).name for text in hub_data(config)}) or None


def hub_data(config: ATPConfig) -> list[str]:
    """The Hub data sets that a run reads, as `owner/name[@revision][#config][:split]`."""
    data = config.data
    general = C4 if data.general is None and data.general_share != 0 and data.recipe in ("health", "legal") else None
    others = [source for _, source in data.own_sources] + ([general] if general else [])
    return hub_sources(data.recipe, data.sources, others)


def _name(config: ATPConfig) -> str:
    return f"{Path(shorten(config.model.path)).name} at {config.decisions.target_keep:g} of the decoder"


def _beside_lora(config: ATPConfig) -> str:
    """A line on what was trained besides LoRA; empty if nothing was."""
    found = config.training.beside_lora
    return f"* Trained besides LoRA: {found}.\n" if found else ""


def _held(config: ATPConfig) -> str:
    """A line on the base that a run with `model.load_in` trained over; empty without it."""
    if config.model.load_in is None:
        return ""
    return (
        f"* Trained over a base whose decoder linears were held as {FORMS[config.model.load_in].says}; the weights "
        "here are in floating point.\n"
    )


def _words(config: ATPConfig) -> str:
    """A line on a vocabulary that was trimmed; empty where all words are kept."""
    if config.vocabulary.keep is None:
        return ""
    return (
        "\nOnly a part of the source model's words is left, under new ids: its tokenizer does not fit this model, "
        "which has its own.\n"
    )


def _origin(config: ATPConfig) -> str:
    return code(config.model.gguf_file or config.model.path)
