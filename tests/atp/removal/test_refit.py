"""Readers of a cut fitted to the inputs that stay: exact where these tell everything, least squares elsewhere."""

import pytest
import torch
from torch.testing import assert_close
from zeroed import HEAD_DIM, INNER, LAYERS, random_mask, stock_model, tokens

from atp.families import family_of
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.layers import block_output, first_layer_inputs, run_block
from atp.removal.cut import cut_model
from atp.removal.refit import DAMPINGS, Pair, in_place, moments_of, refit
from atp.spaces.space import MaskSpace
from atp.training.data import refit_batch


def wrapped(model, space, filled=True):
    model = add_lora(model, space, r=3, alpha=6.0, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if filled and "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(torch.float64)


def batches(count=4, seed=0):
    return [{"input_ids": tokens(windows=4, length=24, seed=seed + i)} for i in range(count)]


def fit(model, space, mask, **options):
    return refit(model.get_base_model().model, MaskController(model, space), space, mask, batches(), **options)


def twins(model):
    """The second half of the channels, of the value dimensions and of the KV groups say what the first half says."""
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[INNER // 2 :] = linear.weight[: INNER // 2]
            values = layer.self_attn.v_proj.weight.view(-1, HEAD_DIM, linear.in_features)
            values[:, HEAD_DIM // 2 :] = values[:, : HEAD_DIM // 2]
    return model


def test_removing_what_others_say_too_changes_nothing():
    model = twins(stock_model())
    space = MaskSpace.from_config(model.config)
    mask = torch.ones(space.size, dtype=torch.bool)
    for structure in space.structures:
        if structure.name in ("vo", "mlp"):
            mask[structure.start + structure.size // 2 : structure.start + structure.size] = False
    ids = tokens(windows=2, length=20, seed=9)
    with torch.no_grad():
        expected = model(ids).logits
        model = wrapped(model, space, filled=False)
        damaged = cut_model(model, space, mask)(ids).logits
        fit(model, space, mask, damping=1e-12)
        mended = cut_model(model, space, mask)(ids).logits
    assert (damaged - expected).abs().max() > 0.1
    assert_close(mended, expected, atol=1e-5, rtol=1e-5)


FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 20, "attn_implementation": "eager"},
}
CASES = [(family, name) for family in FAMILIES for name in ("head_dim", "kv_group", "disp")]
CASES.remove(("gemma2", "disp"))


def streams(model, outputs=False):
    """The residual stream after both blocks of every layer of the whole model, [tokens, hidden] over all batches.

    outputs: what the blocks give instead.
    """
    seen = [[] for _ in range(2 * LAYERS)]
    hooks = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        after = layer.post_attention_layernorm
        if outputs:
            for place, linear in enumerate((layer.self_attn.o_proj, layer.mlp.down_proj)):
                keep = seen[2 * index + place]
                hooks.append(linear.register_forward_hook(lambda _, args, out, to=keep: to.append(out)))
            continue
        hooks.append(after.register_forward_pre_hook(lambda _, args, to=seen[2 * index]: to.append(args[0])))
        hooks.append(layer.register_forward_hook(lambda _, args, out, to=seen[2 * index + 1]: to.append(out)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).flatten(0, 1) for parts in seen]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_weights_are_the_ridge_solution_layer_after_layer(name, family):
    """Against torch.linalg.lstsq on what the cut stream lacks, gathered by hand from the whole and the cut layers.

    Where a norm reads what a block gives, on what these outputs lack, as a share of their size in each token.
    """
    stock = stock_model(family, **FAMILIES[family])
    model = wrapped(stock, MaskSpace.from_config(stock.config, name))
    space = MaskSpace.from_config(model.get_base_model().config, name)
    mask, controller, decoder = random_mask(space), MaskController(model, space), model.get_base_model().model
    before, whole = {n: p.clone() for n, p in decoder.named_parameters()}, streams(model, family == "gemma2")
    fitted = fit(model, space, mask, damping=0.01)
    after = {n: p.clone() for n, p in decoder.named_parameters()}
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == set(fitted)
    readers = ["mlp.down_proj"] if name == "disp" else ["self_attn.o_proj", "mlp.down_proj"]  # disp: its mlp alone
    assert set(fitted) == {f"layers.{i}.{reader}.base_layer.weight" for i in range(LAYERS) for reader in readers}
    runs = [first_layer_inputs(decoder, batch) for batch in batches()]
    states, multiplier = [x for x, _ in runs], FAMILIES[family].get("residual_multiplier", 1.0)
    for index, layer in enumerate(decoder.layers):
        for place, block in enumerate(family_of(stock.config).blocks):
            reader = next((reader for reader in readers if reader.startswith(block.module)), None)
            run = block_output if family == "gemma2" else run_block
            if reader:
                linear, inputs, weight = layer.get_submodule(reader), [], f"layers.{index}.{reader}.base_layer.weight"
                linear.get_base_layer().weight.data = before[weight].clone()
                hook = linear.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0].flatten(0, 1)))
                with torch.no_grad(), controller.masks(mask, "sum"):
                    cut = [run(layer, block, x, given) for x, (_, given) in zip(states, runs, strict=True)]
                hook.remove()
                ((structure, side),) = [
                    (s, c) for s in space.layer(index) for c in s.cuts if (c.module, c.axis) == (reader, 1)
                ]
                kept = mask[structure.span][side.owner]
                x, lacks = torch.cat(inputs)[:, kept], (whole[2 * index + place] - torch.cat(cut).flatten(0, 1))
                if family == "gemma2":
                    sizes = whole[2 * index + place].square().mean(-1, keepdim=True).sqrt()
                    x, lacks = x / sizes, lacks / sizes
                squares = x.square().sum(0)
                root = (0.01 * (squares + 1e-3 * squares.mean())).sqrt().diag()
                right = torch.cat([lacks / multiplier, torch.zeros(len(root), lacks.shape[1], dtype=x.dtype)])
                expected = before[weight].clone()
                expected[:, kept] += torch.linalg.lstsq(torch.cat([x, root]), right).solution.T
                assert_close(after[weight], expected, atol=1e-4, rtol=1e-4)
                linear.get_base_layer().weight.data = after[weight]
            with torch.no_grad(), controller.masks(mask, "sum"):
                states = [run_block(layer, block, x, a) for x, (_, a) in zip(states, runs, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_how_windows_are_batched_changes_nothing(size):
    """Five windows of two lengths, one by one and together, where padding is not fitted to."""
    texts = [tokens(windows=1, length=24 - 9 * (i % 2), seed=i)[0] for i in range(5)]
    data = [{"input_ids": ids, "labels": ids} for ids in texts]
    fitted = []
    for at_once in (1, size):
        stock = stock_model()
        space = MaskSpace.from_config(stock.config)
        model = wrapped(stock, space)
        made = [refit_batch(data, range(i, min(i + at_once, 5)), torch.device("cpu")) for i in range(0, 5, at_once)]
        assert ["text" in batch for batch in made] == [len({len(t) for t in texts[i : i + at_once]}) > 1
                                                       for i in range(0, 5, at_once)]  # fmt: skip
        decoder, mask = model.get_base_model().model, random_mask(space)
        fitted.append(refit(decoder, MaskController(model, space), space, mask, made, damping=0.05))
    assert fitted[0].keys() == fitted[1].keys()
    for name, weight in fitted[0].items():
        assert_close(fitted[1][name], weight, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 700])
def test_moments_are_those_of_whole_products(width):
    """Also of more inputs than one product on the diagonal takes, and of more tokens than one product takes."""
    generator = torch.Generator().manual_seed(width)
    read = [torch.randn(3, 1700, width + 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    lost = [torch.randn(3, 1700, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    kept = torch.ones(width + 2, dtype=torch.bool)
    kept[[0, width // 2 + 1]] = False
    weight = torch.zeros(5, width + 2, dtype=torch.float64)
    pairs = list(map(Pair, (0, 1), map(in_place, read), map(in_place, lost)))
    found = moments_of(pairs, weight=weight, kept=kept, together=False)
    x, y = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (read, lost))
    x = x[:, kept]
    for got, expected in zip(found, (x.T @ x, x.T @ y, y.square().sum(), torch.tensor(2.0).double()), strict=True):
        assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_an_input_that_is_almost_always_zero_gets_no_large_weight():
    """It is fitted by a single token, and may be a thousand times as large in other text."""
    generator = torch.Generator().manual_seed(0)
    read, lost = torch.randn(500, 20, generator=generator), torch.randn(500, 4, generator=generator)
    read[:, 3] = 0
    read[7, 3] = 1e-3
    whole = torch.ones(20, dtype=torch.bool)
    pairs = [Pair(0, in_place(read), in_place(lost))]
    sums = moments_of(pairs, weight=torch.zeros(4, 20), kept=whole, together=False)
    for damping in DAMPINGS:
        added = sums.ridge(damping, torch.float64)
        assert 0 < added[3].abs().max() < added.abs().max()


def last_mlp(space):
    """A mask that removes half of the channels of the last block."""
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[space.structures[-1].start :: 2] = False
    return mask


@pytest.mark.parametrize(
    ("token", "others", "best"),
    [(None, 7, 1.0), (1, 7, None), (2, 7, 0.03), (3, 7, 1.0), (None, 3, 3.0), (1, 2, None), (2, 1, None)],
)
def test_lambda_is_the_best_one_on_every_eighth_batch_or_the_last_of_fewer(token, others, best):
    """Against what each lambda, fitted to the others, leaves of the streams' difference on the last batch: text, or one
    token all over. No fit to the seven helps on token 1, so that the weights stay as they are.
    """
    space = MaskSpace.from_config(stock_model().config)
    mask, seen = last_mlp(space), [{"input_ids": tokens(windows=1, length=2, seed=i)} for i in range(others)]
    ids = tokens(windows=1, length=24, seed=50) if token is None else torch.full((1, 24), token)
    every = [*seen, {"input_ids": ids}]

    def refitted(batches, **options):
        model = wrapped(stock_model(), space)
        controller, last = MaskController(model, space), model.get_base_model().model.layers[-1]
        changed = refit(model.get_base_model().model, controller, space, mask, batches, **options) if batches else {}
        outputs = []
        last.register_forward_hook(lambda module, args, out: outputs.append(out))
        with torch.no_grad():
            model(ids)
            with controller.masks(mask, "sum"):
                model(ids)
        return changed, outputs, last.mlp.down_proj.get_base_layer().weight

    _, (whole, cut), before = refitted([])
    errors = {None: (whole - cut).square().sum()}
    for damping in DAMPINGS:
        errors[damping] = (whole - refitted(seen, damping=damping)[1][1]).square().sum()
    assert min(errors, key=errors.get) == best
    changed, _, weight = refitted(every)
    if best is None:
        assert changed == {} and torch.equal(weight, before)
    else:
        assert_close(weight, refitted(every, damping=best)[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["head_dim", "kv_group", "disp"])
def test_the_cut_model_is_nearer_to_the_whole_one_on_other_text(name):
    model = wrapped(stock_model(), MaskSpace.from_config(stock_model().config, name), filled=False)
    space = MaskSpace.from_config(model.get_base_model().config, name)
    mask, ids = random_mask(space, keep=0.8), tokens(windows=4, length=24, seed=50)
    for structure in space.structures if name == "disp" else ():
        if structure.name != "mlp":  # nothing makes up for what a block does not read or write
            mask[structure.span] = True
    with torch.no_grad():
        whole = model(ids).logits
        before = (cut_model(model, space, mask)(ids).logits - whole).square().mean()
        fit(model, space, mask)
        after = (cut_model(model, space, mask)(ids).logits - whole).square().mean()
    assert after < (0.97 if name == "disp" else 0.9) * before, "disp refits one of the two readers"


def test_nothing_removed_changes_nothing():
    model = wrapped(stock_model(), MaskSpace.from_config(stock_model().config))
    space = MaskSpace.from_config(model.get_base_model().config)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert fit(model, space, torch.ones(space.size, dtype=torch.bool)) == {}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len(space.structures) == 3 * LAYERS


def test_inputs_that_are_all_zero_leave_weights_finite():
    model = stock_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
    model = wrapped(model, MaskSpace.from_config(model.config), filled=False)
    space = MaskSpace.from_config(model.get_base_model().config)
    fitted = fit(model, space, random_mask(space))
    assert all(weight.isfinite().all() for weight in fitted.values())
