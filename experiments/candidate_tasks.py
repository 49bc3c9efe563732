"""Which tasks tell pruning methods apart: each candidate, tuned whole, pruned at random, and pruned by saliency.

    python experiments/candidate_tasks.py run TASK MODEL_FOLDER ANSWERS_FOLDER [--arms original,dense,random,static]
    python experiments/candidate_tasks.py table ANSWERS_FOLDER

`run` writes the answers of each arm to ANSWERS_FOLDER; `table` scores all answers there and writes
experiments/results/candidate_tasks.csv. All arms of a task see the same questions in the same order and take the loss
on answers only. One arm takes about ten minutes on one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from candidates import CANDIDATES
from torch import nn
from transformers import PreTrainedTokenizerBase

from atp.baselines.methods import BASELINES
from atp.baselines.tuner import LoraTuner
from atp.config import ATPConfig
from atp.data import DataSettings, RaggedDataset, Splits, Task, pack, unpacked
from atp.data.assemble import assemble, by_count
from atp.data.packages import openwebtext_passages
from atp.data.tasks import ROUGE
from atp.evaluation.bootstrap import Statistic, percentile_interval, resampled
from atp.evaluation.generation import rouge_scores
from atp.evaluation.majority import majority_scores
from atp.evaluation.metrics import confusion_items, macro_f1, ratio, right_items
from atp.evaluation.tasks import label_scores
from atp.inputs.precision import autocast_dtype
from atp.lora.layer import add_lora
from atp.models.load import read_model, read_tokenizer
from atp.spaces.space import MaskSpace

RESULTS = Path(__file__).parent / "results" / "candidate_tasks.csv"
COLUMNS = [
    "task", "arm", "steps", "keep", "seed", "train", "tokens", "questions", "metric", "score", "score low",
    "score high", "share of dense", "share of dense low", "share of dense high", "command",
]  # fmt: skip
WHOLE = ("majority", "original", "dense")  # arms that remove nothing
LENGTH, CALIBRATION_WINDOW, MOST_CALIBRATION = 192, 256, 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train and score the arms of a task")
    one.add_argument("task", choices=CANDIDATES)
    one.add_argument("model", type=Path, help="folder of SmolLM2-135M-Instruct")
    one.add_argument("answers", type=Path, help="folder for the answers")
    one.add_argument("--arms", default="original,dense,random,static")
    one.add_argument("--steps", type=int, default=100, help="optimizer steps of 16 questions")
    one.add_argument("--keep", type=float, default=0.6, help="share of decoder parameters that stays")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--test", type=int, default=500, help="test questions")
    one.set_defaults(call=run)
    two = commands.add_parser("table", help="write the CSV")
    two.add_argument("answers", type=Path)
    two.set_defaults(call=table)
    options = parser.parse_args()
    options.call(options)


# Running the arms


def run(options: argparse.Namespace) -> None:
    """Writes ANSWERS/TASK-STEPS-KEEP-SEED-ARM.json for each arm, and for the majority label of a task with labels."""
    task, splits = load(options.task, options.steps, options.test, options.seed)
    print(splits.description, flush=True)
    options.answers.mkdir(parents=True, exist_ok=True)
    for majority in majority_scores(splits.train, splits.test, [task]).values():
        write(options, task, splits, "majority", majority["items"], 0)
    for arm in options.arms.split(","):
        tokenizer, model, tokens = read_tokenizer(options.model), read_model(options.model, dtype="float32"), 0
        with TemporaryDirectory() as folder:
            config = settings(options, folder)
            if arm != "original":
                model, tokens = tuned(arm, model, tokenizer, splits, config)
            write(options, task, splits, arm, answers(model, tokenizer, task, splits, config), tokens)


def load(name: str, steps: int, test: int, seed: int) -> tuple[Task, Splits]:
    """The task and its splits by document, with no more training questions than the steps read."""
    task, examples = CANDIDATES[name]()
    calibration = min(len(examples) // 10, MOST_CALIBRATION)
    train = min(16 * steps, len(examples) - calibration - test)
    parts = by_count(examples, train, calibration, test, f"{seed} {name}")
    return task, assemble(
        parts, DataSettings(seed=seed), [task], name, passages=lambda count: openwebtext_passages()
    )  # fmt: skip


def settings(options: argparse.Namespace, folder: str) -> ATPConfig:
    """One setting of decisions, adapter and optimizer for all arms."""
    return ATPConfig.parse(
        {
            "model": {"path": str(options.model)},
            "output_dir": folder,
            "seed": options.seed,
            "decisions": {"space": "kv_group", "target_keep": options.keep, "refit_windows": 96, "multiples": {}},
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
            "training": {
                "steps": options.steps, "batch_size": 16, "lr": 2e-3, "beta2": 0.999, "log_every": 20,
                "save_every": 10_000, "precision": "bfloat16",
            },
        }
    )  # fmt: skip


def tuned(
    arm: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: ATPConfig
) -> tuple[nn.Module, int]:
    """The arm's model after tuning on answers only, and how many tokens it read."""
    space = MaskSpace.from_config(model.config)
    baseline = BASELINES["dense_lora" if arm == "dense" else arm]
    if baseline is not None:
        calibration = pack(splits.calibration, tokenizer, CALIBRATION_WINDOW, loss_on="all")
        model = baseline.apply(model, baseline.choose(model, calibration, config), calibration, config)
    wrapped = add_lora(model, space, **config.lora.model_dump(), seed=config.seed)
    train = unpacked(splits.train, tokenizer, LENGTH, loss_on="completion")
    tuner = LoraTuner(config, wrapped, train, Path(config.output_dir), phase=arm)
    tuner.train()
    return tuner.model, tokens_read(train, config)


def tokens_read(train: RaggedDataset, config: ATPConfig) -> int:
    """Tokens of all steps, were every epoch whole."""
    return round(sum(train.lengths) / len(train) * config.training.total * config.training.batch_size)


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, splits: Splits, config: ATPConfig
) -> list[Any]:
    """[truth, answer] of each test question, or [rouge1, rouge2, rougeL, answer] where the task generates."""
    options = {"max_length": LENGTH, "autocast": autocast_dtype(config.training.precision)}
    if task.labels:
        return label_scores(model, tokenizer, splits.test, task.labels, 16, **options)["items"]
    found = rouge_scores(model, tokenizer, splits.test, 16, max_new_tokens=task.max_new_tokens, **options)
    return found["items"]


def write(options: argparse.Namespace, task: Task, splits: Splits, arm: str, items: list[Any], tokens: int) -> None:
    facts = {
        "task": options.task, "arm": arm, "steps": options.steps, "keep": 1.0 if arm in WHOLE else options.keep,
        "seed": options.seed, "train": len(splits.train), "tokens": tokens, "labels": task.labels,
        "command": f"python experiments/candidate_tasks.py run {options.task} MODEL ANSWERS --steps {options.steps} "
        f"--keep {options.keep} --seed {options.seed} --test {options.test}",
    }  # fmt: skip
    name = f"{options.task}-{options.steps}-{facts['keep']}-{options.seed}-{arm}.json"
    (options.answers / name).write_text(json.dumps(facts | {"items": items}), encoding="utf-8")
    scores = scores_of(task.labels, items)
    print(arm, {metric: with_interval("score", *score) for metric, score in scores.items()}, flush=True)


# Scoring the answers


Scores = dict[str, tuple[float, np.ndarray]]
"""The score and the resampled scores, float64 [resamples], of each metric."""


def scores_of(labels: tuple[str, ...], items: list[Any]) -> Scores:
    """Macro-F1 and accuracy of [truth, answer] pairs, or the means of three ROUGE scores where there are no labels."""
    tables: dict[str, tuple[np.ndarray, Statistic]]
    if labels:
        truth, given = zip(*items, strict=True)
        tables = {
            "macro_f1": (confusion_items(truth, given, labels), macro_f1),
            "accuracy": (right_items(truth, given), ratio),
        }
    else:
        tables = {metric: (np.array([[item[i], 1.0] for item in items]), ratio) for i, metric in enumerate(ROUGE)}
    return {metric: (float(of(rows.sum(axis=0))), resampled(rows, of)) for metric, (rows, of) in tables.items()}


def table(options: argparse.Namespace) -> None:
    """Writes one row per arm and metric."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.answers.glob("*.json"))]
    scores = [scores_of(tuple(one["labels"]), one["items"]) for one in found]
    rows = []
    for one, mine in zip(found, scores, strict=True):
        beside = {
            other["arm"]: theirs for other, theirs in zip(found, scores, strict=True)
            if all(other[key] == one[key] for key in ("task", "steps", "seed"))
        }  # fmt: skip
        # Where a task has no labels, the untuned original is what tuning has to beat.
        floor = beside.get("majority", beside.get("original"))
        for metric, (score, draws) in mine.items():
            row = {key: one[key] for key in ("task", "arm", "steps", "keep", "seed", "train", "tokens")}
            row |= {"questions": len(one["items"]), "metric": metric} | with_interval("score", score, draws)
            if floor and "dense" in beside:
                row |= share_of_dense((score, draws), beside["dense"][metric], floor[metric])
            rows.append(row | {"command": one["command"]})
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


Score = tuple[float, np.ndarray]


def share_of_dense(ours: Score, dense: Score, floor: Score) -> dict[str, Any]:
    """Score over that of the tuned dense model, if that beats the floor by more than its interval."""
    if percentile_interval(dense[1] - floor[1])[0] <= 0:
        return {"share of dense": "not measurable"}
    return with_interval("share of dense", ours[0] / dense[0], ours[1] / dense[1])


def with_interval(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(draws)
    return {name: round(value, 4), f"{name} low": round(low, 4), f"{name} high": round(high, 4)}


if __name__ == "__main__":
    main()
