"""Models by name, and the linears that LoRA sits on."""

from dataclasses import dataclass


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
