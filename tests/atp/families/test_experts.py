"""Experts behind a router: masks, saliency and cut against plain mathematics, and against transformers' own classes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from test_family_runs import config, windows
from tiny_families import EXPERTS, VOCAB, build, tokens
from tiny_inputs import tiny_config
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from atp.baselines.simple import magnitude_scores
from atp.baselines.uniform import uniform_mask
from atp.cli.draft import draft
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.decide.fit import exact_mask, fit_mask
from atp.decide.reach import nearest_share
from atp.decide.sampling import keep_one
from atp.decide.uniform import fit_equal
from atp.families import UnsupportedModel, family_of
from atp.ground.errors import InputError
from atp.inputs.checks import check_reachable
from atp.integrations import ATPCallback
from atp.lora.controller import MaskController
from atp.lora.experts import STACKED
from atp.lora.layer import add_lora, stock_modules, unload
from atp.models.base import check_base
from atp.models.load import read_model
from atp.models.sizes import check_against_files, check_sizes
from atp.models.stock import save_model
from atp.plan.plan import make_plan
from atp.removal import cut_model, merge_adapter
from atp.spaces import EXPERT_SPACES
from atp.spaces.space import MaskSpace
from atp.training.trainer import ATPTrainer

IN_FLOAT32 = {"rtol": 0, "atol": 1e-5}  # stock routers take their softmax in float32, whatever the dtype
RENORMALIZED = {"mixtral": True, "qwen3_moe": True, "olmoe": False, "gpt_oss": True}


class PlainExperts(nn.Module):
    """The block by its formula: softmax of the logits that are not masked, the largest few, and a sum over experts.

    kept: bool [experts], whose others have a logit of -inf. worth: [rows, experts], which multiplies what they add.
    channels: [rows, experts * inner], which multiplies what their down projections read.
    """

    def __init__(self, block, taken, renormalized):
        super().__init__()
        router = block.router if hasattr(block, "router") else block.gate
        self.router, self.up, self.down = router.weight, block.experts.gate_up_proj, block.experts.down_proj
        self.biases = None
        if hasattr(block, "router"):
            self.biases = router.bias, block.experts.gate_up_proj_bias, block.experts.down_proj_bias
            self.limit = block.experts.limit
        self.taken, self.renormalized = taken, renormalized
        self.kept, self.worth, self.channels = None, None, None

    def expert(self, x, number):
        if self.biases is None:
            gate, up = (x @ self.up[number].T).chunk(2, dim=-1)
            return self.masked(nn.functional.silu(gate) * up, number) @ self.down[number].T
        both = x @ self.up[number] + self.biases[1][number]
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        values = self.masked((up + 1) * gate * torch.sigmoid(1.702 * gate), number)
        return values @ self.down[number] + self.biases[2][number]

    def masked(self, values, number):
        if self.channels is None:
            return values
        return values * self.channels.view(len(self.channels), len(self.router), -1)[:, None, number]

    def forward(self, x):
        logits = x @ self.router.T if self.biases is None else x @ self.router.T + self.biases[0]
        if self.kept is not None:
            logits = logits.masked_fill(~self.kept, -torch.inf)
        chance, chosen = logits.softmax(-1).topk(self.taken, dim=-1)
        if self.renormalized:
            chance = chance / chance.sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for expert in range(len(self.router)):
            weight = (chance * (chosen == expert)).sum(-1)
            if self.worth is not None:
                weight = weight * self.worth[:, None, expert]
            total = total + weight[..., None] * self.expert(x, expert)
        return total if self.biases is None else (total, None)


def by_formula(model, name):
    """The model with its blocks replaced by `PlainExperts`."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.mlp = PlainExperts(layer.mlp, EXPERTS[name]["num_experts_per_tok"], RENORMALIZED[name])
    return plain


def wrapped(name, dtype=torch.float64, space="experts"):
    model = build(name, dtype)
    space = MaskSpace.from_config(model.config, space)
    lora = add_lora(copy.deepcopy(model), space, r=2, alpha=4.0, dropout=0.0).to(dtype).eval()
    return model, space, lora


def random_mask(space, equal=True, seed=1):
    """As many as a token takes and one more in every layer, or another number in each."""
    draw, mask = torch.Generator().manual_seed(seed), torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        count = structure.least + (1 if equal else structure.layer % 3)
        mask[structure.start + torch.randperm(structure.size, generator=draw)[:count]] = True
    return mask


@pytest.mark.parametrize("name", EXPERTS)
def test_what_the_table_says_is_what_transformers_builds(name):
    model = build(name)
    family, layer = family_of(model.config), model.model.layers[1]
    space = MaskSpace.from_config(model.config, "experts")
    assert Budget(space).total == sum(p.numel() for part in model.model.layers for p in part.parameters())
    norms = {n: m.weight.numel() for n, m in layer.named_modules() if type(m).__name__.endswith("RMSNorm")}
    assert family.norms(model.config) == norms
    linears = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    assert (
        linears == set(space.adapted) and layer.get_submodule(family.router).weight.shape[0] == space.layer(0)[0].size
    )


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_a_model_with_an_adapter_is_the_stock_model_and_comes_back(name):
    model = build(name)
    before, logits = {n: type(m) for n, m in model.named_modules()}, model(tokens()).logits
    stock = stock_modules(model)
    space = MaskSpace.from_config(model.config, "experts")
    lora = add_lora(model, space, r=2, alpha=4.0, dropout=0.0).eval()
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in lora.named_parameters() if ".lora_" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert_close(lora(tokens()).logits, logits, rtol=1e-5, atol=1e-5)
    plain = unload(lora, stock)
    assert {n: type(m) for n, m in plain.named_modules()} == before and torch.equal(plain(tokens()).logits, logits)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_removed_experts_have_a_logit_of_minus_infinity_and_the_cut_model_lacks_them(name, equal):
    model, space, lora = wrapped(name)
    mask, ids, plain = random_mask(space, equal), tokens(), by_formula(model, name)
    assert_close(plain(ids).logits, model(ids).logits, **IN_FLOAT32)
    for structure, layer in zip(space.structures, plain.model.layers, strict=True):
        layer.mlp.kept = mask[structure.span]
    expected = plain(ids).logits
    assert (expected - model(ids).logits).abs().max() > 0.1
    controller = MaskController(lora, space)
    for form in ("sum", "base", "hard"):
        with controller.masks(mask, form):
            assert_close(lora(ids).logits, expected, **IN_FLOAT32)
    with controller.masks(mask.float(), "soft"):
        masked = lora(ids).logits
    assert_close(lora(ids).logits, model(ids).logits, rtol=0, atol=1e-10)
    cut = cut_model(model, space, mask)
    assert_close(cut(ids).logits, expected, **IN_FLOAT32)
    assert_close(cut(ids).logits, masked, rtol=0, atol=1e-10)
    counts = space.describe(mask)["experts"]
    assert [len(layer.mlp.experts.down_proj) for layer in cut.model.layers] == counts
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut.parameters())
    assert removed == Budget(space).total - Budget(space).kept(mask)


def random_channels(space, equal=True, seed=1):
    """Of each expert others of its channels, equally many; in every layer the same number, or another in each."""
    draw, mask = torch.Generator().manual_seed(seed), torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        each = structure.size // structure.groups
        count = 5 if equal else 3 + 4 * structure.layer
        for group in range(structure.groups):
            mask[structure.start + group * each + torch.randperm(each, generator=draw)[:count]] = True
    return mask


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_removed_channels_are_zero_where_down_reads_them_and_the_cut_model_lacks_them(name, equal):
    model, space, lora = wrapped(name, space="expert_channels")
    mask, ids, plain = random_channels(space, equal), tokens(), by_formula(model, name)
    for structure, layer in zip(space.structures, plain.model.layers, strict=True):
        layer.mlp.channels = mask[None, structure.span].double()
    expected = plain(ids).logits
    assert (expected - model(ids).logits).abs().max() > 0.1
    controller = MaskController(lora, space)
    for form in ("sum", "base", "hard", "soft"):
        with controller.masks(mask.double() if form == "soft" else mask, form):
            assert_close(lora(ids).logits, expected, **IN_FLOAT32)
    assert_close(lora(ids).logits, model(ids).logits, rtol=0, atol=1e-10)
    cut = cut_model(model, space, mask)
    assert_close(cut(ids).logits, expected, **IN_FLOAT32)
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut.parameters())
    assert removed == Budget(space).total - Budget(space).kept(mask)
    again = MaskSpace.from_config(cut.config, "expert_channels")
    assert_close(cut_model(cut, again, torch.ones(again.size, dtype=torch.bool))(ids).logits, expected, **IN_FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_take_any_layout_and_no_tokens(name, dtype):
    """Strided and expanded operands, experts that nobody chose, no tokens at all; with LoRA, masked and observed."""
    model = build(name, dtype)
    space = MaskSpace.from_config(model.config, "expert_channels")
    lora = add_lora(model, space, r=2, alpha=4.0, dropout=0.0, experts=True)
    experts = lora.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    taken, size = EXPERTS[name]["num_experts_per_tok"], space.structures[0].size
    x, chosen = torch.randn(6, 64, dtype=dtype)[:, ::2], torch.arange(taken).expand(6, taken)
    weights = torch.full((1, 1), 0.5, dtype=dtype).expand(6, taken)
    experts.set_masks(torch.rand(size), None)
    experts.rows, sums = 2, torch.zeros(2, size)
    experts.observe(0, sums)
    found = experts(x, chosen, weights)
    assert torch.equal(found, experts(x.contiguous(), chosen.contiguous(), weights.contiguous()))
    x = x[:0].clone().requires_grad_()
    experts(x, chosen[:0], weights[:0]).sum().backward()
    assert x.grad.shape == x.shape and not sums.any()


def test_experts_with_unequal_numbers_of_channels_are_refused():
    """And fits never ask for them, whatever the logits."""
    model, space, _ = wrapped("qwen3_moe", torch.float32, "expert_channels")
    mask = random_channels(space)
    mask[mask.nonzero()[0]] = False
    with pytest.raises(ValueError, match="layer 0 would keep from 4 to 5 channels of its experts"):
        cut_model(model, space, mask)
    budget, (each, experts) = Budget(space), (24, 8)
    lopsided = torch.cat([torch.linspace(0, 9, space.size // 2), torch.zeros(space.size - space.size // 2)])
    for fit in (fit_mask, fit_equal, uniform_mask):
        for multiple in (1, 4):
            found = fit(lopsided, 0.7, budget, {"expert_channels": multiple})
            counts = found.view(-1, experts, each).sum(2)
            assert (counts == counts[:, :1]).all() and (counts % multiple == 0).all() and counts.min() < each


@pytest.mark.parametrize("space", EXPERT_SPACES)
@pytest.mark.parametrize("name", EXPERTS)
def test_each_sample_has_the_gradient_of_a_mask(name, space):
    """On what experts add, or on what their down projections read, summed over tokens; the forward pass stays."""
    model, space, lora = wrapped(name, space=space)
    ids, plain = tokens(), by_formula(model, name)

    def by_formula_under(mask):
        for structure, layer in zip(space.structures, plain.model.layers, strict=True):
            setattr(layer.mlp, "worth" if space.name == "experts" else "channels", mask[:, structure.span])
        return plain(ids).logits.square().mean((1, 2)).sum()

    ones = torch.ones(len(ids), space.size, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(by_formula_under(ones), ones)
    assert expected.count_nonzero() > expected.numel() // 2
    controller = MaskController(lora, space)
    for samples in (len(ids), 1):  # more samples of a batch than rows add up
        with controller.observer.observing(samples) as sums:
            logits = lora(ids).logits
            logits.square().mean((1, 2)).sum().backward()
        assert_close(logits, lora(ids).logits, rtol=0, atol=0 if space.name == "experts" else 1e-6)
        wanted = expected if samples > 1 else expected.sum(0, keepdim=True)
        assert_close(controller.observer.gradients(sums), wanted.float(), rtol=1e-4, atol=1e-6)
    # A soft mask, which is shared by the samples, has the sum; and its own values scale what it is on.
    values = (0.5 + torch.rand(space.size, dtype=torch.float64)).requires_grad_()
    with controller.masks(values, "soft"):
        found = torch.autograd.grad(lora(ids).logits.square().mean((1, 2)).sum(), values)[0]
    (expected,) = torch.autograd.grad(by_formula_under(values.expand(len(ids), -1)), values)
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", EXPERT_SPACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_run_ends_in_the_stock_class(tmp_path, name, dtype, space):
    """Observed in open steps, decided in rounds, cut, tuned, exported; read without this package in its own process."""
    model = build(name, getattr(torch, dtype), scale=0.1)
    phases = {"open": 4, "search": 0, "settle": 0, "tune": 2, "precision": dtype}
    settings = config(tmp_path, space, **phases, gradient_checkpointing=dtype == "bfloat16")
    settings = settings.model_copy(update={"decisions": settings.decisions.model_copy(
        update={"source": "running", "rounds": 2})})  # fmt: skip
    check_reachable(settings, model.config)
    trainer = ATPTrainer(settings, model, windows(8, 1), windows(6, 2))
    trainer.train()
    certificate = trainer.export(tmp_path / "out")
    assert certificate["removed_lora_norm"] == 0.0 and certificate["merge_error"] <= 1.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    (kept,) = set(trainer.space.describe(trainer.decisions.mask)[space])
    folder = tmp_path / "out" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if space == "experts":
        assert reloaded.config.num_experts == kept < model.config.num_experts
    else:
        key = family_of(model.config).inner
        whole, inner = (getattr(shapes, key) for shapes in (model.config, reloaded.config))
        assert inner * model.config.num_experts == kept and inner < whole
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    cached, plain = (reloaded.generate(tokens(2, 7), use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain) and int(cached.max()) < VOCAB


@pytest.mark.parametrize("space", EXPERT_SPACES)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_carry_lora(name, space):
    """What PEFT computes by adding B A to the weights; cut, merged and taken off again."""
    model = build(name, torch.float64)
    space = MaskSpace.from_config(model.config, space)
    stock, whole = stock_modules(model), model(tokens()).logits
    modules, names = ["q_proj", "k_proj", "v_proj", "o_proj"], [f"mlp.experts.{part}" for part in STACKED]
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=modules, target_parameters=names, task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(model), settings).double().eval()
    lora = add_lora(model, space, r=2, alpha=4.0, dropout=0.0, experts=True).double().eval()
    draw = torch.Generator().manual_seed(0)
    for part in (p for n, p in lora.named_parameters() if ".lora_" in n):
        part.data = 0.2 * torch.randn(part.shape, dtype=part.dtype, generator=draw)
    state = {n: p for n, p in lora.state_dict().items() if ".lora_" in n}
    assert len(state) == 2 * 6 * len(model.model.layers) and not peft.load_state_dict(state, strict=False)[1]
    found, expected = lora(tokens()).logits, peft(tokens()).logits
    assert (expected - whole).abs().max() > 0.1
    assert_close(found, expected, rtol=0, atol=1e-5)

    def gradients(model):
        factors = [p for n, p in model.named_parameters() if ".lora_" in n]
        return torch.autograd.grad(model(tokens()).logits.square().sum(), factors)

    for mine, theirs in zip(gradients(lora), gradients(peft), strict=True):
        assert theirs.abs().max() > 0
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert_close(merge_adapter(lora)(tokens()).logits, found, rtol=0, atol=1e-5)
    with lora.disable_adapter():
        assert_close(lora(tokens()).logits, whole, rtol=0, atol=1e-5)
    mask = random_mask(space) if space.name == "experts" else random_channels(space)
    with torch.no_grad(), MaskController(lora, space).masks(mask, "sum"):
        masked = lora(tokens()).logits
    cut = cut_model(lora, space, mask)
    assert_close(cut(tokens()).logits, masked, rtol=0, atol=1e-5)
    assert_close(cut_model(merge_adapter(lora), space, mask)(tokens()).logits, masked, rtol=0, atol=1e-5)
    plain = unload(lora, stock)
    assert torch.equal(plain(tokens()).logits, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "space"), [("qwen3_moe", "expert_channels"), ("gpt_oss", "experts"),
                                             ("gpt_oss", "expert_channels"), ("mixtral", "experts")])  # fmt: skip
def test_a_run_with_lora_on_experts(tmp_path, name, space, dtype):
    """Its adapter is trained on both sides of the cut, certified, and read by PEFT beside the base of the cut model."""
    model = build(name, getattr(torch, dtype), scale=0.1)
    settings = config(tmp_path, space, open=3, search=0, settle=0, tune=3, precision=dtype)
    settings = settings.model_copy(update={
        "lora": settings.lora.model_copy(update={"experts": True, "r": 2}),
        "export": settings.export.model_copy(update={"keep_adapter": True}),
    })  # fmt: skip
    check_reachable(settings, model.config)
    trainer = ATPTrainer(settings, model, windows(8, 1), windows(6, 2))
    trainer.train()
    factors = [p for n, p in trainer.model.named_parameters() if ".experts." in n and ".lora_B" in n]
    assert len(factors) == 2 * len(model.model.layers) and all(factor.abs().max() > 0 for factor in factors)
    certificate = trainer.export(tmp_path / "out")
    assert certificate["removed_lora_norm"] == 0.0 and certificate["merge_error"] <= 1.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    read = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32).eval()
    assert_close(read(tokens()).logits, merged(tokens()).logits, rtol=0, atol=1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("space", EXPERT_SPACES)
@pytest.mark.parametrize(("name", "source"), [("qwen3_moe", "learned"), ("olmoe", "running"), ("mixtral", "static")])
def test_layers_may_keep_different_numbers(tmp_path, name, source, space):
    settings = config(tmp_path, space, open=4, search=6)
    update = {"source": source, "uniform": False, "target_keep": 0.75}
    settings = settings.model_copy(update={"decisions": settings.decisions.model_copy(update=update)})
    trainer = ATPTrainer(settings, build(name, scale=0.1), windows(16, 1), windows(6, 2))
    trainer.train()
    certificate = trainer.export(tmp_path / "out")
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    assert abs(Budget(trainer.space).share(trainer.decisions.mask) - 0.75) < 0.03
    counts = trainer.space.describe(trainer.decisions.mask)[space]
    reloaded = read_model(tmp_path / "out" / "model", "auto")
    experts = [layer.mlp.experts.down_proj for layer in reloaded.model.layers]
    found = [part.shape[2] * len(part) for part in experts] if space == "expert_channels" else list(map(len, experts))
    assert found == counts
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    cached, plain = (reloaded.generate(tokens(2, 7), use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", EXPERTS)
def test_masks_meet_a_budget_and_leave_a_token_its_experts(name):
    """Those of the search, of the freeze and of the baselines; the nearest share is that of some count per layer."""
    model, space, _ = wrapped(name, torch.float32)
    budget, taken = Budget(space), space.structures[0].least
    logits = torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    per_layer = [structure.span for structure in space.structures]
    for mask in (exact_mask(logits, 0.01, budget), keep_one(torch.zeros(space.size, dtype=torch.bool), logits, space)):
        for span in per_layer:
            assert set(mask[span].nonzero().flatten().tolist()) == set(logits[span].topk(taken).indices.tolist())
    each = float(budget.cost()[0]) / budget.total
    possible = [1 - removed * each for removed in range(space.size - taken * len(per_layer) + 1)]
    for target in (0.62, 0.8, 0.93):
        nearest = min(possible, key=lambda share: abs(share - target))
        assert abs(nearest_share(budget, target, {}) - nearest) < 1e-6
        for mask in (fit_mask(logits, target, budget, None), uniform_mask(logits, target, budget, None)):
            assert abs(budget.share(mask) - nearest) < 1e-6 and all(mask[span].sum() >= taken for span in per_layer)
        equal = fit_equal(logits, target, budget, {})
        counts = space.describe(equal)["experts"]
        assert len(set(counts)) == 1 and abs(budget.share(equal) - target) <= each * len(per_layer) / 2 + 1e-6
    experts = model.model.layers[1].mlp
    weights = [part for part in experts.parameters() if part.dim() > 1]
    expected = sum(part.detach().double().square().flatten(1).sum(1) for part in weights)
    assert_close(magnitude_scores(model, space)[per_layer[1]], expected)


def test_a_config_is_drafted_in_the_space_and_planned(tmp_path):
    """Parameters in all are those of the stock model, and those of a token leave out the experts that it passes by."""
    vocabulary = json.loads(Path(tiny_config(tmp_path).model.path, "config.json").read_text())["vocab_size"]
    model = build("qwen3_moe", vocab_size=vocabulary, attention_bias=False)
    model.save_pretrained(tmp_path)
    drafted = ATPConfig.parse(yaml.safe_load(draft(str(tmp_path), str(tmp_path / "data.jsonl")).text))
    assert drafted.decisions.space == "experts" and drafted.decisions.uniform
    plan = make_plan(drafted)
    expert, layers, whole = 3 * 24 * 32, len(model.model.layers), sum(p.numel() for p in model.parameters())
    left = whole - layers * 4 * (expert + 32)
    assert plan["widths"]["experts"] == {"kept": 4, "of": 8, "multiple": 1}
    assert [plan["parameters"][when]["total"]["parameters"] for when in ("before", "after")] == [whole, left]
    assert plan["parameters"]["active"] == {"before": whole - layers * 5 * expert, "after": left - layers * expert}
    reached = {form["name"]: form["reachable"] for form in plan["exports"]}
    assert reached["GGUF, for llama.cpp"] and reached["transformers alone, and tools that load its models"]


@torch.no_grad()
def test_a_process_without_this_package_computes_the_same(tmp_path):
    model, space, _ = wrapped("qwen3_moe", torch.float32)
    save_model(cut_model(model, space, random_mask(space)), tmp_path)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "torch.save(model(torch.load(sys.argv[1] + '/ids.pt')).logits.detach(), sys.argv[1] + '/logits.pt')\n"
        "assert not any(name.split('.')[0].startswith('atp') for name in sys.modules)"
    )
    torch.save(tokens(), tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-I", "-c", script, str(tmp_path)], check=True, capture_output=True)
    expected = cut_model(model, space, random_mask(space))(tokens()).logits
    assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_unequal_layers_are_read_by_our_class_and_cut_again(name, tmp_path):
    model, space, _ = wrapped(name, torch.float32)
    cut = cut_model(model, space, random_mask(space, equal=False))
    save_model(cut, tmp_path)
    again = read_model(tmp_path, "auto")
    assert again.config.model_type == f"atp_{name}" and torch.equal(again(tokens()).logits, cut(tokens()).logits)
    smaller_space = MaskSpace.from_config(again.config, "experts")
    assert [s.size for s in smaller_space.structures] == [s.least + s.layer % 3 for s in space.structures]
    mask = torch.ones(smaller_space.size, dtype=torch.bool)
    last = smaller_space.structures[-1]
    mask[last.start + last.size - 1] = False
    smaller = cut_model(again, smaller_space, mask)
    lora = add_lora(again, smaller_space, r=2, alpha=2.0, dropout=0.0).eval()
    with MaskController(lora, smaller_space).masks(mask, "sum"):
        assert_close(smaller(tokens()).logits, lora(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_done_is_refused_in_a_sentence(tmp_path):
    shapes = build("qwen3_moe").config
    settings = config(tmp_path, "experts")
    assert settings.decisions.uniform
    low = settings.model_copy(update={"decisions": settings.decisions.model_copy(update={"target_keep": 0.3})})
    with pytest.raises(InputError, match="each token takes 3 of a layer's 8 experts, and so many are 0.5"):
        check_reachable(low, shapes)
    by_channel = config(tmp_path, "expert_channels")
    assert by_channel.decisions.uniform
    low = by_channel.model_copy(update={"decisions": by_channel.decisions.model_copy(update={"target_keep": 0.05})})
    with pytest.raises(InputError, match="each of 8 experts keeps 8 channels, and so many are 0.4"):
        check_reachable(low, shapes)
    with pytest.raises(UnsupportedModel, match="'llama': it has no experts, so use kv_group"):
        MaskSpace.from_config(build("llama").config, "expert_channels")
    odd = by_channel.model_copy(update={"decisions": by_channel.decisions.model_copy(
        update={"multiples": {"expert_channels": 12}})})  # fmt: skip
    with pytest.raises(InputError, match="multiples has 12 for expert_channels, and products of experts take widths"):
        check_reachable(odd, shapes)
    with pytest.raises(UnsupportedModel, match="its MLPs are experts behind a router, so use experts"):
        MaskSpace.from_config(shapes, "kv_group")
    with pytest.raises(UnsupportedModel, match="'llama': it has no experts, so use kv_group"):
        MaskSpace.from_config(build("llama").config, "experts")
    dense = build("qwen3_moe", mlp_only_layers=[1]).config
    with pytest.raises(UnsupportedModel, match="its layer 1 has one dense MLP"):
        MaskSpace.from_config(dense, "experts")
    space = MaskSpace.from_config(shapes, "experts")
    with pytest.raises(InputError, match="lora.experts goes without lora.dropout=0.1, which PEFT has on linears alone"):
        ATPConfig.parse({"model": {"path": "tiny"}, "output_dir": "x", "lora": {"experts": True, "dropout": 0.1}})
    given = settings.model_copy(update={"lora": settings.lora.model_copy(update={"experts": True})})
    with pytest.raises(InputError, match="family 'llama' has no experts: leave it out"):
        check_reachable(given, build("llama").config)
    with pytest.raises(InputError, match="takes linears, and experts are none"):
        check_base("4bit", space)
    few = torch.zeros(space.size, dtype=torch.bool)
    few[::4] = True
    with pytest.raises(ValueError, match="would keep 2 of its 8 experts decisions: keep at least 3"):
        cut_model(build("qwen3_moe"), space, few)
    content = shapes.to_dict()
    check_sizes(content)
    with pytest.raises(InputError, match="num_experts_per_tok is 9: make it at most num_local_experts 8"):
        check_sizes(content | {"num_experts_per_tok": 9})
    shapes.moe_intermediate_size = 2**20
    with pytest.raises(InputError, match="weights and its files hold 10,000 bytes"):
        check_against_files(shapes, 10**4)


@pytest.mark.parametrize("space", EXPERT_SPACES)
def test_a_loop_of_transformers_cuts_experts_beside_an_adapter(tmp_path, space):
    """On attention alone, and on experts too; PEFT's all-linear is on routers, which is refused."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(20, 16, 1).tolist()]
    decisions = {"space": space, "source": "running", "target_keep": 0.7}

    def trained(target, **more):
        settings = LoraConfig(r=4, lora_alpha=4, target_modules=target, task_type="CAUSAL_LM", **more)
        callback = ATPCallback(rows[:6], search=4, settle=1, seed=3, decisions=decisions)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=6, report_to="none", use_cpu=True,
            disable_tqdm=True, save_strategy="no", optim="adamw_torch_fused",
        )  # fmt: skip
        model = get_peft_model(build("qwen3_moe", scale=0.1), settings)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        return callback, callback.cut(trainer.model)

    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(InputError, match="on the parameters mlp.experts.down_proj, of which ATPCallback takes those"):
        trained(attention, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(InputError, match="gate.weight, gate_up_proj, of which .* with target_modules=.'k_proj', "):
        trained("all-linear")
    for more in ({}, {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}):
        callback, smaller = trained(attention, **more)
        assert any(".experts." in name and ".lora_" in name for name, _ in smaller.named_parameters()) == bool(more)
        assert callback.pruning.certificate["masked_vs_cut"] < 1e-5
        counts = callback.pruning.space.describe(callback.pruning.decisions.mask)[space]
        layers = merge_adapter(smaller).model.layers
        experts = [layer.mlp.experts.down_proj for layer in layers]
        found = [part.shape[2] * len(part) if space == "expert_channels" else len(part) for part in experts]
        assert found == counts and len(set(counts)) == 1
