"""Logits from a GGUF file alone, by the rules of llama.cpp: keys and their defaults, tensor names, orders of rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

GEMMA = {"gemma2": (2, 46), "gemma3": (6, 62)}  # every which layer is full, and the layers of the largest model
# Row i of a head is rotated with row i + head_dim / 2, elsewhere 2 i with 2 i + 1.
BEHIND = ("glm4", *GEMMA)  # with norms behind the blocks
NEOX = ("qwen2", "qwen3", "qwen3moe", "olmoe", *GEMMA)
WITHOUT_FACTORS = ("qwen2", "qwen3", "smollm3", "qwen3moe", "olmoe", "glm4", *GEMMA)
WITH_BIASES = ("llama", "deci", "granite")


class File:
    """A GGUF file in memory.

    keys: all, by name. types, tensors: of each tensor by name, what it is stored as, and its values in float32, which
    are [outputs, inputs] for matrices. used: names of those that a forward pass read. dtype: that passes compute in.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64) -> None:
        reader = GGUFReader(path)
        self.dtype = dtype
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors: dict[str, Tensor] = {}
        self.used: set[str] = set()
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            self.tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))
        self.architecture = self.keys["general.architecture"]

    def key(self, name: str, default: Any = None) -> Any:
        """A key of the architecture."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    def each(self, name: str) -> list[int]:
        """A count per layer: an array, or one for all."""
        value = self.key(name)
        return value if isinstance(value, list) else [value] * self.key("block_count")

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, which must have this shape, in the dtype of passes."""
        assert tuple(self.tensors[name].shape) == shape, name
        self.used.add(name)
        return self.tensors[name].to(self.dtype)

    def linear(self, x: Tensor, name: str, outputs: int, *, bias: bool) -> Tensor:
        """The product with a matrix, and its bias if the architecture may have one and the file does."""
        x = x @ self.tensor(f"{name}.weight", (outputs, x.shape[-1])).T
        return x + self.tensor(f"{name}.bias", (outputs,)) if bias and f"{name}.bias" in self.tensors else x


def logits(file: File, ids: Tensor) -> Tensor:
    """[batch, tokens, vocabulary] in the file's dtype for ids int64 [batch, tokens]."""
    architecture, hidden, eps = file.architecture, file.key("embedding_length"), file.key(
        "attention.layer_norm_rms_epsilon")  # fmt: skip
    heads, kv_heads, inner = (file.each(f"{n}") for n in ("attention.head_count", "attention.head_count_kv",
                                                          "feed_forward_length"))  # fmt: skip
    width = file.key("attention.key_length", hidden // heads[0])
    assert width == file.key("attention.value_length", hidden // heads[0])
    if architecture != "deci":
        assert len(set(heads)) == len(set(kv_heads)) == len(set(inner)) == 1
        assert not isinstance(file.key("attention.head_count"), list)
    else:
        # llama.cpp leaves out all of a layer without MLP, and takes no width of heads where the first has none.
        assert min(inner) > 0 < heads[0] and file.key("rope.dimension_count") == width
    rows = len(file.keys["tokenizer.ggml.tokens"])
    biases = architecture in WITH_BIASES

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, (x.shape[-1],), file.tensor(name, (x.shape[-1],)), eps)

    embeddings = file.tensor("token_embd.weight", (rows, hidden))
    x = embeddings[ids] * (file.key("embedding_scale", 1.0) if architecture == "granite" else 1)
    if architecture in GEMMA:
        x = x * hidden**0.5
    residual = file.key("residual_scale", 1.0) if architecture == "granite" else 1
    scale = (file.key("attention.scale") if architecture == "granite" else None) or width**-0.5
    rotated = file.key("rope.dimension_count") if architecture == "glm4" else width
    angles = _angles(file, rotated, ids.shape[1])
    full_every, largest = GEMMA.get(architecture, (1, 0))
    if file.key("block_count") == largest:
        scale = (hidden // heads[0]) ** -0.5
    if architecture == "gemma3":  # whose sliding layers have a base of their own and no scaling
        pair = torch.arange(width // 2, dtype=torch.float64)
        local = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * 10000.0 ** (-2 * pair / width)
        assert file.key("rope.freq_base_swa") == 10000.0
    causal = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=file.dtype).triu(1)
    for layer in range(file.key("block_count")):
        block, turned, mask = f"blk.{layer}", angles, causal
        if (layer + 1) % full_every:
            mask = causal + torch.full_like(causal, -torch.inf).tril(-file.key("attention.sliding_window"))
            turned = (local.cos(), local.sin()) if architecture == "gemma3" else angles
        if heads[layer]:
            normed = norm(x, f"{block}.attn_norm.weight")
            counts = heads[layer], kv_heads[layer], kv_heads[layer]
            query, key, value = (
                file.linear(normed, f"{block}.attn_{n}", count * width, bias=True)
                for n, count in zip("qkv", counts, strict=True)
            )
            if architecture == "olmoe":  # whose norms are as wide as the hidden state
                assert heads[layer] * width == kv_heads[layer] * width == hidden
                query, key = norm(query, f"{block}.attn_q_norm.weight"), norm(key, f"{block}.attn_k_norm.weight")
            query, key, value = (
                states.unflatten(-1, (count, width)) for states, count in zip((query, key, value), counts, strict=True)
            )
            if architecture == "qwen2":
                assert heads[layer] * width == hidden
            if architecture in ("qwen3", "qwen3moe", "gemma3"):
                query, key = norm(query, f"{block}.attn_q_norm.weight"), norm(key, f"{block}.attn_k_norm.weight")
            if architecture != "smollm3" or (layer + 1) % 4 != 0:
                query, key = (_rotate(states, turned, architecture in NEOX) for states in (query, key))
            query, key, value = (states.transpose(1, 2) for states in (query, key, value))
            key, value = (s.repeat_interleave(heads[layer] // kv_heads[layer], dim=1) for s in (key, value))
            scores = query @ key.transpose(-1, -2) * scale
            if architecture == "gemma2":
                scores = _capped(scores, file.key("attn_logit_softcapping", 50.0))
            weights = (scores + mask).softmax(-1)
            mixed = (weights @ value).transpose(1, 2).flatten(2)
            attended = file.linear(mixed, f"{block}.attn_output", hidden, bias=biases)
            if architecture in BEHIND:
                attended = norm(attended, f"{block}.post_attention_norm.weight")
            x = x + residual * attended
        normed = norm(x, f"{block}.ffn_norm.weight")
        if file.key("expert_count", 0):
            x = x + _experts(file, normed, block, inner[layer])
            continue
        if architecture == "arcee":
            active = file.linear(normed, f"{block}.ffn_up", inner[layer], bias=False).relu().square()
            x = x + file.linear(active, f"{block}.ffn_down", hidden, bias=False)
            continue
        if architecture == "glm4":  # in one tensor
            gate, up = file.linear(normed, f"{block}.ffn_up", 2 * inner[layer], bias=False).chunk(2, -1)
        else:
            gate, up = (file.linear(normed, f"{block}.ffn_{n}", inner[layer], bias=biases) for n in ("gate", "up"))
        active = gelu(gate, approximate="tanh") if architecture in GEMMA else silu(gate)
        added = file.linear(active * up, f"{block}.ffn_down", hidden, bias=biases)
        if architecture in BEHIND:
            added = norm(added, f"{block}.post_ffw_norm.weight")
        x = x + residual * added
    head = file.tensor("output.weight", (rows, hidden)) if "output.weight" in file.tensors else embeddings
    output = norm(x, "output_norm.weight") @ head.T
    if architecture == "gemma2":
        return _capped(output, file.key("final_logit_softcapping", 30.0))
    return output / (file.key("logit_scale") if architecture == "granite" else 1)


def _experts(file: File, x: Tensor, block: str, inner: int) -> Tensor:
    """What the experts of a layer add; inner: the file's width of an MLP, which is theirs where they have no other."""
    count, taken, hidden = file.key("expert_count"), file.key("expert_used_count"), x.shape[-1]
    inner = file.key("expert_feed_forward_length") if file.architecture == "qwen3moe" else inner
    weights, chosen = file.linear(x, f"{block}.ffn_gate_inp", count, bias=False).softmax(-1).topk(taken, dim=-1)
    if file.architecture != "olmoe":
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = (file.tensor(f"{block}.ffn_{name}_exps.weight", (count, inner, hidden)) for name in ("gate", "up"))
    down = file.tensor(f"{block}.ffn_down_exps.weight", (count, hidden, inner))
    total = torch.zeros_like(x)
    for expert in range(count):
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        total = total + share * ((silu(x @ gate[expert].T) * (x @ up[expert].T)) @ down[expert].T)
    return total


def _capped(values: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(values / cap)


def _angles(file: File, width: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float64 [length, head_dim / 2], as llama.cpp with more context than the model was trained on."""
    pair = torch.arange(width // 2, dtype=torch.float64)
    base, kind = file.key("rope.freq_base", 10000.0), file.key("rope.scaling.type", "linear")
    frequencies, factor, size = base ** (-2 * pair / width), file.key("rope.scaling.factor", 1.0), 1.0
    if kind == "yarn":
        turns = (file.key("rope.scaling.yarn_beta_fast", 32.0), file.key("rope.scaling.yarn_beta_slow", 1.0))
        original = file.key("rope.scaling.original_context_length")
        fast, slow = (width * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
        low, high = max(0, math.floor(fast)), min(width - 1, math.ceil(slow))
        kept = 1 - ((pair - low) / max(0.001, high - low)).clamp(0, 1)
        frequencies, size = frequencies * (kept + (1 - kept) / factor), 1 + 0.1 * math.log(factor)
    elif kind == "linear":
        frequencies /= factor
    name = "rope_factors_long.weight" if kind == "longrope" else "rope_freqs.weight"
    if file.architecture not in WITHOUT_FACTORS and name in file.tensors:
        frequencies = frequencies / file.tensor(name, (width // 2,))
    if kind == "longrope":
        file.used.add("rope_factors_short.weight")  # of a smaller context
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    size *= file.key("rope.scaling.attn_factor", 1.0)
    return angles.cos() * size, angles.sin() * size


def _rotate(states: Tensor, angles: tuple[Tensor, Tensor], halves: bool) -> Tensor:
    """states: [batch, tokens, heads, head_dim], of which as many are rotated as there are angles for."""
    cos, sin = (part[:, None].to(states.dtype) for part in angles)
    states, rest = states.tensor_split([2 * cos.shape[-1]], -1)
    first, second = states.chunk(2, dim=-1) if halves else (states[..., ::2], states[..., 1::2])
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.cat(pair, dim=-1) if halves else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat([turned, rest], -1)
