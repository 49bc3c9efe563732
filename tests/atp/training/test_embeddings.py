"""`training.embeddings`: the input embeddings learn beside LoRA, against stock PEFT and torch's AdamW."""

import copy

import pytest
import torch
from peft import PeftModel
from tiny_command import results, start, stopping_at
from tiny_run import CUT, assert_same_end, make, records, resumed, trained_tensors, windows
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from atp.baselines.tuner import stock_lora
from atp.config import ATPConfig
from atp.data import collate
from atp.ground.errors import InputError
from atp.inputs.checks import check_sharded
from atp.lora.layer import add_lora
from atp.models.attention import use_training_attention
from atp.removal.masters import as_stored, store_embeddings, train_embeddings
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training.cross_entropy import held_heads, linear_cross_entropy
from atp.training.loop import Loop
from atp.training.loss import causal_lm_loss

NAME = "base_model.model.model.embed_tokens.weight"
ON = {"embeddings": True}
AT_ONCE = ON | {"open": 3, "search": 0, "settle": 0, "tune": 3}
RUNNING = {"space": "kv_group", "source": "running", "multiples": {}, "refit_windows": 4}
BOTH = AT_ONCE | {"after_cut": "full", "full_lr": 1e-2}
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 96, "initializer_range": 0.2,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}


def plain_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def embedding_at(folder, step):
    return checkpoints.load(folder / "checkpoints" / f"checkpoint-{step:08d}").tensors[f"model.{NAME}"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_stock_peft(tied, precision, checkpointing):
    """Of our fused layers; in bfloat16, with packed linears on a CPU, about as far from float64 as of stock ones."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    config = ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o", "lora": {"r": 4, "alpha": 8}})
    stock = stock_lora(copy.deepcopy(plain), config)
    for name, factor in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(factor, std=0.1)
    stock.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    model = add_lora(plain, MaskSpace.from_config(plain.config), r=4, alpha=8, dropout=0.0)
    model.load_state_dict(stock.state_dict())
    theirs = copy.deepcopy(stock)
    model, stock = model.to(torch.float64 if precision == "float64" else torch.float32), stock.double()
    train_embeddings(model)
    use_training_attention(model.get_base_model())
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = collate([windows(3, seed=8)[row] for row in range(3)])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = causal_lm_loss(model.train(), batch), plain_loss(theirs, batch["input_ids"])
    for loss in (*losses, plain_loss(stock, batch["input_ids"])):
        loss.backward()
    truth, others = ({n: p.grad.double() for n, p in m.named_parameters() if p.requires_grad} for m in (stock, theirs))
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == truth.keys() and NAME in found and len(found) == 1 + 2 * 14
    for name, expected in truth.items():
        allowed = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 0}[precision] * expected.norm()
        if precision == "bfloat16":
            allowed = 1.25 * (others[name] - expected).norm()
        assert (found[name] - expected).norm() <= allowed, name


@pytest.mark.parametrize("sizes", [{}, UNTIED], ids=["tied", "untied"])
def test_steps_are_those_of_torchs_adamw_with_a_tenth_of_the_rate(tmp_path, sizes):
    options = {"sizes": sizes, "lora": {"dropout": 0.0}, "dtype": torch.float64}
    training = AT_ONCE | {"open": 4, "update_clipping": False}
    trainer = make(tmp_path, training=training, decisions=RUNNING, **options)
    stock = stock_lora(copy.deepcopy(as_stored(trainer.model)), trainer.config)
    state = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    stock.load_state_dict(state, strict=False)
    stock.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    head = stock.get_base_model().get_output_embeddings().weight.detach().clone()
    trainer.train()
    trained = dict((name, p) for name, p in stock.named_parameters() if p.requires_grad)
    adapter = [p for name, p in trained.items() if name != NAME]
    groups = [{"params": adapter}, {"params": [trained[NAME]]}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    batches = trainer.batches_from(0)
    for step in range(3):
        rate = records(tmp_path)[step]["lr"]
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate / 10
        plain_loss(stock, next(batches)[0]["input_ids"]).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = checkpoints.load(tmp_path / "checkpoints" / "checkpoint-00000003").part("model")
    assert found.keys() == trained.keys()
    for name, weight in trained.items():
        assert_close(found[name], weight.detach(), rtol=0, atol=1e-6, msg=name)
    if sizes:
        assert torch.equal(trainer.model.get_base_model().lm_head.weight, head), "an untied head stays frozen"


def test_embeddings_learn_in_every_phase_and_nothing_else_does(tmp_path):
    trainer = make(tmp_path, training=ON | {"open": 2, "warmup": 0}, decisions={"refit_windows": 0})
    norms = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "norm" in n}
    trainer.train()
    states = [embedding_at(tmp_path, step) for step in range(1, trainer.phases.total + 1)]
    assert not any(torch.equal(one, other) for one, other in zip(states, states[1:], strict=False))
    assert all(torch.equal(p, norms[n]) for n, p in trainer.model.named_parameters() if n in norms)
    assert trainer.export(tmp_path / "out")["merge_error"] <= 1


def test_a_rate_of_their_own(tmp_path):
    trainer = make(tmp_path, training=ON | {"embeddings_lr": 1e-9})
    start = trainer.model.get_parameter(NAME).detach().clone()
    seen, step = [], trainer.optimizer.step
    trainer.train()
    del seen, step
    assert_close(trainer.model.get_parameter(NAME).detach(), start, rtol=0, atol=1e-7)
    assert make(tmp_path / "null", training=ON).config.training.embeddings_lr == pytest.approx(1e-3)


KINDS = {
    "learned, bfloat16": ({"precision": "bfloat16", "open": 2}, {"source": "learned"}, {}),
    "dora": (AT_ONCE, RUNNING, {"lora": {"variant": "dora"}}),
    "clipped updates": (AT_ONCE | {"update_clipping": True, "beta2": 0.9}, RUNNING, {}),
    "narrow weights": (AT_ONCE | {"precision": "bfloat16"}, RUNNING, {"dtype": torch.bfloat16}),
    "narrow products": (AT_ONCE, RUNNING, {"dtype": torch.bfloat16}),
    "8 bits": (AT_ONCE, RUNNING, {"model": {"path": "tiny", "load_in": "8bit"}}),
    "offload": (AT_ONCE | {"gradient_checkpointing": True, "offload": True}, RUNNING, {}),
    "all weights after the cut": (BOTH, RUNNING, {}),
    "all weights, of narrow ones": (BOTH, RUNNING, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_holds_its_certificate_and_resumes_to_the_same_bytes(tmp_path, kind):
    training, decisions, others = KINDS[kind]
    options = {"training": ON | training, "decisions": decisions, **others}
    trainer = make(tmp_path / "whole", **options)
    trainer.train()
    certificate = trainer.export(tmp_path / "out")
    assert certificate["masked_vs_cut"] < 1e-4 and certificate["cut_vs_reloaded"] < 1e-5
    assert certificate["merge_error"] <= 1
    assert certificate["trained besides LoRA"].startswith("the input embeddings, from the first step on")
    name = NAME if not trainer.trains_all else "model.embed_tokens.weight"
    master = trainer.model.get_parameter(name)
    assert master.dtype == torch.float32
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(reloaded.get_input_embeddings().weight, master.to(reloaded.dtype))
    assert reloaded.dtype == others.get("dtype", torch.float32)
    for step in range(1, trainer.phases.total, 2):
        assert_same_end(resumed(tmp_path / "whole", step, tmp_path / str(step), **options), trainer)


def test_narrow_weights_pass_on_narrow_states_and_come_back(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    embeddings, ids = model.get_input_embeddings(), torch.arange(9)[None]
    expected, kind = embeddings(ids), type(embeddings)
    wrapped = add_lora(model, MaskSpace.from_config(model.config), r=4, alpha=8, dropout=0.0)
    train_embeddings(wrapped)
    train_embeddings(wrapped)  # a second time changes nothing
    assert embeddings.weight.dtype == torch.float32 and embeddings.weight.requires_grad
    assert torch.equal(embeddings(ids), expected)
    store_embeddings(wrapped)
    assert type(embeddings) is kind and embeddings.weight.dtype == torch.bfloat16
    assert not embeddings.weight.requires_grad and torch.equal(embeddings(ids), expected)


def test_a_trained_head_is_never_a_cast_of_an_earlier_step():
    """Decision steps take it out of autograd, and its version does not tell when the optimizer changed its memory."""
    rng = torch.Generator().manual_seed(0)
    flat, hidden = torch.randn(40, generator=rng), torch.randn(3, 4, generator=rng)
    head, targets = nn.Parameter(torch.empty(10, 4)), torch.tensor([1, 2, 3])
    head.data, head.grad = flat.view(10, 4), torch.zeros(10, 4)
    head.requires_grad_(False)
    found = []
    with held_heads(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(2):
            expected = F.cross_entropy(hidden @ flat.view(10, 4).T, targets, reduction="sum")
            found.append((float(linear_cross_entropy(hidden, head, targets)), float(expected)))
            flat.mul_(3)
    for ours, truth in found:
        assert ours == pytest.approx(truth, rel=0.02)


def test_shards_and_a_rate_without_embeddings_are_refused():
    values = {"model": {"path": "m"}, "output_dir": "o", "training": ON}
    with pytest.raises(InputError, match="^training.embeddings=true trains weights of which training.sharding=fsdp"):
        check_sharded(ATPConfig.parse(values), shared=True)
    with pytest.raises(InputError, match="embeddings_lr is the rate of embeddings=true: set that, or leave"):
        ATPConfig.parse(values, ["training.embeddings=false", "training.embeddings_lr=1e-4"])


@pytest.mark.parametrize("kind", ["embeddings", "both"])
def test_a_whole_run_is_loaded_taken_up_again_and_not_changed_by_its_dense_mark(config, tmp_path, kind):
    """The dense mark trains the embeddings of the same model first."""
    training = (AT_ONCE if kind == "embeddings" else BOTH) | {"lr": 5e-3}
    overrides = {"training": training, "decisions": {"source": "running", "rounds": 1}}
    if kind == "both":
        overrides["export"] = {"keep_adapter": False}
    start(config, tmp_path / "out", **overrides)
    ended = results(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    original = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert not torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "Trained besides LoRA: the input embeddings" in (tmp_path / "out/model/README.md").read_text()
    assert "trained besides LoRA" in (tmp_path / "out" / "report.html").read_text()
    if kind == "embeddings":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
        ids = torch.arange(12)[None]
        with torch.no_grad():
            together = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(ids).logits
            assert_close(together, model(ids).logits, rtol=1e-4, atol=1e-5)
    alone = overrides | {"evaluation": {"dense_baseline": False}}
    start(config, tmp_path / "alone", **alone)
    others = results(tmp_path / "alone")
    card = {"model/README.md"}  # which tells of the dense mark
    assert others.keys() == ended.keys() and {n for n in ended if others[n] != ended[n]} == card
    for step in (2, 3, 5):
        folder = tmp_path / str(step)
        with stopping_at(Loop, "write", after=True, when=lambda loop, state, step=step: state.step == step):
            start(config, folder, **alone)
        start(config, folder, resume=True, **alone)
        assert results(folder) == others, step


def test_one_process_has_the_moments_of_every_trained_row(tmp_path):
    trainer = make(tmp_path, training=ON)
    trainer.train()
    state = checkpoints.load(tmp_path / "checkpoints" / f"checkpoint-{CUT:08d}").part("lora_optimizer")
    assert state[f"{NAME}.exp_avg"].shape == trainer.model.get_parameter(NAME).shape
    assert trained_tensors(trainer).keys() == {name.rpartition(".")[0] for name in state}
