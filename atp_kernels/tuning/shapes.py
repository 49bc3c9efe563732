"""Sizes of the linears that LoRA sits on, by the name of a model or from its config.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama-like decoder, as in its published config."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linears of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }

    @property
    def shapes(self) -> tuple[str, ...]:
        """The first linear of every distinct shape, in the order of a layer."""
        first: dict[tuple[int, int], str] = {}
        for name, shape in self.linears.items():
            first.setdefault(shape, name)
        return tuple(first.values())

    @property
    def linear_params(self) -> int:
        """Weights of all linears of the decoder."""
        return self.layers * sum(out * inner for out, inner in self.linears.values())


MODELS = {
    model.name: model
    for model in (
        Model("tiny", hidden=64, inner=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=128),
        Model("smollm2-135m", hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152,
              tied=True),
        # One layer of it, and a small head, for comparisons of a layer's steps.
        Model("smollm2-layer", hidden=576, inner=1536, layers=1, heads=9, kv_heads=3, head_dim=64, vocab=512,
              tied=True),
        Model("llama3.2-1b", hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, head_dim=64, vocab=128256,
              tied=True),
        Model("llama2-7b", hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocab=32000),
        Model("llama3-8b", hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128256),
        Model("llama3-70b", hidden=8192, inner=28672, layers=80, heads=64, kv_heads=8, head_dim=128, vocab=128256),
    )
}  # fmt: skip
_SHORT = {"1b": "llama3.2-1b", "7b": "llama2-7b", "8b": "llama3-8b", "70b": "llama3-70b", "135m": "smollm2-135m"}


def find_model(name: str) -> Model:
    """The model of a name, of any case, or of a short form such as `7b`. Raises ValueError for an unknown one."""
    key = name.lower()
    key = _SHORT.get(key, key)
    if key not in MODELS:
        raise ValueError(f"unknown model {name!r}: use one of {', '.join([*MODELS, *_SHORT])}.")
    return MODELS[key]


Shape = tuple[int, int]
"""(out, in) of a linear."""
_LARGEST_FILE, _LARGEST_WIDTH = 2**24, 2**24
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")
# A layer with one of these of its own is not described by its number of heads.
_BEYOND_HEADS = ("qk_pairs", "v_head_dim")


def parse_shape(text: str) -> Shape:
    """(out, in) of a text such as 4096x11008. Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d{0,7})x([1-9]\d{0,7})", text)
    if found is None:
        raise ValueError(f"{text!r} is no shape: write out x in, such as 4096x11008.")
    return int(found[1]), int(found[2])


def shapes_of(model: str) -> list[Shape]:
    """Every distinct (out, in) of the linears of a model: a name in `MODELS`, a config.json or its folder.

    Layers whose widths differ have them in `per_layer_config`, as transformers writes it. Raises ValueError.
    """
    path = Path(model)
    if not path.exists():
        try:
            return list(dict.fromkeys(find_model(model).linears.values()))
        except ValueError as error:
            raise ValueError(f"{str(error)[:-1]}, a config.json or its folder.") from None
    config = _read(path / "config.json" if path.is_dir() else path)
    own = config.get("per_layer_config") or {}
    own = list(own.values()) if isinstance(own, Mapping) else own
    layers = config.get("num_hidden_layers")
    # Layers that per_layer_config leaves out have the widths of the whole config.
    widths = [config] if not own or layers != len(own) else []
    widths += [{**config, **layer} for layer in own]
    return list(dict.fromkeys(shape for each in widths for shape in _linears_of(each, path)))


def _read(path: Path) -> dict[str, Any]:
    try:
        small = path.stat().st_size <= _LARGEST_FILE
        content = json.loads(path.read_text(encoding="utf-8")) if small else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a config.json or its folder.") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON: name a config.json or its folder.") from None
    layers = content.get("per_layer_config") if isinstance(content, dict) else None
    each = list(layers.values()) if isinstance(layers, dict) else layers or []
    if not isinstance(content, dict) or not isinstance(each, list) or not all(isinstance(row, dict) for row in each):
        raise ValueError(f"{path} is not the config of a model: name a config.json or its folder.")
    return content


def _linears_of(config: Mapping[str, Any], path: Path) -> list[Shape]:
    if any(config.get(key) is not None and config.get(key) != config.get("head_dim") for key in _BEYOND_HEADS):
        raise ValueError(f"{path} has heads narrower than head_dim: give the shapes of its linears instead.")
    hidden, inner, heads = (_width(config, key, path) for key in _WIDTHS)
    kv_heads = _width(config, "num_key_value_heads", path, heads)
    head_dim = _width(config, "head_dim", path, hidden // heads)
    sizes = Model(str(path), hidden, inner, 1, heads, kv_heads, head_dim, vocab=1)
    return list(sizes.linears.values())


def _width(config: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= _LARGEST_WIDTH:
        raise ValueError(f"{path} has {key} {value!r}: give a whole number from 1 to {_LARGEST_WIDTH}.")
    return value
