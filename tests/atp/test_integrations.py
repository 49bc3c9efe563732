"""The phases before the cut in loops of transformers and TRL: the same masks, losses and weights as in our own loop."""

import json
import math
import runpy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from atp import integrations
from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.ground.errors import InputError, NotReached
from atp.integrations import ATPCallback
from atp.removal.certify import LIMITS
from atp.training.trainer import ATPTrainer

SEARCH, SETTLE = 5, 2
STEPS = SEARCH + SETTLE
DECISIONS = {"space": "head_dim", "source": "learned", "target_keep": 0.6, "saliency_windows": 4, "refit_windows": 4}


def llama():
    """In float64: AdamW makes a rounding error of a gradient near zero as large as a step."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
            intermediate_size=48, tie_word_embeddings=True,
        )
    ).double()  # fmt: skip


def windows(count, seed):
    ids = torch.randint(2, 64, (count, 16), generator=torch.Generator().manual_seed(seed))
    return PackedDataset(ids, ids.clone())


def adapter(lora_dropout=0.0, **options):
    sizes = {"r": 4, "lora_alpha": 4, "lora_dropout": lora_dropout}
    return LoraConfig(**sizes, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def ours(folder, accumulation, decisions=None, **training):
    values = {
        "model": {"path": "tiny"}, "output_dir": str(folder), "seed": 3,
        "decisions": DECISIONS | (decisions or {}),
        "lora": {"r": 4, "alpha": 4, "dropout": 0.0},
        "training": {"search": SEARCH, "settle": SETTLE, "tune": 0, "batch_size": 2, "save_every": 100, "lr": 1e-2,
                     "gradient_accumulation": accumulation, "schedule": "constant", "warmup": 0,
                     "precision": "float32", "beta2": 0.999, "update_clipping": False} | training,
    }  # fmt: skip
    return ATPTrainer(ATPConfig.parse(values), llama(), windows(20, 1), windows(6, 2))


def read_by(trainer):
    batches = [batch for step in trainer.batches_from(0) for batch in step]
    return [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"].tolist()]


def settings(kind, folder, **options):
    values = dict(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=1.0, max_steps=STEPS, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    return kind(**values | options)


def lora_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def stock(lora):
    return start_from(get_peft_model(llama(), adapter()), lora)


def start_from(model, lora):
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert lora.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(lora[name])
    return model


def loss_in_float64(outputs, labels, num_items_in_batch):
    """The loss of transformers, which is in float32 for every model."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def atp_callback(**options):
    calibration = [{"input_ids": row} for row in windows(6, 2).input_ids.tolist()]
    return ATPCallback(calibration, **{"search": SEARCH, "settle": SETTLE, "seed": 3, "decisions": DECISIONS} | options)


def assert_ends_alike(own, folder, callback, trainer):
    """trainer: of transformers or TRL, which has trained as `own` has in `folder`."""
    smaller = callback.cut(trainer.model)
    assert torch.equal(callback.pruning.decisions.mask, own.decisions.mask)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(expected, rel=1e-6)
    weights = dict(own.model.named_parameters())
    assert dict(smaller.named_parameters()).keys() == weights.keys()
    for name, parameter in smaller.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-6, atol=1e-6, msg=name)
    assert callback.certificate["removed_lora_norm"] == 0.0
    assert callback.certificate["masked_vs_cut"] <= LIMITS["masked_vs_cut"]
    assert smaller.num_parameters() < llama().num_parameters()


# Accumulated batches, steps of open, search and settle, source of decisions, regularizer or target. The default recipe
# has open steps alone; what is removed from their adapter is gone at the cut.
RUNS = """1 0 5 2 learned lasso, 2 0 5 2 learned l0, 1 0 5 2 tuned, 2 0 5 2 running, 2 4 0 0 static, 2 4 0 0 running,
    1 4 0 0 -, 2 4 0 2 tuned, 1 4 0 2 running, 2 4 3 0 learned, 2 4 3 0 running, 1 4 3 2 learned, 2 4 3 2 -,
    1 0 0 7 tuned 0.4"""


@pytest.mark.parametrize("run", RUNS.split(","))
def test_transformers_trainer_ends_where_our_own_loop_does(tmp_path, run):
    *counts, source = run.split()[:5]
    accumulation, *counts = map(int, counts)
    phases, more = dict(zip(("open", "search", "settle"), counts, strict=True)), run.split()[5:]
    regularizer = {"regularizer": more[0]} if more in (["lasso"], ["l0"]) else {}
    wanted = {"source": None if source == "-" else source, "rounds": None}
    wanted |= {"target_keep": 0.4, "rounds": 2} if more == ["0.4"] else {}
    own = ours(tmp_path, accumulation, wanted, **phases, **regularizer)
    samples, model = read_by(own), stock(lora_of(own))
    own.train()  # first: arguments of transformers reset what accelerate knows of the process
    callback = atp_callback(**phases, **regularizer, decisions=DECISIONS | wanted)
    steps = {"gradient_accumulation_steps": accumulation, "max_steps": sum(phases.values())}
    args = settings(TrainingArguments, tmp_path / "hf", **steps)
    trainer = Trainer(model, args, train_dataset=samples, callbacks=[callback], compute_loss_func=loss_in_float64)
    trainer.train()
    assert_ends_alike(own, tmp_path, callback, trainer)
    decisions = callback.pruning.decisions
    assert abs(decisions.budget.share(decisions.mask) - wanted.get("target_keep", 0.6)) < 0.03


@pytest.mark.parametrize(("size", "dropout", "source"), [(1, 0.0, "running"), (8, 0.0, "running"), (1, 0.1, "tuned")])
def test_what_the_trainer_sets_chooses_the_source_of_decisions(tmp_path, size, dropout, source):
    """As `atp train` does: what the open steps collect, where they see enough; the last batch of 20 is smaller."""
    callback = atp_callback(open=4, search=0, settle=0, decisions={"target_keep": 0.4, "saliency_windows": 4})
    args = settings(TrainingArguments, tmp_path / "hf", max_steps=4, per_device_train_batch_size=size)
    samples = [{"input_ids": row, "labels": row} for row in windows(20, 1).input_ids.tolist()]
    model = get_peft_model(llama(), adapter(lora_dropout=dropout))
    trainer = Trainer(model, args, train_dataset=samples, callbacks=[callback])
    trainer.train()
    callback.cut(trainer.model)
    assert callback.pruning.settings.source == source
    assert callback.pruning.settings.rounds == (2 if source == "running" else 1)


def test_trl_sft_trainer_ends_where_our_own_loop_does(tmp_path):
    """TRL wraps the model itself; the callback finds the adapter when training begins."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    own = ours(tmp_path, 1)
    samples = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in read_by(own)])
    lora = lora_of(own)
    own.train()
    callback = atp_callback()
    vocabulary = {"<pad>": 0, "<eos>": 1, **{str(number): number for number in range(2, 64)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<pad>", **tokens)
    trainer = trl.SFTTrainer(
        llama(), settings(trl.SFTConfig, tmp_path / "trl", max_length=16), train_dataset=samples,
        processing_class=tokenizer, peft_config=adapter(), callbacks=[callback], compute_loss_func=loss_in_float64,
    )  # fmt: skip
    start_from(trainer.model, lora)
    trainer.train()
    assert_ends_alike(own, tmp_path, callback, trainer)


def test_training_goes_on_with_the_smaller_model(tmp_path):
    """Training stops at the end of settle, whatever max_steps is, and a new Trainer tunes what `cut` returned."""
    own = ours(tmp_path, 1)
    samples, lora, callback = read_by(own) * 2, lora_of(own), atp_callback()
    args = settings(TrainingArguments, tmp_path / "hf", max_steps=100)
    trainer = Trainer(stock(lora), args, train_dataset=samples, callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == STEPS
    smaller = callback.cut(trainer.model)
    before = {name: p.detach().clone() for name, p in smaller.named_parameters()}
    args.max_steps = 3
    tuned = Trainer(smaller, args, train_dataset=samples)
    tuned.train()
    assert all(entry["loss"] > 0 for entry in tuned.state.log_history if "loss" in entry)
    changed = {name for name, p in smaller.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    own = ours(tmp_path, 1)
    samples, lora, found = read_by(own), lora_of(own), []
    for checkpointing in (False, True):
        callback = atp_callback(regularizer="l0")
        args = settings(TrainingArguments, tmp_path / "hf", gradient_checkpointing=checkpointing)
        trainer = Trainer(stock(lora), args, train_dataset=samples, callbacks=[callback])
        trainer.train()
        found.append(dict(callback.cut(trainer.model).named_parameters()))
    assert found[0].keys() == found[1].keys()
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter)


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def test_non_finite_steps_are_skipped_and_end_training_when_there_are_too_many(tmp_path):
    own = ours(tmp_path, 1)
    samples, lora = read_by(own), lora_of(own)

    class Poisoned(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return Poison.apply(loss) if self.state.global_step in self.bad else loss

    for bad, stops in (({2}, False), ({2, 3}, True)):
        callback = atp_callback(max_bad_steps=2)
        args = settings(TrainingArguments, tmp_path / "hf")
        trainer = Poisoned(stock(lora), args, train_dataset=samples, callbacks=[callback])
        trainer.bad = bad
        if stops:
            with pytest.raises(NotReached, match="2 steps in a row had a non-finite gradient, the last one at step 4"):
                trainer.train()
        else:
            trainer.train()
            assert callback.finite.skipped == 1
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_wrong_use_is_told_in_one_sentence(tmp_path):
    own = ours(tmp_path, 1)
    samples, lora = read_by(own), lora_of(own)
    with pytest.raises(InputError, match="^ATPCallback needs calibration data and got no row"):
        ATPCallback([], search=2, settle=1)
    with pytest.raises(InputError, match="^calibration rows have text and no input_ids: tokenize them"):
        ATPCallback([{"text": "a b"}], search=2, settle=1)
    with pytest.raises(InputError, match=r"decisions\.target_kep"):
        ATPCallback([{"input_ids": [1, 2]}], search=2, settle=1, decisions={"target_kep": 0.5})

    def train(model, args=None, **options):
        args = settings(TrainingArguments, tmp_path / "hf", **args or {})
        callback = atp_callback(**options)
        Trainer(model, args, train_dataset=samples, callbacks=[callback]).train()
        return callback

    def partly():
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    unscored = {"input_ids": [1, 2, 3], "labels": [3, -100, -100]}  # nothing predicts the first token
    with pytest.raises(InputError, match="^no calibration row has a token with a loss: give some"):
        ATPCallback([unscored], open=1)
    assert len(ATPCallback([unscored, {"input_ids": [1, 2]}], open=1).calibration) == 1
    with pytest.raises(InputError, match="^ATPCallback has no step to decide in: set open"):
        ATPCallback([{"input_ids": [1, 2]}])
    for message, model, options in (
        ("^ATPCallback needs a model with a LoRA adapter", llama(), {}),
        ("^LoRA is on 2 linears, 2 of the 14 that decisions remove from", partly(), {}),
        ("^ATPCallback needs plain LoRA", get_peft_model(llama(), adapter(use_dora=True)), {}),
        ("^the phases take 40 steps and the Trainer makes 7: set max_steps", stock(lora), {"search": 38}),
        ("^ATPCallback skips non-finite steps by torch's fused", stock(lora), {"args": {"optim": "adamw_torch"}}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            train(model, **options)
    fresh = atp_callback()
    with pytest.raises(InputError, match="^the model can be cut after the 7 steps of its phases and has trained 0"):
        fresh.cut(llama())
    done = train(stock(lora))
    with pytest.raises(InputError, match="takes the model that this callback trained with"):
        done.cut(llama())
    done.cut(done.pruning.model)
    with pytest.raises(InputError, match="takes the model that this callback trained with, once"):
        done.cut(done.pruning.model)


def test_import_needs_no_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    runpy.run_path(integrations.__file__)
