"""The same tasks, items and wording through EleutherAI's lm-eval 0.4, as a check on our own scores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from atp.data.splits import Example
from atp.data.tasks import ROUGE, Task
from atp.evaluation.inference import CausalLM, inference
from atp.evaluation.suite import task_examples
from atp.ground.errors import InputError

TEMPLATES = Path(__file__).parent / "lm_eval_tasks"


def write_tasks(examples: Sequence[Example], tasks: Sequence[Task], folder: Path) -> list[str]:
    """Fills a folder for lm-eval's `--include_path`, and returns the names for its `--tasks`.

    Per task: NAME.jsonl with prompt, label and completion of its examples, and NAME.yaml, which binds the task of that
    name in this package to the file. Raises `InputError` for a task without a YAML file in this package.
    """
    names = []
    for task in tasks:
        template = TEMPLATES / f"{task.name}.yaml"
        if not template.is_file():
            known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("[!_]*.yaml")))
            raise InputError(f"there is no lm-eval task for '{task.name}' (only for {known}): leave out --harness")
        data, name = folder / f"{task.name}.jsonl", f"atp_{task.name}"
        rows = ({"prompt": e.prompt, "label": e.label, "completion": e.completion} for e in examples)
        chosen = [json.dumps(row) for row, e in zip(rows, examples, strict=True) if e.task == task.name]
        data.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        # The cache goes into the folder too, so that nothing is left elsewhere.
        files = {"data_files": {"test": str(data.resolve())}, "cache_dir": str(folder.resolve() / "cache")}
        bound = {"include": str(template.resolve()), "task": name, "dataset_kwargs": files}
        (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(bound), encoding="utf-8")
        names.append(name)
    return names


def check_harness() -> None:
    """Raises `InputError` if lm-eval is missing; call it before a model runs."""
    _lm_eval()


def harness_scores(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    tasks: Sequence[Task],
    batch_size: int = 8,
    *,
    max_examples: int | None = None,
    max_length: int = 1024,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores each task with lm-eval on a model object, over the examples that `evaluate_model` takes.

    Returns for each task {accuracy, predictions: the label chosen for each example} or {rouge1, rouge2, rougeL}, and
    n. Raises `InputError` if lm-eval is missing or has no task of that name.
    """
    simple_evaluate, task_manager, hf_model = _lm_eval()
    chosen = [example for task in tasks for example in task_examples(examples, task)[:max_examples]]
    with tempfile.TemporaryDirectory() as folder, inference(model, autocast):
        names = write_tasks(chosen, tasks, Path(folder))
        wrapped = hf_model(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size,
            max_length=min(max_length, model.config.max_position_embeddings),
        )  # fmt: skip
        manager = task_manager(include_path=folder, include_defaults=False)
        found = simple_evaluate(model=wrapped, tasks=names, task_manager=manager, bootstrap_iters=0)
    return {
        task.name: _task_scores(task, found["results"][name], found["samples"][name])
        for task, name in zip(tasks, names, strict=True)
    }


def _task_scores(task: Task, result: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    if not task.labels:
        return {metric: result[f"{metric},none"] for metric in ROUGE} | {"n": len(samples)}
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    likelihoods = ([likelihood for likelihood, _ in sample["filtered_resps"]] for sample in ordered)
    predictions = [task.labels[max(range(len(row)), key=row.__getitem__)] for row in likelihoods]
    return {"accuracy": result["acc,none"], "n": len(samples), "predictions": predictions}


def _lm_eval() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("--harness needs package lm-eval: run pip install 'lm-eval>=0.4.9'") from error
    return simple_evaluate, TaskManager, HFLM
