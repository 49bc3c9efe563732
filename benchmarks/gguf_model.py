"""What a model loses in a GGUF file, and how fast llama.cpp runs it.

    python -m benchmarks.gguf_model quality CONFIG MODEL...
    python -m benchmarks.gguf_model speed ORIGINAL CUT --dtype q8_0 --threads 2

MODEL, ORIGINAL, CUT: what `atp export` takes. `quality` scores each model in transformers and its files in f32, f16 and
q8_0, on the held-out windows of the config's data: perplexity by a forward pass that reads the file alone. Where
llama.cpp is installed (pip install xllamacpp) a row also has the largest difference of its log-probabilities from the
model's. `speed` asks both models in turns for a prompt and new tokens, by llama.cpp's own clock. Both commands add rows
to a CSV file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from atp.config import ATPConfig, ModelConfig
from atp.evaluation import packed_windows, perplexity
from atp.evaluation.llama_cpp import LlamaCpp, rates, require_llama_cpp
from atp.evaluation.perplexity import ScoredWindows
from atp.export.command import export
from atp.ground.errors import InputError
from atp.inputs.loading import load_any_model, load_data, load_tokenizer
from benchmarks.gguf_forward import File, logits
from benchmarks.records import RESULTS, Row, append, environment

DTYPES = ("f32", "f16", "q8_0")
PROMPTS, PROMPT_TOKENS, LIKELY = 4, 48, 1000  # of the comparison with llama.cpp


class FileModel(nn.Module):
    """A GGUF file as a causal LM that `perplexity` can score."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self.file, self.place = file, nn.Parameter(torch.empty(0))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits of input_ids int64 [batch, tokens]."""
        return SimpleNamespace(logits=logits(self.file, input_ids))


def quality(config: ATPConfig, model: str, windows: int) -> Iterator[Row]:
    """A row for the model in transformers, and one per dtype of its file. windows: how many are scored."""
    place = ModelConfig(path=model_path(model), dtype="float32")
    tokenizer, whole = load_tokenizer(place), load_any_model(place).eval()
    scored = packed_windows(load_data(config, tokenizer).test, tokenizer)
    yield {"model": model, "form": "transformers"} | _perplexity(whole, scored, windows)
    letter = tokenizer.convert_tokens_to_ids("a")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            path, remarks = export(model, "gguf", dtype, Path(folder) / "model.gguf")
            file = File(path, torch.float32)
            row: Row = {
                "model": model,
                "form": dtype,
                "architecture": file.architecture,
                "remarks": " ".join(remarks[1:]),
            }
            row |= {"mb": round(path.stat().st_size / 1e6, 1)} | _perplexity(FileModel(file), scored, windows)
            if find_spec("xllamacpp"):
                row["llama_cpp_difference"] = difference(LlamaCpp(path), whole, scored.input_ids, letter)
            yield row


@torch.no_grad()
def difference(runtime: LlamaCpp, model: nn.Module, ids: Tensor, letter: int) -> float:
    """The largest difference of log-probabilities, over the likeliest next tokens after the first of ids' windows.

    ids: int64 [windows, tokens]. letter: as for `LlamaCpp.log_probabilities`.
    """
    largest = 0.0
    for prompt in ids[:PROMPTS, :PROMPT_TOKENS]:
        expected = model(prompt[None]).logits[0, -1].log_softmax(-1)
        found = runtime.log_probabilities(prompt, min(LIKELY, len(expected)), letter)
        actual = torch.tensor(list(found.values()))
        largest = max(largest, float((actual - expected[list(found)]).abs().max()))
    return largest


def speed(models: tuple[str, str], dtype: str, threads: int, rounds: int, prompt: int, new: int) -> list[Row]:
    """Tokens per second of each model in llama.cpp, medians over rounds in which they take turns; the first warms up.

    Raises `InputError` where llama.cpp is not installed, before anything is exported.
    """
    require_llama_cpp()
    with tempfile.TemporaryDirectory() as folder:
        files = [export(model, "gguf", dtype, Path(folder) / f"{n}.gguf")[0] for n, model in enumerate(models)]
        medians = rates(files, threads=threads, rounds=rounds, prompt=prompt, new=new)
        return [
            {
                "model": model, "form": dtype, "mb": round(path.stat().st_size / 1e6, 1), "llama_cpp_threads": threads,
                "rounds": rounds, "prompt": prompt, "new": new,
                "prefill": round(prefill, 2), "decode": round(decode, 2),
                "prefill_ratio": round(prefill / medians[0][0], 3), "decode_ratio": round(decode / medians[0][1], 3),
            }
            for model, path, (prefill, decode) in zip(models, files, medians, strict=True)
        ]  # fmt: skip


def model_path(model: str) -> str:
    """`model.path` of a run folder's final model, or of what is no run folder."""
    own = Path(model) / "model"
    return str(own) if own.is_dir() else model


def _perplexity(model: Any, scored: ScoredWindows, windows: int) -> Row:
    found: dict[str, Any] = perplexity(model, scored, batch_size=1, max_windows=windows)
    low, high = found["perplexity_interval"]
    return {"perplexity": found["perplexity"], "low": low, "high": high, "tokens": found["tokens"]}


def main(arguments: list[str] | None = None) -> int:
    """Prints each row and adds it to --out. Returns the exit code: 2 for what was asked for and cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gguf_model.csv")
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("quality")
    asked.add_argument("config", type=Path)
    asked.add_argument("models", nargs="+")
    asked.add_argument("--set", nargs="*", default=[], help="key.path=value, overriding the config")
    asked.add_argument("--windows", type=int, default=16)
    asked = commands.add_parser("speed")
    asked.add_argument("models", nargs=2)
    asked.add_argument("--dtype", default="q8_0", choices=DTYPES)
    for option, default in (("threads", 2), ("rounds", 7), ("prompt", 256), ("new", 64)):
        asked.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args(arguments)
    try:
        if given.command == "speed":
            sizes = given.threads, given.rounds, given.prompt, given.new
            rows: Iterator[Row] = iter(speed(tuple(given.models), given.dtype, *sizes))
        else:
            config = ATPConfig.load(given.config, given.set)
            rows = (row for model in given.models for row in quality(config, model, given.windows))
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            # A committed row says which model it is, not where it lies on one machine.
            path = Path(str(row["model"]))
            short = {"model": path.name} if path.is_absolute() else {}
            append(given.out, [row | short | environment("cpu")])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
