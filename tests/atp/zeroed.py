"""Independent truth for the cut: a stock model in which the removed weights are zeroed by hand, head by head."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS, VOCAB = 4, 2, 8, 32, 40, 3, 61


def stock_model(family="llama", seed=0, dtype=torch.float64, **overrides):
    """A tiny random model in evaluation mode with non-zero biases and norms that are not one."""
    values = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    if family == "mistral":
        values["sliding_window"] = None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def random_mask(space, seed=1, keep=0.6):
    """A random mask that keeps at least one decision of every structure."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(space.size, generator=generator) < keep
    for structure in space.structures:
        if not mask[structure.span].any():
            mask[structure.start] = True
    return mask


@torch.no_grad()
def zeroed(model, kept):
    """A copy with removed weights at zero. kept: one dict a layer, structure name -> kept decisions."""
    model = copy.deepcopy(model)
    for layer, by_name in zip(model.model.layers, kept, strict=True):
        for name, decisions in by_name.items():
            _ZERO[name](layer, decisions)
    return model


def _rows(linear, *shape):
    parameters = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return [p.view(*shape, -1) for p in parameters]


def _removed(kept, size):
    return [i for i in range(size) if i not in set(kept)]


def _zero_qk(layer, kept):
    width = layer.self_attn.head_dim
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        for rows in _rows(linear, linear.out_features // width, 2, width // 2):
            rows[:, :, _removed(kept, width // 2)] = 0


def _zero_vo(layer, kept):
    width, output = layer.self_attn.head_dim, layer.self_attn.o_proj
    removed = _removed(kept, width)
    for rows in _rows(layer.self_attn.v_proj, layer.self_attn.v_proj.out_features // width, width):
        rows[:, removed] = 0
    output.weight.view(output.out_features, output.in_features // width, width)[:, :, removed] = 0


def _zero_mlp(layer, kept):
    *producers, end = (module for module in layer.mlp.children() if isinstance(module, torch.nn.Linear))
    removed = _removed(kept, end.in_features)
    for linear in producers:
        for rows in _rows(linear, end.in_features):
            rows[removed] = 0
    end.weight[:, removed] = 0


def _zero_kv_group(layer, kept):
    attention = layer.self_attn
    groups = attention.k_proj.out_features // attention.head_dim
    removed = _removed(kept, groups)
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        for rows in _rows(linear, groups, linear.out_features // groups):
            rows[removed] = 0
    attention.o_proj.weight.view(attention.o_proj.out_features, groups, -1)[:, removed] = 0


def _zero_columns(*names):
    def zero(layer, kept):
        for name in names:
            linear = layer.get_submodule(name)
            linear.weight[:, _removed(kept, linear.in_features)] = 0

    return zero


def _zero_outputs(name):
    def zero(layer, kept):
        linear = layer.get_submodule(name)
        for rows in _rows(linear, linear.out_features):
            rows[_removed(kept, linear.out_features)] = 0

    return zero


_ZERO_SELECTIONS = {
    "attention_inputs": _zero_columns("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_outputs": _zero_outputs("self_attn.o_proj"),
    "mlp_inputs": _zero_columns("mlp.gate_proj", "mlp.up_proj"),
    "mlp_outputs": _zero_outputs("mlp.down_proj"),
}
_ZERO = _ZERO_SELECTIONS | {"qk": _zero_qk, "vo": _zero_vo, "mlp": _zero_mlp, "kv_group": _zero_kv_group}


def tokens(windows=3, length=20, seed=2):
    """Random token ids, none of them the padding token 0."""
    return torch.randint(1, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))
