"""A rival in `atp compare`: another model with another tokenizer, the same documents, and as long as ATP trained."""

import copy
import json
import random
import shutil
import signal

import pytest
import torch
from peft import get_peft_model
from tiny_callbacks import StopAt
from tiny_tokenizers import TEXTS, byte_level
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from atp.baselines.tuner import stock_lora
from atp.config import ATPConfig
from atp.data import collate
from atp.evaluation.perplexity import ScoredWindows, bytes_of, windows_of
from atp.ground.errors import InputError, Interrupted
from atp.lora.layer import lora_config
from atp.removal import reference_logits
from atp.studies.compare import Comparison, baseline_run
from atp.studies.compare.arms import Arm, compared
from atp.studies.compare.results import trained_seconds
from atp.studies.compare.rival import RivalRun
from atp.studies.compare.table import comparison_remarks, table
from atp.training.loss import causal_lm_loss

pytestmark = pytest.mark.usefixtures("wide_budget")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def neox(vocab_size, **changes):
    """A model of a family that cannot be cut: its queries, keys and values are one linear."""
    torch.manual_seed(1)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab_size, **SIZES, **ends, **changes))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """(config on a tiny Llama, a rival of the same family with fewer words, one of a family that cannot be cut)."""
    folder = tmp_path_factory.mktemp("inputs")
    words, fewer = byte_level(vocab_size=340), byte_level(vocab_size=290)
    torch.manual_seed(0)
    for name, tokenizer in (("ours", words), ("small", fewer)):
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=2, **SIZES)
        save(folder / name, LlamaForCausalLM(config), tokenizer)
    save(folder / "neox", neox(len(fewer)), fewer)
    draw, vocabulary = random.Random(0), " ".join(TEXTS).split()
    rows = [
        {"prompt": " ".join(draw.choices(vocabulary, k=12)), "completion": (" yes", " no")[i % 2]} for i in range(60)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = ATPConfig.parse({
        "model": {"path": str(folder / "ours")}, "output_dir": "unused",
        "data": {"train": str(folder / "data.jsonl"), "labels": ["yes", "no"], "length": 64, "general_share": 0,
                 "loss_on": "all"},
        "decisions": {"space": "kv_group", "saliency_windows": 2, "refit_windows": 2, "target_keep": 0.6},
        "training": {"open": 2, "tune": 4, "warmup": 1, "lr": 5e-3, "precision": "float32"},
        "evaluation": {"windows": 3, "questions": 4, "samples": 0},
    })  # fmt: skip
    return config, f"model:{folder / 'small'}", f"model:{folder / 'neox'}"


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A comparison of ATP with both rivals, which are named first."""
    config, *rivals = settings
    folder = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)
        content = Comparison(config, [*rivals, "atp"], [0], folder, resume=False, command="atp compare").execute()
    return folder, content


def read(folder, method, name):
    """A file of a member's folder."""
    path = next(path for path in folder.iterdir() if path.name.endswith(f"{method}-seed0"))
    return json.loads((path / name).read_text(encoding="utf-8"))


def test_a_rival_reads_the_same_documents_with_its_own_tokenizer(finished):
    folder, _ = finished
    ours, *others = (read(folder, name, "summary.json") for name in ("atp", "small", "neox"))
    for found in (ours, *others):
        found["data"].pop("description")  # which counts the windows
    assert ours["data"] == others[0]["data"] == others[1]["data"] and "train" in ours["data"]
    inputs = [read(folder, name, "inputs.json") for name in ("atp", "small", "neox")]
    assert len({found["test data"] for found in inputs}) == 1
    assert inputs[0]["tokenizer"] != inputs[1]["tokenizer"] == inputs[2]["tokenizer"]
    scores = [read(folder, name, "evaluation.json")["final"] for name in ("atp", "small")]
    size = [sum(item[2] for item in found["items"]) for found in scores]
    assert scores[0]["tokens"] < scores[1]["tokens"], "fewer words take more tokens"
    most = 64 * size[1] / scores[1]["tokens"]  # bytes of a window of the rival's
    assert size[0] <= size[1] < size[0] + 2 * most or size[1] == sum(i[2] for i in scores[1]["items"])
    truths = [[truth for truth, _ in found["tasks"]["qa"]["items"]] for found in scores]
    assert truths[0] == truths[1]


def test_it_trains_as_long_as_atp_in_every_layer(finished):
    folder, content = finished
    seconds = trained_seconds(read(folder, "atp", "summary.json"))
    for name in ("small", "neox"):
        summary, length = read(folder, name, "summary.json"), read(folder, name, "length.json")
        assert summary["rival"]["seconds"] == pytest.approx(seconds)
        assert summary["keep_decoder"] == 1 and summary["params_before"] == summary["params_after"]
        steps = [json.loads(line)["step"] for line in metrics(folder, name)]
        assert steps == list(range(1, length["steps"] + 1))
        assert summary["perplexity"]["final"] < summary["perplexity"]["original"]
        row = content["methods"][summary["method"]]
        assert row["params"] == summary["params_after"] and "perplexity_ratio" not in row


def metrics(folder, method):
    path = next(path for path in folder.iterdir() if path.name.endswith(f"{method}-seed0"))
    return (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_the_table_marks_what_cannot_be_compared(finished, settings):
    _, content = finished
    head, rows = table(content)
    assert all(len(row) == len(head) for row in rows) and head[3:5] == ["parameters", "MB"]
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    rival = cells[settings[1]]
    assert rival["decoder kept"] == rival["all kept"] == "–" and rival["perplexity ↓"].endswith(" *")
    assert not cells["atp"]["perplexity ↓"].endswith("*") and cells["atp"]["bits per byte ↓"] != "–"
    assert rival["bits per byte ↓"] != "–" and rival["qa macro f1 ↑"] != "–"
    said = " ".join(comparison_remarks(content))
    assert f"{settings[1]} trained as long as atp," in said and "not comparable" in said


def test_a_finished_rival_is_left_as_it_is_and_another_seed_joins(finished, settings, monkeypatch):
    folder, content = finished
    monkeypatch.setattr(RivalRun, "_execute", lambda self: pytest.fail("it is finished"))
    again = Comparison(settings[0], ["atp", settings[1]], [0], folder, resume=True, command="atp compare").execute()
    assert again["methods"][settings[1]] == content["methods"][settings[1]]


def test_without_atp_it_takes_the_steps_of_the_config(settings, tmp_path):
    config, rival, _ = settings
    content = Comparison(config, [rival], [0], tmp_path / "out", resume=False, command="atp compare").execute()
    assert len(metrics(tmp_path / "out", "small")) == config.training.total
    assert list(content["methods"]) == [rival]
    assert f"{rival} trained as many steps as the config has, because there was no atp" in " ".join(
        comparison_remarks(content)
    )


def test_an_unknown_family_trains_as_stock_peft_does(settings):
    """Its loss and the gradients of its adapter are those of PEFT's model under transformers' loss."""
    config, model = settings[0], neox(40, attention_dropout=0.0, hidden_dropout=0.0)
    reference = neox(40, attention_dropout=0.0, hidden_dropout=0.0)
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    ours = stock_lora(model, config)
    torch.manual_seed(config.seed)
    theirs = get_peft_model(reference, lora_config(names, **config.lora.model_dump()))
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    batch = collate([{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)])
    loss, expected = causal_lm_loss(ours, batch), theirs(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    trained = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys() and not any("embed_out" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, trained[name])


def test_its_narrow_weights_are_widened_for_the_certificate():
    model, ids = neox(40).bfloat16().eval(), torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(ids).logits
    torch.testing.assert_close(reference_logits(model, ids), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_windows_of_another_tokenizer_hold_the_same_text():
    """By hand: windows of 3, 5 and 4 bytes; the first position of a window is not predicted."""
    sizes = torch.tensor([[9, 1, 2], [9, 4, 1], [9, 2, 2]])
    windows = ScoredWindows(sizes, sizes, sizes, {}, sizes)
    assert [bytes_of(windows, count) for count in (1, 2, 9)] == [3, 8, 12]
    assert [windows_of(windows, size, 1) for size in (1, 3, 4, 8, 9, 99)] == [1, 1, 2, 2, 3, 3]
    assert windows_of(windows, None, 2) == windows_of(ScoredWindows(sizes, sizes, sizes, {}), 4, 2) == 2


def test_rivals_come_last_and_wrong_ones_are_refused_at_once(settings, tmp_path):
    config, rival, other = settings
    assert [arm.method for arm in compared([rival, "atp", other, "random", rival], [0])] == [
        "atp", "random", rival, other,
    ]  # fmt: skip
    with pytest.raises(InputError, match="names no model: give model:PATH"):
        Arm("model: ")
    with pytest.raises(InputError, match="no such file or folder"):
        Arm(f"model:{tmp_path}/none")
    short = tmp_path / "short"
    save(short, neox(290, max_position_embeddings=32), byte_level(vocab_size=290))
    with pytest.raises(InputError, match="data.length is 64, but the model has only 32 positions"):
        Comparison(config, [f"model:{short}"], [0], tmp_path / "out", resume=False, command="").execute()
    assert not (tmp_path / "out").exists()


def test_an_interrupted_rival_keeps_its_number_of_steps(finished, settings, monkeypatch):
    """The last test of the comparison, whose member it runs once more."""
    folder, tuner = finished[0], baseline_run.LoraTuner
    shutil.rmtree(next(path for path in folder.iterdir() if path.name.endswith("small-seed0")))

    def stopping(*given, callbacks, **options):
        return tuner(*given, callbacks=[*callbacks, StopAt(2, signal.SIGTERM)], **options)

    def again():
        Comparison(settings[0], ["atp", settings[1]], [0], folder, resume=True, command="atp compare").execute()

    monkeypatch.setattr(baseline_run, "LoraTuner", stopping)
    monkeypatch.setattr(RivalRun, "_seconds_per_step", lambda self, *_: 60 * self.asked.training.minutes / 5.5)
    with pytest.raises(Interrupted):
        again()
    monkeypatch.setattr(baseline_run, "LoraTuner", tuner)
    monkeypatch.setattr(RivalRun, "_seconds_per_step", lambda *_: pytest.fail("its steps are known"))
    again()
    assert [json.loads(line)["step"] for line in metrics(folder, "small")] == [1, 2, 3, 4, 5]
