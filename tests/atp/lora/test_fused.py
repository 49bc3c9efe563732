"""Kept slices and the fused MLP compute what separate masked layers compute; slices are made again only when needed."""

import functools
import types

import pytest
import torch
from tiny_lora import ALPHA, RANK, base_model, masked, random_mask, tokens
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from atp.lora import decoder_layer
from atp.lora import layer as lora_layer
from atp.lora.attention import FusedAttention
from atp.lora.controller import MaskController
from atp.lora.decoder_layer import FusedLayer, FusedRMSNorm, unfuse_layer
from atp.lora.layer import MaskedMLP, MaskedPeftLinear, add_lora, stock_modules, unload
from atp.models import attention
from atp.models.attention import use_training_attention
from atp.removal import cut_model
from atp.spaces.space import MaskSpace
from atp.training.offload import recompute_layers
from atp_kernels import extension


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def apart(model):
    """The same model with three linears in each MLP and masks in the place of slices."""
    for mlp in (m for m in model.modules() if isinstance(m, MaskedMLP)):
        mlp.activation = None
    for linear in (m for m in model.modules() if isinstance(m, MaskedPeftLinear)):
        linear.kept = None
    return model


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_whole_heads_and_channels_lie_kept_first(space_name):
    """No activation is gathered or spread where an order can be kept from producer to consumer."""
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 80}
    if space_name == "disp":
        wide |= {"hidden_size": 128, "initializer_range": 0.1}
    channels = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    model, space = masked(space_name=space_name, **wide)
    every_second = torch.arange(space.size) % 2 == 1  # all structures are of even size
    MaskController(model, space).set(every_second, "hard")
    for name, linear in model.named_modules():
        if isinstance(linear, MaskedPeftLinear):
            sides = [(axis, side) for axis, side in enumerate(linear.kept.sides) if side is not None]
            assert len(sides) == (2 if space_name == "disp" and ".mlp." in name else 1)
            for axis, side in sides:
                whole_heads = space_name == "kv_group" and ".self_attn." in name
                assert side.kept_first == (whole_heads or channels.get(name.rsplit(".", 1)[-1]) == axis)
                assert not side.place.equal(torch.arange(side.place.numel()))
    assert_same(loss_and_gradients(model), loss_and_gradients(apart(model)))


def test_hooks_of_linears_are_called():
    model, _ = masked()
    linears = [m for m in model.modules() if isinstance(m, MaskedPeftLinear)]
    for method in ("register_forward_hook", "register_forward_pre_hook"):
        seen = []
        handles = [getattr(one, method)(lambda module, *_: seen.append(module)) for one in linears]  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16):
            loss_and_gradients(model)
        assert set(seen) == set(linears)
        for handle in handles:
            handle.remove()


def test_norms_write_what_the_linears_would_cast_to():
    """Under autocast q, k, v and the MLP get bfloat16; the loss and its gradients are as close to float32 as before."""
    model, _ = masked()
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    exact = loss_and_gradients(model)
    assert set(seen) == {torch.float32}
    errors = []
    for norms in (FusedRMSNorm, LlamaRMSNorm):
        for layer in model.get_base_model().model.layers if norms is LlamaRMSNorm else ():
            for name in ("input_layernorm", "post_attention_layernorm"):
                fused, stock = getattr(layer, name), LlamaRMSNorm(16, getattr(layer, name).variance_epsilon)
                assert isinstance(fused, FusedRMSNorm)
                stock.weight = fused.weight
                setattr(layer, name, stock)
        del seen[:]
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradients(model)
        assert set(seen) == ({torch.bfloat16} if norms is FusedRMSNorm else {torch.float32})
        errors.append(sum(float((found[name] - value).square().sum()) for name, value in exact.items()) ** 0.5)
    assert errors[0] <= 1.5 * errors[1]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def fused(request, monkeypatch):
    """With and without the parts of attention that are fused on a GPU alone."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(attention, "FUSED_ON", ("cpu",))
        monkeypatch.setenv("ATP_KERNELS_BACKEND", "reference")
    calls = []
    for module, name in ((lora_layer, "masked_lora_swiglu"), (attention, "masked_lora_qkv")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, call=call, name=name, **k: calls.append(name) or call(*a, **k))
    yield
    assert set(calls) == {"masked_lora_swiglu"} | ({"masked_lora_qkv"} if "GPU" in request.param else set())


@pytest.mark.parametrize("form", [None, "hard"])
def test_dropout_is_fused_and_drops_what_the_separate_layers_do(form, fused, monkeypatch):
    """From one seed for all, which separate layers of one input must have.

    All channels stay: kept first, they would lie in another order under the same draws.
    """
    for module in (lora_layer, attention):
        monkeypatch.setattr(module, "new_seed", lambda x: 5)
    model, space = masked(dropout=0.4)
    mask = random_mask(space)
    for structure in (s for s in space.structures if s.name == "mlp"):
        mask[structure.span] = True
    controller = MaskController(model.train(), space)
    if form is not None:
        controller.set(mask, form)
    found = loss_and_gradients(model)
    monkeypatch.setattr(attention, "FUSED_ON", ())
    expected, without = loss_and_gradients(apart(model)), loss_and_gradients(model.eval())
    assert_same(found, expected)
    assert (found["loss"] - without["loss"]).abs() > 1e-3


def test_every_input_has_a_seed_of_its_own_that_checkpointing_draws_again(fused, monkeypatch):
    model, space = masked(dropout=0.4)
    MaskController(model.train(), space).set(random_mask(space), "hard")
    seeds = []
    for module in (lora_layer, attention):
        draw = module.new_seed
        monkeypatch.setattr(module, "new_seed", lambda x, draw=draw: seeds.append(draw(x)) or seeds[-1])
    torch.manual_seed(5)
    expected = loss_and_gradients(model)
    drawn = sorted(map(int, seeds))
    of_attention = 2 if attention.FUSED_ON == ("cpu",) else 4
    assert len(set(drawn)) == len(drawn) == 2 * (of_attention + 2)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    seeds.clear()
    torch.manual_seed(5)
    found = loss_and_gradients(model)
    assert sorted(map(int, seeds)) == sorted(drawn * 2)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_linears_that_drop_with_other_probabilities_stay_apart(monkeypatch):
    """Where somebody has put one linear in eval mode."""
    model, _ = masked(dropout=0.4)
    layer = model.train().get_base_model().model.layers[0]
    layer.mlp.up_proj.eval()
    layer.self_attn.k_proj.eval()
    monkeypatch.setattr(attention, "FUSED_ON", ("cpu",))
    for module, name in ((lora_layer, "masked_lora_swiglu"), (attention, "masked_lora_qkv")):
        monkeypatch.setattr(module, name, None)
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    attention.project(layer.self_attn, x)
    layer.mlp(x)


def test_decision_steps_drop_nothing():
    model, space = masked(dropout=0.4)
    MaskController(model.train(), space).set(random_mask(space).float() * 0.7, "soft")
    found = loss_and_gradients(model)
    expected = loss_and_gradients(model.eval())
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_masks_that_the_block_does_not_know_take_the_separate_layers():
    """One mask on one of the three linears alone."""
    model, _ = masked()
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    mlp.up_proj.set_masks(torch.arange(20) % 3 > 0, None)
    with torch.no_grad():
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        assert torch.equal(mlp(x), expected)
        mlp.up_proj.set_masks(None, None)
        assert (mlp(x) - expected).abs().max() > 1e-3


def slices(model):
    return {name: m.kept for name, m in model.named_modules() if isinstance(m, MaskedPeftLinear)}


def test_slices_are_made_again_only_where_decisions_changed():
    model, space = masked()
    controller, mask = MaskController(model, space), random_mask(space)
    controller.set(mask, "hard")
    first = slices(model)
    controller.clear()
    assert not any(slices(model).values())
    controller.set(mask.clone(), "hard")
    assert slices(model) == first
    structure = next(s for s in space.layer(1) if s.name == "vo")
    mask[structure.start + 1] ^= True
    controller.set(mask, "hard")
    changed = {name.split(".layers.")[1] for name, kept in slices(model).items() if kept is not first[name]}
    assert changed == {"1.self_attn.v_proj", "1.self_attn.o_proj"}


def test_cut_model_keeps_the_fused_mlp():
    model, space = masked()
    cut = cut_model(model, space, random_mask(space))
    fused = [name for name, module in cut.named_modules() if isinstance(module, MaskedMLP)]
    assert len(fused) == space.num_layers
    assert_same(loss_and_gradients(cut), loss_and_gradients(apart(cut)))


@pytest.mark.skipif(extension.REASON is not None, reason=str(extension.REASON))
@pytest.mark.parametrize("watched", ["nothing", "saliency", "a hook"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_layer_of_two_calls_computes_its_blocks(cut, watched, monkeypatch):
    """Bit by bit, what the same layer computes as norm, block and residual connection one after the other."""
    model, space = masked(space_name="kv_group")
    use_training_attention(model.get_base_model())
    if cut:
        model = cut_model(model, space, random_mask(space))
    layers = model.get_base_model().model.layers
    assert all(isinstance(layer, FusedLayer) for layer in layers)
    seen, calls = [], []
    for home, name in ((decoder_layer, "attend_packed"), (lora_layer, "packed_mlp")):
        real = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *given, real=real: calls.append(given) or real(*given))
    if watched == "a hook":
        layers[0].post_attention_layernorm.register_forward_hook(lambda module, given, y: seen.append(y))
        layers[1].self_attn.register_forward_pre_hook(lambda *given, **options: seen.append(given), with_kwargs=True)

    def step():
        sums = {}
        for layer in layers:
            inner = layer.mlp.gate_proj.out_features
            shared = torch.zeros(len(tokens()), inner) if watched == "saliency" else None
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).observe(0, shared)
            sums[layer] = shared
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradients(model)
        return found, [part for part in sums.values() if part is not None]

    found, sums = step()
    with_norm = [given for given in calls if any(isinstance(p, tuple) and isinstance(p[-1], float) for p in given)]
    assert len(with_norm) == (1 if watched == "a hook" else 2 * len(layers))
    assert len(seen) == (2 if watched == "a hook" else 0)
    recompute_layers(model)
    recomputed = step()
    model.gradient_checkpointing_disable()
    for layer in layers:
        unfuse_layer(layer)
        assert not isinstance(layer, FusedLayer)
    for expected, others in (recomputed, step()):
        assert found.keys() == expected.keys() and len(found) > 10
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(torch.equal(one, other) and one.any() for one, other in zip(sums, others, strict=True))


class LigerRMSNorm(torch.nn.Module):
    """Has what Liger's norm has, and stands where that stands after `apply_liger_kernel_to_llama`."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x):
        return LlamaRMSNorm.forward(self, x)


def another_forward(kind):
    """A forward as Liger and `kernelize` bring one: defined elsewhere, even where it takes the other's name."""

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        return kind.__dict__["stock_forward"](self, *args, **kwargs)

    return forward


def served(module, how, monkeypatch):
    """The module, or another in its place, as somebody else serves it."""
    kind = type(module)
    monkeypatch.setattr(kind, "stock_forward", kind.forward, raising=False)
    if how == "function":
        (rotary,) = vars(module).get("_kernel_funcs", {}).values() or pytest.skip("transformers without `kernels`")
        rotary.forward = types.MethodType(lambda self, *args: self(*args), type(rotary)())
    elif how == "object":
        module.forward = types.MethodType(another_forward(kind), module)
    elif how == "class's forward":
        monkeypatch.setattr(kind, "forward", another_forward(kind))
    elif how == "subclass":
        module.__class__ = type("Served", (kind,), {"__module__": "liger_kernel", "forward": another_forward(kind)})
    else:
        module = LigerRMSNorm(16, module.variance_epsilon)
    return module


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("name", "how"),
    [("input_layernorm", "class"), ("self_attn", "function")]
    + [(n, h) for n in ("input_layernorm", "self_attn", "mlp") for h in ("object", "class's forward", "subclass")],
)
def test_what_somebody_else_serves_is_left_alone(name, how, sharded, monkeypatch):
    """One module of one layer, or where its class is changed that of all; the others are fused. It comes back too."""
    monkeypatch.setattr(lora_layer, "is_sharded", lambda model: sharded)
    model = base_model()
    first = model.model.layers[0]
    first.set_submodule(name, served(first.get_submodule(name), how, monkeypatch))
    module, kind, logits = first.get_submodule(name), type(first.get_submodule(name)), model(tokens()).logits
    modules = stock_modules(model)
    space = MaskSpace.from_config(model.config, "head_dim")
    wrapped = add_lora(model, space, r=RANK, alpha=ALPHA, dropout=0.0)
    layers = wrapped.get_base_model().model.layers
    assert layers[0].get_submodule(name) is module and type(module) is kind
    fused = {"input_layernorm": FusedRMSNorm, "self_attn": FusedAttention, "mlp": MaskedMLP}
    everywhere = how == "class's forward"
    for i, layer in enumerate(layers):
        for other, block in fused.items():
            stays = other == name and (i == 0 or everywhere)
            assert isinstance(layer.get_submodule(other), block) is not stays
    assert_close(wrapped(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
    if not sharded:
        assert torch.equal(unload(wrapped, modules)(tokens()).logits, logits)
        assert first.get_submodule(name) is module and type(module) is kind
        assert type(layers[1].mlp) is LlamaMLP and type(layers[1].self_attn) is LlamaAttention
