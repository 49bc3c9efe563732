"""Every baseline's choice against its own definition, worked out by hand in float64, and at the same budget."""

import pytest
import torch
from small_llama import config, model, windows
from torch.nn import functional as F
from zeroed import HEAD_DIM, HEADS, INNER, KV_HEADS

from atp.baselines.calibration import calibration_batches, choice_samples
from atp.baselines.llm_pruner import taylor_mask, taylor_scores, unprotected_layers
from atp.baselines.methods import BASELINES, MaskBaseline
from atp.baselines.simple import magnitude_mask, magnitude_scores, random_mask, static_mask
from atp.baselines.uniform import uniform_mask
from atp.baselines.wanda_sp import wanda_scores
from atp.data import PackedDataset
from atp.decide.budget import Budget
from atp.ground.errors import InputError, NotReached
from atp.inputs.resolve import resolve
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.removal import cut_model
from atp.spaces.space import MaskSpace
from atp.training.data import step_batches

CPU = torch.device("cpu")


def batches(settings=None):
    return list(calibration_batches(windows(), settings or config(), CPU))


def rows_read(data, settings):
    return sorted(tuple(batch["input_ids"][0].tolist()) for batch in calibration_batches(data, settings, CPU))


@pytest.mark.parametrize("opened", [3, 20])  # fewer samples than there are, and each of them several times
def test_two_stages_choose_by_the_windows_that_the_open_steps_read(opened):
    train, general = windows(count=12, seed=2), windows(count=30, seed=3)
    settings = resolve(config(training={"search": 0, "open": opened, "settle": 0, "gradient_accumulation": 1}))
    steps = step_batches(train, 0, opened, size=2, accumulation=1, seed=settings.seed, device=CPU)
    read = {tuple(row.tolist()) for batches in steps for batch in batches for row in batch["input_ids"]}
    assert len(read) == min(12, 2 * opened)
    assert rows_read(choice_samples(train, general, settings), settings) == sorted(read)


def test_two_stages_choose_by_the_calibration_windows_where_the_run_itself_decides_by_them():
    train, general = windows(count=12, seed=2), windows(count=30, seed=3)
    for changed in ({"training": {"search": 0, "open": 1}}, {"decisions": {"source": "tuned"}}, {}):
        assert choice_samples(train, general, resolve(config(**changed))) is general
    assert len(rows_read(general, config())) == 4


def loss_of(llama, batch):
    logits = llama(batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def group_by_hand(weights, group):
    """Sum over the weights of a KV group; weights: importance by linear of one layer, [out, in]."""
    wide = HEADS // KV_HEADS * HEAD_DIM
    queries, keys = slice(group * wide, (group + 1) * wide), slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
    total = weights["self_attn.q_proj"][queries].sum() + weights["self_attn.o_proj"][:, queries].sum()
    return total + weights["self_attn.k_proj"][keys].sum() + weights["self_attn.v_proj"][keys].sum()


def channel_by_hand(weights, channel):
    rows = weights["mlp.gate_proj"][channel].sum() + weights["mlp.up_proj"][channel].sum()
    return rows + weights["mlp.down_proj"][:, channel].sum()


def scores_by_hand(space, weights_of_layer):
    """Scores of the kv_group space from each layer's importances, without the table of cuts."""
    scores = []
    for layer in range(space.num_layers):
        weights = weights_of_layer(layer)
        scores += [group_by_hand(weights, group) for group in range(KV_HEADS)]
        scores += [channel_by_hand(weights, channel) for channel in range(INNER)]
    return torch.stack(scores)


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_llm_pruner_score_is_weight_times_gradient_summed_by_hand(order):
    llama = model()
    space = MaskSpace.from_config(llama.config, "kv_group")
    gradients = []
    for batch in batches():
        llama.zero_grad()
        loss_of(llama, batch).backward()
        gradients.append({name: p.grad.clone() for name, p in llama.named_parameters()})

    def importance(layer):
        found = {}
        for name in space.modules:
            key = f"model.layers.{layer}.{name}.weight"
            w, g = llama.get_parameter(key).detach(), torch.stack([grads[key] for grads in gradients])
            first, second = w * g.mean(0), w**2 * (g**2).mean(0)
            found[name] = {"first": first, "second": second, "mixed": first - second / 2}[order].abs()
        return found

    expected = scores_by_hand(space, importance)
    # transformers takes the cross-entropy of float32 logits, whatever the model's dtype.
    torch.testing.assert_close(taylor_scores(llama, space, batches(), order), expected, rtol=1e-5, atol=0)


def test_magnitude_is_the_joint_norm_of_the_group_and_removes_what_is_small():
    llama = model()
    space = MaskSpace.from_config(llama.config, "kv_group")
    expected = scores_by_hand(
        space, lambda i: {n: llama.get_parameter(f"model.layers.{i}.{n}.weight").detach() ** 2 for n in space.modules}
    )
    torch.testing.assert_close(magnitude_scores(llama, space), expected)
    with torch.no_grad():
        for linear in ("gate_proj", "up_proj"):
            llama.model.layers[1].mlp.get_submodule(linear).weight[7] *= 1e-3
        llama.model.layers[1].mlp.down_proj.weight[:, 7] *= 1e-3
    mask = magnitude_mask(llama, space, windows(), config(decisions={"target_keep": 0.95}))
    assert not mask[space.structures[3].start + 7]


def test_wanda_sp_is_weight_times_input_norm_by_hand():
    llama = model()
    space = MaskSpace.from_config(llama.config, "kv_group")
    seen = {}
    consumers = ("self_attn.o_proj", "mlp.down_proj")
    hooks = [
        llama.model.layers[i].get_submodule(n).register_forward_hook(
            lambda m, inputs, out, key=(i, n): seen.setdefault(key, []).append(inputs[0])
        )
        for i in range(2) for n in consumers
    ]  # fmt: skip
    with torch.no_grad():
        for batch in batches():
            llama(batch["input_ids"])
    for hook in hooks:
        hook.remove()

    def importance(layer):
        found = {n: torch.zeros(each.out_features, each.in_features) for n, each in space.linears[layer].items()}
        for name in consumers:
            norm = torch.cat([x.flatten(0, 1) for x in seen[layer, name]]).norm(dim=0)
            found[name] = llama.get_parameter(f"model.layers.{layer}.{name}.weight").detach().abs() * norm
        return found

    torch.testing.assert_close(wanda_scores(llama, space, batches()), scores_by_hand(space, importance))


def test_samples_that_share_a_row_do_not_see_each_other():
    llama, ids = model(), windows().input_ids
    space = MaskSpace.from_config(llama.config, "kv_group")
    together = PackedDataset(ids, ids.clone(), torch.arange(8).repeat(2).expand_as(ids))
    apart = PackedDataset(ids.view(-1, 8), ids.view(-1, 8).clone())
    read = (calibration_batches(data, config(), CPU, count=len(data)) for data in (together, apart))
    scores = [wanda_scores(llama, space, batches) for batches in read]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=0)


def test_static_is_the_fisher_information_of_the_masks_by_finite_differences():
    """The order of the kept decisions follows (dL/ds)^2 / sqrt(cost), the derivative taken by differences."""
    llama = model(dtype=torch.float32)
    space = MaskSpace.from_config(llama.config, "kv_group")
    settings = config(decisions={"saliency_windows": 2})
    mask = static_mask(llama, space, windows(), settings)

    double = add_lora(model(), space, r=1, alpha=1.0, dropout=0.0).eval()
    controller, step = MaskController(double, space), 1e-5
    fisher = torch.zeros(space.size, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(settings):
            for index in range(space.size):
                losses = []
                for value in (1 + step, 1 - step):
                    soft = torch.ones(space.size, dtype=torch.float64)
                    soft[index] = value
                    with controller.masks(soft, "soft"):
                        losses.append(loss_of(double, batch))
                fisher[index] += ((losses[0] - losses[1]) / (2 * step)) ** 2
    score = fisher / Budget(space).cost().double().sqrt()
    structures = [space.structures[1], space.structures[3]]  # MLP channels, where many of them compete
    for structure in structures:
        kept = mask[structure.span]
        assert score[structure.span][kept].min() >= score[structure.span][~kept].max() * (1 - 1e-3)


@pytest.mark.parametrize("name", ["static", "disp_llm"])
@torch.no_grad()
def test_the_model_comes_back_as_it_was(name):
    llama = model(dtype=torch.float32)
    logits, modules = llama(windows().input_ids).logits, {n: type(m) for n, m in llama.named_modules()}
    with torch.enable_grad():
        BASELINES[name].choose(llama, windows(), config())
    assert {n: type(m) for n, m in llama.named_modules()} == modules
    assert torch.equal(llama(windows().input_ids).logits, logits)


@pytest.mark.parametrize(("name", "count", "refits"), [
    ("static", 6, True), ("static", 0, False), ("random", 6, False), ("llm_pruner", 6, False),
    ("llm_pruner+refit", 6, True), ("wanda_sp+refit", 6, True), ("wanda_sp+refit", 0, False),
])  # fmt: skip
def test_some_are_refitted_as_the_config_says(name, count, refits):
    """The cut model then comes nearer to the whole one; what reads no cut is a slice of the pretrained weights."""
    settings = config(decisions={"refit_windows": count})
    whole = model(dtype=torch.float32)
    mask = BASELINES[name].choose(model(dtype=torch.float32), windows(), settings)
    space = MaskSpace.from_config(whole.config, "kv_group")
    pruned = BASELINES[name].apply(model(dtype=torch.float32), mask, windows(), settings)
    plain = cut_model(whole, space, mask)
    weights = dict(pruned.named_parameters())
    changed = {n.split(".")[-2] for n, p in plain.named_parameters() if not torch.equal(p, weights[n])}
    assert changed <= {"down_proj", "o_proj"} and bool(changed) == refits
    if refits:
        ids = windows().input_ids
        with torch.no_grad():
            expected = whole(ids).logits
            gaps = [(each(ids).logits - expected).square().mean() for each in (pruned, plain)]
        assert gaps[0] < 0.9 * gaps[1]


@pytest.mark.parametrize("space_name", ["kv_group", "head_dim"])
def test_disp_llm_selects_in_its_own_space_and_changes_no_weight(space_name):
    """Whatever the space of the config is: every weight that is left is the pretrained one at the kept positions."""
    settings, llama = config(decisions={"space": space_name, "refit_windows": 6}), model(dtype=torch.float32)
    mask = BASELINES["disp_llm"].choose(llama, windows(), settings)
    space = MaskSpace.from_config(llama.config, "disp")
    pruned = BASELINES["disp_llm"].apply(llama, mask, windows(), settings)
    selected = 0
    for layer, kept in enumerate(space.kept_indices(mask)):
        sides = {
            "self_attn.q_proj": (range(HEADS * HEAD_DIM), kept["attention_inputs"]),
            "self_attn.o_proj": (kept["attention_outputs"], range(HEADS * HEAD_DIM)),
            "mlp.gate_proj": (kept["mlp"], kept["mlp_inputs"]),
            "mlp.down_proj": (kept["mlp_outputs"], kept["mlp"]),
        }
        for name, (rows, columns) in sides.items():
            whole = model(dtype=torch.float32).model.layers[layer].get_submodule(name).weight
            left = pruned.model.layers[layer].get_submodule(name).weight
            assert torch.equal(left, whole[list(rows)][:, list(columns)])
            selected += left.numel() < whole.numel()
    assert selected > 4
    ids = windows().input_ids
    with torch.no_grad():
        assert torch.isfinite(pruned(ids).logits).all()


def test_random_follows_the_seed():
    llama = model()
    space = MaskSpace.from_config(llama.config, "kv_group")
    masks = [random_mask(llama, space, windows(), config(seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("name", [n for n, b in BASELINES.items() if isinstance(b, MaskBaseline)])
@pytest.mark.parametrize("space_name", ["kv_group", "head_dim"])
def test_every_mask_holds_the_budget(name, space_name):
    llama = model(layers=8, dtype=torch.float32, intermediate_size=96)
    settings = config(decisions={"space": space_name, "target_keep": 0.7})
    baseline = BASELINES[name]
    space = baseline.space_of(llama, settings)
    mask = baseline.choose(llama, windows(), settings)
    block = 3 * llama.config.hidden_size / Budget(space).total
    assert abs(Budget(space).share(mask) - 0.7) <= block
    pruned = baseline.apply(llama, mask, windows(), settings)
    kept = sum(p.numel() for n, p in pruned.named_parameters() if ".layers." in n)
    assert kept == Budget(space).kept(mask)


def test_uniform_mask_keeps_the_best_of_each_structure_in_equal_numbers():
    llama = model(layers=3)
    space = MaskSpace.from_config(llama.config, "kv_group")
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(3))
    mask = uniform_mask(scores, 0.6, Budget(space), {"mlp": 4})
    counts = space.describe(mask)
    assert len(set(counts["kv_group"])) == 1 and max(counts["mlp"]) - min(counts["mlp"]) <= 4
    assert all(count % 4 == 0 for count in counts["mlp"])
    for structure in space.structures:
        kept, values = mask[structure.span], scores[structure.span]
        assert kept.all() or values[kept].min() > values[~kept].max()


def test_llm_pruner_protects_first_and_last_layers_and_refuses_what_the_others_cannot_meet():
    assert unprotected_layers(32) == range(4, 30)
    assert unprotected_layers(16) == range(2, 15)
    llama = model(layers=16, dtype=torch.float32)
    space = MaskSpace.from_config(llama.config, "kv_group")
    counts = space.describe(taylor_mask(llama, space, windows(), config()))
    assert counts["mlp"][:2] == [INNER] * 2 and counts["mlp"][-1] == INNER
    assert max(counts["mlp"][2:-1]) < INNER and max(counts["kv_group"][2:-1]) <= 1
    space = MaskSpace.from_config(model(layers=4).config, "kv_group")
    with pytest.raises(InputError, match="only 1 of 4 layers may be pruned"):
        uniform_mask(torch.rand(space.size), 0.5, Budget(space), {}, layers=range(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_choose_nothing(bad):
    space = MaskSpace.from_config(model().config, "kv_group")
    scores = torch.rand(space.size)
    scores[3] = bad
    with pytest.raises(NotReached, match="NaN or infinity"):
        uniform_mask(scores, 0.6, Budget(space), {})
