"""Training attention: packed samples see themselves alone, and nothing else differs from transformers' sdpa."""

import pytest
import torch
from zeroed import stock_model

from atp.models import attention
from atp.models.attention import NAME, training_mask, use_training_attention
from atp.removal import cut_model, reference_logits
from atp.spaces.space import MaskSpace

LENGTHS = ((3, 1, 6), (10,), (2, 8), (5, 5))  # samples of each window of 10 tokens
POSITIONS = torch.tensor([[position for n in row for position in range(n)] for row in LENGTHS])


def build(kind):
    window = {"sliding_window": 4} if kind == "sliding" else {}
    model = stock_model({"sliding": "mistral", "cut": "llama"}.get(kind, kind), **window)
    if kind == "cut":
        space = MaskSpace.from_config(model.config)
        model = cut_model(model, space, torch.arange(space.size) % 3 > 0)
    return model


def ids(seed=1):
    return torch.randint(1, 61, (4, 10), generator=torch.Generator().manual_seed(seed))


def training_logits(model, input_ids, position_ids):
    mask = training_mask(input_ids, position_ids, getattr(model.config, "sliding_window", None))
    return model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "sliding", "cut"])
@torch.no_grad()
def test_packed_samples_give_the_logits_of_each_alone_and_one_sample_a_row_is_plain_causal(kind):
    model, input_ids = build(kind), ids()
    alone = [model(input_ids=part[None], use_cache=False).logits[0]
             for row, lengths in zip(input_ids, LENGTHS, strict=True) for part in row.split(lengths)]  # fmt: skip
    joined = model(input_ids=input_ids, use_cache=False).logits
    use_training_attention(model)
    packed = training_logits(model, input_ids, POSITIONS)
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), rtol=1e-9, atol=1e-9)
    assert (packed - joined).abs().max() > 0.01, "the samples of a joined window see each other"
    plain = training_logits(model, input_ids, None)
    torch.testing.assert_close(plain, joined, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "sliding", "cut"])
@torch.no_grad()
def test_other_passes_are_those_of_sdpa(kind):
    model, input_ids = build(kind), ids()
    padding = (torch.arange(10) >= torch.tensor([[0], [3], [1], [6]])).long()
    inputs = {"input_ids": input_ids * padding, "attention_mask": padding}
    options = {"max_new_tokens": 4, "do_sample": False}
    stock = model(**inputs).logits, model.generate(**inputs, **options)
    use_training_attention(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model(**inputs).logits, stock[0])
    assert torch.equal(model.generate(**inputs, **options), stock[1])


@pytest.mark.parametrize("window", [None, 1, 3, 10])
@pytest.mark.parametrize("positions", [None, POSITIONS])
def test_mask_entry_by_entry(positions, window):
    mask = training_mask(ids(), positions, window)
    if positions is None and window in (None, 10):
        assert mask.shape == (1, 1, 0, 0), "the fused causal kernel takes no mask"
        return
    sample = torch.arange(4)[:, None] * 0 if positions is None else (positions == 0).cumsum(1)
    for row in range(4):
        for q in range(10):
            for k in range(10):
                seen = k <= q and (positions is None or sample[row, q] == sample[row, k])
                assert mask.expand(4, -1, -1, -1)[row, 0, q, k] == (seen and (window is None or q - k < window))


@pytest.mark.parametrize("kind", ["llama", "cut"])
@pytest.mark.parametrize("form", ["certificate", "training"])
@torch.no_grad()
def test_float32_on_cuda_is_fused_with_a_key_for_each_query(monkeypatch, kind, form):
    """Its kernel takes no groups: the other one would hold the scores of whole windows. 16 bits have one that does."""
    called = []

    def noting(query, key, value, *arguments, **options):
        called.append((query.dtype, query.shape[1] // key.shape[1], bool(options.get("enable_gqa"))))
        return fused(query, key, value, *arguments, **options)

    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    model, input_ids = build(kind).bfloat16().float(), ids()  # weights that both dtypes hold
    stock = model(input_ids=input_ids, use_cache=False).logits
    assert set(called) == {(torch.float32, 2, True)}, "as transformers calls it"
    monkeypatch.setattr(attention, "UNGROUPED_ON", ("cpu",))
    monkeypatch.setattr(attention, "suits", lambda *_: False)  # whether a CPU has a faster one
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        called.clear()
        if form == "certificate":
            logits = reference_logits(model, input_ids)  # widens what is narrower
            assert set(called) == {(torch.float32, 1, False)} and model.config._attn_implementation == "sdpa"
        else:
            use_training_attention(model)
            logits = training_logits(model, input_ids, None)
            assert set(called) == {(dtype, 1, False) if dtype == torch.float32 else (dtype, 2, True)}
    torch.testing.assert_close(logits, stock, rtol=1e-4, atol=1e-4)
