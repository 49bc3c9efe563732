"""`training.after_cut: full`: all weights of the cut model are tuned, against stock transformers and torch's AdamW."""

import copy

import pytest
import torch
from tiny_command import results, stopping_at
from tiny_run import CUT, SEARCH, TOTAL, TUNE, assert_same_end, make, place, records, resumed, trained_tensors, windows
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_scheduler

from atp.config import ATPConfig, TrainingConfig
from atp.data import collate
from atp.ground.errors import InputError
from atp.inputs.checks import check_sharded
from atp.models.attention import use_training_attention
from atp.models.stock import as_stock
from atp.removal.masters import stored_dtype, whole_model
from atp.training import checkpoint as checkpoints
from atp.training.loop import Loop
from atp.training.loss import causal_lm_loss
from atp.training.schedule import full_rate

FULL = {"after_cut": "full", "full_lr": 1e-2}
# All layers alike, so that a class of transformers' own computes the cut model.
EQUAL = {"space": "kv_group", "source": "tuned", "uniform": True, "multiples": {}, "refit_windows": 4}
AT_ONCE = {"open": 2, "search": 0, "settle": 0, "tune": 4}
UNTIED = {"tie_word_embeddings": False}


def full(folder, *, training=None, **options):
    return make(folder, training=FULL | AT_ONCE | (training or {}), decisions=EQUAL, **options)


def plain_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def at_cut(folder, step=2):
    return checkpoints.load(folder / "checkpoints" / f"checkpoint-{step:08d}")


@pytest.fixture(scope="module", params=[{}, UNTIED], ids=["tied", "untied"])
def tuned(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    trainer = full(folder, sizes=request.param)
    trainer.train()
    return trainer, folder, request.param


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_parameters_are_those_of_stock_transformers(tuned, precision, checkpointing):
    """In bfloat16 about as far from those in float64 as those of transformers."""
    trainer, *_ = tuned
    ours = copy.deepcopy(trainer.model).to(torch.float64 if precision == "float64" else torch.float32).train()
    stock = as_stock(copy.deepcopy(trainer.model)).double()
    assert type(stock).__module__.startswith("transformers.")
    use_training_attention(ours)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    stock.config._attn_implementation = "sdpa"
    theirs = copy.deepcopy(stock).float()
    ids = windows(3, seed=8).input_ids
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = causal_lm_loss(ours, collate([windows(3, seed=8)[row] for row in range(3)])), plain_loss(theirs, ids)
    for loss in (*losses, plain_loss(stock, ids)):
        loss.backward()
    found, truth, others = ({n: p.grad.double() for n, p in m.named_parameters()} for m in (ours, stock, theirs))
    assert found.keys() == truth.keys() and len(found) == (21 if "lm_head.weight" in found else 20)
    for name, expected in truth.items():
        allowed = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 0}[precision] * expected.norm()
        if precision == "bfloat16":
            allowed = 1.5 * (others[name] - expected).norm()
        assert (found[name] - expected).norm() <= allowed, name


def test_each_weight_is_trained_and_a_tied_head_once(tuned):
    trainer, folder, sizes = tuned
    assert trainer.trains_all and all(p.requires_grad for p in trainer.model.parameters())
    names = set(trainer.trained.parameters)
    assert ("lm_head.weight" in names) == bool(sizes) and not any("lora" in name for name in names)
    start = at_cut(folder).part("model")
    assert start.keys() == names
    for name, weight in trained_tensors(trainer).items():
        assert not torch.equal(weight, start[name]), name


def test_training_starts_from_the_merged_adapter(tuned, tmp_path):
    trainer, folder, sizes = tuned
    lora = make(tmp_path, training=AT_ONCE, decisions=EQUAL, sizes=sizes)
    lora.train()
    adapter = at_cut(tmp_path).part("model")
    start = at_cut(folder).part("model")
    base = {name: p.detach() for name, p in lora.model.get_base_model().named_parameters() if ".lora_" not in name}
    merged = 0
    for name, weight in base.items():
        plain, expected = name.replace(".base_layer", ""), weight.double()
        prefix = f"base_model.model.{name.removesuffix('.base_layer.weight')}"
        if f"{prefix}.lora_A.default.weight" in adapter:
            a, b = (adapter[f"{prefix}.lora_{side}.default.weight"].double() for side in "AB")
            expected, merged = expected + b @ a, merged + 1  # alpha / r is 1
        assert torch.equal(start[plain], expected.float()), name
    assert merged == 14


@pytest.mark.parametrize("sizes", [{}, UNTIED], ids=["tied", "untied"])
def test_steps_are_those_of_torchs_adamw_on_a_stock_model(tmp_path, sizes):
    """Same samples, rates, clipping; moments start anew at the cut."""
    trainer, folder = full(tmp_path, sizes=sizes, dtype=torch.float64, training={"update_clipping": False}), tmp_path
    trainer.train()
    state = at_cut(folder)
    assert not state.part("lora_optimizer") and not state.part("refit")
    stock = as_stock(copy.deepcopy(trainer.model))
    stock.load_state_dict(state.part("model"), strict=False)
    stock.tie_weights()
    stock.config._attn_implementation = "sdpa"
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=4)
    rates = [record["lr"] for record in records(folder) if record["phase"] == "tune"]
    for step, batches in enumerate(trainer.batches_from(2)):
        assert rates[step] == optimizer.param_groups[0]["lr"]
        loss = plain_loss(stock, batches[0]["input_ids"])
        assert records(folder)[2 + step]["loss"] == pytest.approx(float(loss), rel=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert step == 3
    weights = dict(stock.named_parameters())
    for name, weight in trained_tensors(trainer).items():
        assert_close(weight, weights[name].detach(), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_is_the_trained_weights_rounded_once(tmp_path, dtype):
    trainer = full(tmp_path, dtype=dtype)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    certificate = trainer.export(tmp_path / "out")
    assert certificate["masked_vs_cut"] < 1e-4 and certificate["cut_vs_reloaded"] < 1e-5
    assert certificate["merge_error"] == 0 and certificate["dtype"] == str(dtype).removeprefix("torch.")
    assert certificate["trained besides LoRA"] == "all weights, after the cut"
    assert not (tmp_path / "out" / "adapter").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert reloaded.dtype == dtype
    masters = dict(trainer.model.named_parameters())
    for name, weight in reloaded.named_parameters():
        assert torch.equal(weight, masters[name].to(dtype)), name
    assert "Trained besides LoRA: all weights, after the cut." in (tmp_path / "out/model/README.md").read_text()


def test_a_weight_that_was_not_rounded_but_changed_fails_the_certificate(tmp_path, monkeypatch):
    trainer = full(tmp_path, dtype=torch.bfloat16)
    trainer.train()
    from atp.export import hf

    stored = hf.as_stored

    def spoiled(model, **options):
        plain = stored(model, **options)
        plain.get_decoder().norm.weight.data[0] *= 1 + 2**-7
        return plain

    monkeypatch.setattr(hf, "as_stored", spoiled)
    assert trainer.export(tmp_path / "out")["merge_error"] == float("inf")


KINDS = {
    "bfloat16": ({"precision": "bfloat16"}, {}),
    "clipped updates": ({"update_clipping": True, "beta2": 0.9}, {}),
    "rslora": ({}, {"lora": {"variant": "rslora"}}),
    "dora": ({}, {"lora": {"variant": "dora", "dropout": 0.0}}),
    "narrow weights": ({"precision": "bfloat16"}, {"dtype": torch.bfloat16}),
    "checkpointing and offload": ({"gradient_checkpointing": True, "offload": True}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_from_each_checkpoint_to_the_same_bytes(tmp_path, kind):
    training, options = KINDS[kind]
    trainer = full(tmp_path / "whole", training=training, **options)
    trainer.train()
    for step in range(1, trainer.phases.total):
        options["training"] = FULL | AT_ONCE | training
        assert_same_end(resumed(tmp_path / "whole", step, tmp_path / str(step), decisions=EQUAL, **options), trainer)


@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_searched_and_settled_is_killed_at_the_cut(tmp_path, after):
    options = {"training": FULL, "decisions": {"refit_windows": 8}}
    trainer = make(tmp_path / "whole", **options)
    trainer.train()
    assert [r["phase"] for r in records(tmp_path / "whole")][CUT:] == ["tune"] * TUNE
    with stopping_at(Loop, "write", after=after, when=lambda loop, state: state.step == CUT):
        make(tmp_path / "killed", **options).train()
    again = make(tmp_path / "killed", **options)
    again.train(resume=True)
    assert_same_end(again, trainer)
    for run in (trainer, again):
        run.export(run.checkpoint_root.parent / "out")
    assert results(tmp_path / "whole" / "out") == results(tmp_path / "killed" / "out")
    assert SEARCH < CUT < TOTAL


def test_the_run_ends_with_the_best_weights_and_stops_early(tmp_path):
    training = {"full_lr": 0.1, "schedule": "constant", "warmup": 0, "clip": 100.0, "keep_best": True, "patience": 2}
    options = {
        "training": training | {"tune": 12}, "validation": windows(7, 9),
        "evaluation": {"every": 1, "validation_windows": 5, "batch_size": 2},
    }  # fmt: skip
    trainer = full(tmp_path / "whole", **options)
    trainer.train()
    best = trainer.validation.best
    assert trainer.step == best["step"] + 2 < trainer.phases.total
    with torch.no_grad():
        assert float(plain_loss(trainer.model.eval(), windows(5, 9).input_ids)) == pytest.approx(best["loss"], abs=1e-5)
    place(tmp_path / "whole", trainer.step - 1, tmp_path / "again")
    again = full(tmp_path / "again", **options)
    again.train(resume=True)
    assert_same_end(again, trainer)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 9])
def test_rates_begin_anew_at_the_cut(schedule, warmup):
    config = TrainingConfig(
        open=4, search=3, settle=2, tune=8, schedule=schedule, warmup=warmup, after_cut="full", full_lr=3e-4
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=8)
    for step in range(9, 17):
        assert full_rate(config, step) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        scheduler.step()


def test_the_rate_that_nobody_gives_is_written_down(tmp_path):
    training = {"after_cut": "full", "tune": 1}
    assert make(tmp_path, training=training).config.training.full_lr == 2e-4
    assert make(tmp_path / "lora").config.training.full_lr is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.load_in=8bit"], "tunes floating weights, and the linears have none under model.load_in=8bit: leave"),
        (["export.keep_adapter=true"], "ends without an adapter, which export.keep_adapter asks for: leave out one"),
        (["training.after_cut=lora", "training.full_lr=1e-4"], "full_lr is the rate of after_cut=full: set that, or"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    values = {"model": {"path": "m"}, "output_dir": "o", "training": {"after_cut": "full"}}
    with pytest.raises(InputError, match=message):
        ATPConfig.parse(values, overrides)


def test_shards_are_refused():
    config = ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o", "training": {"after_cut": "full"}})
    with pytest.raises(InputError, match="^training.after_cut=full trains weights of which training.sharding=fsdp"):
        check_sharded(config, shared=True)


def test_factors_of_embeddings_are_those_of_the_stored_model():
    """Gemma rounds what it multiplies embeddings by to the dtype of its weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "vocab_size": 32, "hidden_size": 40, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    stock = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).to(torch.bfloat16)
    ids = torch.arange(32)[None]
    expected = stock.get_input_embeddings()(ids)
    model = whole_model(get_peft_model(stock, LoraConfig(target_modules=["q_proj"])))
    assert stored_dtype(model) == torch.bfloat16
    found = model.get_input_embeddings()(ids)
    assert found.dtype == torch.float32 and torch.equal(found.to(torch.bfloat16), expected)


def test_biases_and_other_families_are_merged_and_trained():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    from peft import LoraConfig, get_peft_model

    model = whole_model(get_peft_model(LlamaForCausalLM(config).double(), LoraConfig(target_modules=["q_proj"])))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in model.parameters())
