"""Masked LoRA layers against stock PEFT, a float64 formula, and a stock model with zeroed weights."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as StockLora
from tiny_lora import ALPHA, RANK, base_model, masked, random_mask, stock, tokens
from torch.testing import assert_close

from atp.lora.controller import MaskController
from atp.lora.layer import MaskedPeftLinear, add_lora, fuse_layers
from atp.spaces.space import MaskSpace


def loss_and_gradients(model, seed=0):
    torch.manual_seed(seed)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ones", [False, True], ids=["no masks", "all-ones masks"])
def test_equals_stock_lora_in_training(ones):
    """Same weights: forward and every gradient agree."""
    ours, space = masked()
    theirs = stock()
    if ones:
        MaskController(ours, space).set(torch.ones(space.size, dtype=torch.bool), "hard")
    loss, gradients = loss_and_gradients(ours.train())
    expected_loss, expected = loss_and_gradients(theirs.train())
    assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys() and all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("sliced", [False, True])
def test_dropout_is_that_of_stock_lora_on_average(sliced):
    """Bits are drawn by seed and not by `bernoulli_`: the mean output over many draws is that without dropout."""
    ours, space = masked(dropout=0.4)
    layer = ours.train().get_base_model().model.layers[0].self_attn.o_proj
    if sliced:
        MaskController(ours, space).set(random_mask(space), "hard")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(2000)])
        expected = layer.eval()(x)
        assert torch.equal(layer(x), expected)
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5
    torch.manual_seed(0)
    assert torch.equal(layer.train()(x), draws[0])


def test_initial_adapter_is_that_of_stock_peft():
    base = base_model()
    space = MaskSpace.from_config(base.config)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ours = add_lora(base, space, r=RANK, alpha=ALPHA, dropout=0.1, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    again = add_lora(base_model(), space, r=RANK, alpha=ALPHA, dropout=0.1, seed=5)
    other = add_lora(base_model(), space, r=RANK, alpha=ALPHA, dropout=0.1, seed=6)
    named = [{n: p for n, p in m.named_parameters() if "lora_" in n} for m in (ours, again, other)]
    assert all(torch.equal(p, named[1][n]) for n, p in named[0].items())
    assert all(bool(p.any()) == ("lora_A" in n) for n, p in named[0].items())
    assert not any(torch.equal(p, named[2][n]) for n, p in named[0].items() if "lora_A" in n)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(named[0])


@pytest.mark.parametrize(
    ("variant", "flag", "dropout"),
    [("rslora", "use_rslora", 0.0), ("dora", "use_dora", 0.0), ("dora", "use_dora", 0.2)],
)
def test_a_variant_learns_what_peft_learns_step_by_step(variant, flag, dropout):
    """In float64, as its own layers compute it; DoRA's dropout is PEFT's, bit for bit."""
    ours = masked(dropout=dropout, variant=variant)[0].double().train()
    theirs = stock(dropout=dropout, flags={flag: True}).double().train()
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0].keys() == trained[1].keys()
    optimizers = [torch.optim.AdamW(found.values(), lr=1e-2) for found in trained]
    for step in range(4):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_and_gradients(model, seed=step)[0])
            optimizer.step()
        assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
        for name, value in trained[0].items():
            assert_close(value, trained[1][name], rtol=1e-7, atol=1e-9, msg=name)


def test_magnitudes_are_not_rounded_to_16_bits():
    """They are the norms of the rows, and a row that starts with another norm is another model."""
    base = base_model(torch.bfloat16)
    rows = {
        n.removesuffix(".weight"): p.double().norm(dim=1) for n, p in base.named_parameters() if "_proj.weight" in n
    }
    model = add_lora(base, MaskSpace.from_config(base.config), r=RANK, alpha=ALPHA, dropout=0.0, variant="dora")
    found = {
        n.removesuffix(".lora_magnitude_vector.default.weight"): p
        for n, p in model.get_base_model().named_parameters()
        if "magnitude" in n
    }
    assert found.keys() == rows.keys()
    for name, magnitude in found.items():
        assert_close(magnitude, rows[name].float(), rtol=1e-6, atol=0)


def test_dora_has_no_base_path_to_mask_alone():
    model, space = masked(variant="dora")
    for form in ("hard", "base"):
        with MaskController(model, space).masks(random_mask(space), form):
            with pytest.raises(RuntimeError, match="DoRA has no base path to mask alone"):
                model(input_ids=tokens())


@pytest.mark.parametrize("form", ["soft", "hard", "sum"])
@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_forms_set_the_sides_of_the_method(form, space_name):
    """soft: sum, where values do not arrive masked. hard: base path, both sides. sum: sum, both sides."""
    model, space = masked(space_name=space_name)
    flat = random_mask(space).float() if form == "soft" else random_mask(space)
    controller = MaskController(model, space)
    layers = model.get_base_model().model.layers
    with controller.masks(flat, form):
        for layer, module, out_mask, in_mask in space.module_masks(flat):
            found = layers[layer].get_submodule(module)
            assert found.mask_lora == (form != "hard")
            masked_already = form == "soft" and module in ("self_attn.o_proj", "mlp.down_proj")
            for mask, expected in ((found.out_mask, out_mask), (found.in_mask, None if masked_already else in_mask)):
                assert (mask is None) == (expected is None) and (mask is None or torch.equal(mask, expected))
    cleared = [m for m in model.modules() if isinstance(m, MaskedPeftLinear)]
    assert all(m.out_mask is None and m.in_mask is None and not m.mask_lora for m in cleared)


def test_hard_mask_keeps_the_lora_gradient_of_removed_outputs():
    """docs/method.md section 3: LoRA of a removed structure still learns, so that the structure can come back."""
    model, space = masked()
    mask = torch.ones(space.size, dtype=torch.bool)
    structure = next(s for s in space.layer(0) if s.name == "mlp")
    mask[structure.start + 3] = False
    factor = model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight
    rows = {}
    for form in ("hard", "sum"):
        model.zero_grad()
        with MaskController(model, space).masks(mask, form):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        rows[form] = factor.grad[3].abs().max()
    assert rows["hard"] > 0 and rows["sum"] == 0


def test_adapter_loads_into_stock_peft(tmp_path):
    model, _ = masked(dropout=0.1)
    model.eval().save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "atp" not in (tmp_path / "adapter_config.json").read_text().lower()
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert type(reloaded.get_base_model().model.layers[0].mlp.up_proj) is StockLora
    fuse_layers(reloaded)  # the norms: those of transformers round in another order
    with torch.no_grad():
        assert_close(reloaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits, rtol=1e-5, atol=1e-6)


def test_disabled_and_merged_layers_are_those_of_stock_peft():
    model, _ = masked()
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        with model.disable_adapter():
            assert_close(model(input_ids=tokens()).logits, base_model().eval()(tokens()).logits)
        model.merge_adapter()
        assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_masks_on_a_merged_or_disabled_layer_are_refused():
    model, space = masked()
    with MaskController(model, space).masks(random_mask(space), "sum"):
        with model.disable_adapter(), pytest.raises(RuntimeError, match="masks are set on a merged or disabled"):
            model(input_ids=tokens())


def test_controller_refuses_a_model_without_masked_layers():
    model = stock()
    space = MaskSpace.from_config(model.config)
    with pytest.raises(RuntimeError, match="14 linears .* carry no MaskedPeftLinear: wrap with add_lora"):
        MaskController(model, space)


def test_controller_clears_after_an_error():
    model, space = masked()
    controller = MaskController(model, space)
    with pytest.raises(KeyError), controller.masks(random_mask(space), "hard"):
        raise KeyError
    assert model.get_base_model().model.layers[0].mlp.up_proj.out_mask is None


@torch.no_grad()
def test_slices_of_changed_base_weights_are_refused_until_they_are_forgotten():
    model, space = masked()
    controller, mask = MaskController(model, space), random_mask(space)
    controller.set(mask, "hard")
    model(input_ids=tokens())
    for module in model.modules():
        if isinstance(module, MaskedPeftLinear):
            module.get_base_layer().weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="changed in place after it was made: make a new slice"):
        model(input_ids=tokens())
    controller.forget()
    controller.set(mask, "hard")
    logits = model(input_ids=tokens()).logits
    MaskController(model, space).set(mask, "hard")
    assert torch.equal(logits, model(input_ids=tokens()).logits)


@torch.no_grad()
def test_a_decision_moves_no_slice_whose_padded_widths_stay():
    """So a CUDA graph that was captured before it stays right after it."""
    model, space = masked(intermediate_size=128)
    controller, mask = MaskController(model, space), torch.ones(space.size, dtype=torch.bool)
    assert not controller.keeps_memory  # on a CPU, where no graph is captured
    controller.keeps_memory = True
    channels = next(s for s in space.structures if any(cut.module == "mlp.down_proj" for cut in s.cuts)).span
    mask[channels][-40:] = False
    controller.set(mask, "hard")
    model(input_ids=tokens())
    linears = [module for module in model.modules() if isinstance(module, MaskedPeftLinear)]
    before = {linear: (linear.kept, linear.kept.weight(torch.float32).data_ptr()) for linear in linears}
    mask[channels] = mask[channels].roll(2)
    mask[channels][5] = False  # one less, of as many multiples of 32
    controller.set(mask, "hard")
    again = [linear for linear in linears if linear.kept is not before[linear][0]]
    assert len(again) == 3 and all(linear.kept.same_memory for linear in again)
    assert all(linear.kept.weight(torch.float32).data_ptr() == before[linear][1] for linear in linears)
    logits = model(input_ids=tokens()).logits
    MaskController(model, space).set(mask, "hard")
    assert torch.equal(logits, model(input_ids=tokens()).logits)
