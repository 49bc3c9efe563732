"""SliceGPT against its definition: no slicing changes nothing, slicing is a projection before each block."""

import pytest
import torch
from small_llama import config, model, windows
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zeroed import HIDDEN, VOCAB

import atp  # noqa: F401  registers the class
from atp.baselines.calibration import calibration_batches
from atp.baselines.slicegpt import choose_bases, residual_bases, slice_model, sliced_width
from atp.decide.budget import Budget
from atp.evaluation import model_size
from atp.spaces.space import MaskSpace

BIASES = {"attention_bias": True, "mlp_bias": True}


def tokens(count=2, length=12):
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(4))


def bases_of(llama, width):
    return residual_bases(llama, calibration_batches(windows(), config(), torch.device("cpu")), width).double()


def orthonormal(bases):
    """The float32 bases made orthogonal to float64 rounding, so that float64 tests can be sharp."""
    return torch.linalg.qr(bases).Q


def in_float64(llama):
    """The same model with PyTorch's RMSNorm: transformers' own rounds to float32 inside."""
    for parent in [llama.model, *llama.model.layers]:
        for name, norm in list(parent.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return llama


@pytest.mark.parametrize("overrides", [{}, BIASES, {"tie_word_embeddings": True}], ids=["plain", "biases", "tied"])
@torch.no_grad()
def test_without_slicing_logits_stay(overrides):
    llama = model(**overrides)
    sliced = slice_model(llama, orthonormal(bases_of(llama, HIDDEN)))
    assert sliced.config.hidden_size == HIDDEN
    found, expected = (in_float64(each)(tokens()).logits for each in (sliced, llama))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_slicing_is_a_projection_before_each_block():
    llama, width = model(), 16
    bases = orthonormal(bases_of(llama, width))
    sliced = in_float64(slice_model(llama, bases))(tokens()).logits
    decoder, used = in_float64(llama).model, iter(bases)

    def project(x):
        basis = next(used)
        return x @ basis @ basis.T

    position = decoder.rotary_emb(decoder.embed_tokens(tokens()), torch.arange(12)[None])
    x = decoder.embed_tokens(tokens())
    for layer in decoder.layers:
        x = project(x)
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=position, attention_mask=None)[0]
        x = project(x)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(sliced, llama.lm_head(decoder.norm(project(x))), rtol=1e-9, atol=1e-9)


def test_bases_are_principal_axes_of_the_hidden_states():
    """The first basis sees the embeddings: its axes are the right singular vectors of their rows."""
    llama = model()
    rows = torch.cat([batch["input_ids"] for batch in calibration_batches(windows(), config(), torch.device("cpu"))])
    x = llama.model.embed_tokens.weight.detach()[rows.flatten()]
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    overlap = (axes[:16] @ bases_of(llama, 16)[0]).abs()
    torch.testing.assert_close(overlap, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_equal_parameters_to_a_multiple_of_eight(target):
    llama = model(dtype=torch.float32, hidden_size=96)
    settings = config(decisions={"target_keep": target})
    sliced = slice_model(llama, choose_bases(llama, windows(), settings))
    width = sliced.config.hidden_size
    assert width % 8 == 0 and width == sliced_width(llama.config, target)
    total = Budget(MaskSpace.from_config(llama.config)).total
    share = model_size(sliced)["decoder_params"] / total

    def share_at(other):
        part = torch.eye(96)[:, :other].expand(5, -1, -1)
        return model_size(slice_model(llama, part))["decoder_params"] / total

    assert all(abs(share - target) <= abs(share_at(width + step) - target) for step in (-8, 8))


@torch.no_grad()
def test_saves_loads_and_generates_like_any_model(tmp_path):
    llama = model(dtype=torch.float32)
    sliced = slice_model(llama, bases_of(llama, 16).float())
    sliced.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(tokens()).logits, sliced(tokens()).logits)
    greedy = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    cached, plain = (reloaded.generate(tokens(), use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain)
