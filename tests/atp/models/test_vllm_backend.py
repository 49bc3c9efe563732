"""A cut model as the Transformers backend of vLLM 0.33 runs it, by that version's sources. vLLM itself is not run."""

import ast
import inspect
import textwrap

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AttentionInterface, AutoModel

from atp.models import ATPLlamaModel
from atp.models.config import config_class
from atp.models.cut import CutAttention, build

TOKENS = 12
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "per_layer_config": {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1}, "1": {"intermediate_size": 33},
    },
}  # fmt: skip
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 4.0}


def attention(module, query, key, value, attention_mask, **options):
    """What vLLM registers: heads as the layer's own config has them, tokens without a batch, a flat result."""
    layer = module.config.per_layer_config[module.layer_idx]
    heads, groups, size = layer.num_attention_heads, layer.num_key_value_heads, module.config.head_dim
    assert (module.num_heads, module.num_key_value_heads, module.head_dim) == (heads, groups, size)
    flat = [states.transpose(1, 2).reshape(TOKENS, -1) for states in (query, key, value)]
    pairs = zip(flat, (heads, groups, groups), strict=True)
    query, key, value = (states.view(TOKENS, count, size).transpose(0, 1) for states, count in pairs)
    query, key, value = query[None], key[None], value[None]
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=module.scaling, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(TOKENS, heads * size), None


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("llama", {"attention_bias": True}), ("granite", GRANITE), ("qwen3", {})]
)
@torch.no_grad()
def test_its_call_gives_the_same_logits(family, options):
    AttentionInterface.register("as_in_vllm", attention)
    torch.manual_seed(0)
    model = build(config_class(family)(**SIZES | options)).eval()
    ids = torch.randint(1, 61, (1, TOKENS))
    expected = model(ids).logits[0]
    config = config_class(family)(**SIZES | options)
    config._attn_implementation = "as_in_vllm"
    decoder = AutoModel.from_config(config).eval()
    decoder.load_state_dict(model.model.state_dict())
    options = {"inputs_embeds": None, "use_cache": False, "return_dict": False}
    outputs = decoder(input_ids=ids, position_ids=torch.arange(TOKENS)[None], **options)
    logits = model.lm_head(outputs[0][0]) * getattr(config, "logit_scale", 1.0)
    assert_close(logits, expected, rtol=0, atol=1e-5)


def test_it_finds_what_it_compiles_and_the_call_of_attention():
    """It marks these arguments as dynamic, and looks for the call in the source of forward."""
    assert {"input_ids", "inputs_embeds", "position_ids"} <= inspect.signature(ATPLlamaModel.forward).parameters.keys()
    assert ATPLlamaModel.is_backend_compatible()
    tree = ast.parse(textwrap.dedent(inspect.getsource(CutAttention.forward)))
    looked_up = {
        node.targets[0].id for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    }  # fmt: skip
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in looked_up)
    scaling = {word.arg: ast.unparse(word.value) for word in call.keywords}["scaling"]
    assert scaling == "self.scaling", "a name that it can read from the module"
