"""Experts of which a domain needs four, and channels that it does not need: found, and gone without a loss."""

import copy

import pytest
import torch
from test_family_runs import config
from tiny_families import build
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from atp.data import PackedDataset
from atp.decide.budget import Budget
from atp.inputs.checks import check_reachable
from atp.removal import cut_model
from atp.spaces.space import MaskSpace
from atp.training.trainer import ATPTrainer

DOMAINS, WORDS, EXPERTS, LENGTH = 4, 32, 16, 24
NEEDED = EXPERTS // DOMAINS


def texts(domain, count, seed):
    """int64 [count, LENGTH]: the domain's name, then words that follow each other by its rule, some at random."""
    draw = torch.Generator().manual_seed(seed)
    follows = torch.randperm(WORDS, generator=torch.Generator().manual_seed(100 + domain))
    ids = torch.randint(WORDS, (count, LENGTH), generator=draw)
    random = torch.rand(count, LENGTH, generator=draw) < 0.15
    ids[:, 0] = WORDS + domain
    for place in range(2, LENGTH):
        ids[:, place] = torch.where(random[:, place], ids[:, place], follows[ids[:, place - 1]])
    return ids


def loss_of(model, ids):
    """Of the words that have one before them, in nats."""
    return cross_entropy(model(ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())


@pytest.fixture(scope="module")
def model():
    """Trained on all domains; the router learns to give each to four experts of its own, and work to all of them."""
    made = build(
        "qwen3_moe", scale=0.1, num_experts=EXPERTS, num_experts_per_tok=2, num_hidden_layers=2,
        vocab_size=WORDS + DOMAINS, attention_bias=False, head_dim=8,
    ).train()  # fmt: skip
    steps, rows = 150, 4
    optimizer = torch.optim.AdamW(made.parameters(), lr=8e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for step in range(steps):
        ids = torch.cat([texts(domain, rows, DOMAINS * step + domain) for domain in range(DOMAINS)])
        loss = loss_of(made, ids)
        for logits in made(ids, output_router_logits=True).router_logits:
            chance = logits.softmax(-1).view(DOMAINS, -1, DOMAINS, NEEDED)
            own = torch.stack([chance[domain, :, domain] for domain in range(DOMAINS)])  # [domains, tokens, experts]
            loss = loss - 0.3 * own.sum(-1).log().mean() - 0.1 * own.mean(1).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return made.eval()


@pytest.mark.parametrize(("domain", "source"), [(0, "running"), (2, "running"), (2, "tuned")])
def test_the_experts_that_a_domain_needs_are_found(model, tmp_path, domain, source):
    space, held_out = MaskSpace.from_config(model.config, "experts"), texts(domain, 64, 10**6)
    with torch.no_grad():
        before = loss_of(model, held_out)
    needed = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        needed[structure.start + domain * NEEDED : structure.start + (domain + 1) * NEEDED] = True
    phases = {"open": 8, "search": 0, "settle": 0, "tune": 2, "lr": 1e-4}
    settings = config(tmp_path, "experts", **phases)
    update = {"target_keep": Budget(space).share(needed), "source": source, "saliency_windows": 8}
    settings = settings.model_copy(update={"decisions": settings.decisions.model_copy(update=update)})
    check_reachable(settings, model.config)
    windows = [texts(domain, count, seed) for count, seed in ((32, 10**5), (16, 10**5 + 1))]
    trainer = ATPTrainer(settings, copy.deepcopy(model), *(PackedDataset(ids, ids.clone()) for ids in windows))
    trainer.train()
    assert torch.equal(trainer.decisions.mask, needed)
    trainer.export(tmp_path / "out")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    assert type(result) is type(model) and result.config.num_experts == NEEDED
    with torch.no_grad():
        assert abs(loss_of(result, held_out) - before) < 0.02 * before
        for seed in range(5):
            draw, mask = torch.Generator().manual_seed(seed), torch.zeros_like(needed)
            for structure in space.structures:
                mask[structure.start + torch.randperm(EXPERTS, generator=draw)[:NEEDED]] = True
            assert loss_of(cut_model(model, space, mask), held_out) > 1.5 * before


def test_the_channels_that_a_domain_needs_are_found(model, tmp_path):
    """A third of each expert goes, for less than 1 % of the loss; a random third costs more."""
    space, held_out = MaskSpace.from_config(model.config, "expert_channels"), texts(0, 64, 10**6)
    settings = config(tmp_path, "expert_channels", open=8, search=0, settle=0, tune=0, lr=1e-4)
    budget = Budget(space)
    share = 1 - 8 / 24 * float(budget.cost().sum()) / budget.total
    update = {"target_keep": share, "source": "running", "saliency_windows": 8}
    settings = settings.model_copy(update={"decisions": settings.decisions.model_copy(update=update)})
    windows = [texts(0, count, seed) for count, seed in ((32, 10**5), (16, 10**5 + 1))]
    trainer = ATPTrainer(settings, copy.deepcopy(model), *(PackedDataset(ids, ids.clone()) for ids in windows))
    trainer.train()
    with torch.no_grad():
        before, found = loss_of(model, held_out), loss_of(cut_model(model, space, trainer.decisions.mask), held_out)
        for seed in range(5):
            draw, mask = torch.Generator().manual_seed(seed), torch.zeros(space.size, dtype=torch.bool)
            for structure in space.structures:
                order = structure.ranking(torch.rand(structure.size, generator=draw))
                mask[structure.start + order[: int(trainer.decisions.mask[structure.span].sum())]] = True
            random = loss_of(cut_model(model, space, mask), held_out)
            assert found - before < 0.01 * before < random - before
