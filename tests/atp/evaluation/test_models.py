"""One dict of scores for any model and any form of it, its speed and its size."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_scored import LABELS, tiny_model
from transformers import LlamaForCausalLM

from atp.data.packing import PackedDataset
from atp.data.tasks import ROUGE, Task
from atp.evaluation import evaluate_model, model_size, packed_windows, sliding_windows, throughput, throughputs
from atp.evaluation.generation import generate_answers
from atp.evaluation.inference import inference
from atp.evaluation.speed import median_interval
from atp.ground.errors import InputError
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.removal import cut_model, merge_adapter
from atp.spaces.space import MaskSpace

QA = Task("qa", LABELS)


def test_evaluation_leaves_the_model_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    with inference(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    model.eval()


def test_peft_wrapped_model_scores_as_its_base(model, tokenizer, examples):
    ids = torch.arange(64).view(4, 16) % 32
    windows = packed_windows(PackedDataset(ids, ids), tokenizer)
    stock = evaluate_model(model, tokenizer, windows, examples, tasks=[QA])
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    wrapped = get_peft_model(copy, LoraConfig(r=2, target_modules="all-linear"))
    scored = evaluate_model(wrapped, tokenizer, windows, examples, tasks=[QA])
    assert scored["perplexity"] == pytest.approx(stock["perplexity"], rel=1e-6)
    assert scored["tasks"] == stock["tasks"]
    assert model_size(wrapped) == model_size(model)
    asked = ["the cat sat on the mat .", "is it ?"]
    assert generate_answers(wrapped.train(), tokenizer, asked) == generate_answers(model, tokenizer, asked)
    assert wrapped.training
    assert evaluate_model(model, tokenizer, windows, examples)["tasks"] == {}


def test_size_counts_tied_weights_once(model):
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    size = model_size(model)
    assert size == {
        "params": 32 * 64 + 2 * layer + 64, "decoder_params": 2 * layer, "megabytes": 4 * size["params"] / 1e6
    }  # fmt: skip
    narrow = LlamaForCausalLM(model.config).to(torch.bfloat16)
    assert model_size(narrow)["megabytes"] == size["megabytes"] / 2


def test_models_are_timed_in_turns_and_in_their_own_order(model, monkeypatch):
    # A clock whose n-th reading is n^2. A repeat reads it 2 times for prefill and 1 + 1 + 4 times for decoding, the
    # warm-up 2 and 1 + 1 + 1 times.
    readings = iter(n * n for n in range(200))
    monkeypatch.setattr("atp.evaluation.speed._now", lambda device: float(next(readings)))
    models, passes = [copy.deepcopy(model), copy.deepcopy(model)], []
    for index, each in enumerate(models):
        width = lambda given, named: (named["input_ids"] if "input_ids" in named else given[0]).shape[1]  # noqa: E731
        each.model.register_forward_pre_hook(
            lambda _, given, named, index=index, width=width: passes.append((index, width(given, named))),
            with_kwargs=True,
        )
    speeds = throughputs(models, prompt_tokens=28, new_tokens=4, batch_size=2, repeats=1)
    assert [index for index, _ in itertools.groupby(index for index, _ in passes)] == [0, 1] * 2
    for index in (0, 1):
        widths = [width for which, width in passes if which == index]
        assert widths[3:] == [28, 1, 1, 1, 1, 1], "a pass of one token after the prompt; the first three warm up"
    # After the warm-up of both, the readings of the first come before those of the second.
    for speed, first in zip(speeds, (10, 18), strict=True):
        assert speed["prefill_tokens_per_second"] == pytest.approx(2 * 28 / ((first + 1) ** 2 - first**2))
        decode = (first + 7) ** 2 - (first + 3) ** 2
        assert speed["decode_tokens_per_second"] == pytest.approx(2 * 4 / decode)


@pytest.fixture
def scripted(monkeypatch):
    """Rounds in which one model takes these seconds to read 256 tokens and to write 16; returns its figures."""

    def times(*seconds, **options):
        taken = itertools.chain([(1.0, 1.0)], seconds)  # a warm-up
        monkeypatch.setattr("atp.evaluation.speed._seconds", lambda *_: next(taken))
        return throughput(None, **options)

    return times


def test_rounds_end_when_the_median_is_known_or_after_a_time(scripted):
    steady = scripted(*[(2.0, 4.0)] * 50)
    assert steady == {
        "prefill_tokens_per_second": 128.0, "prefill_tokens_per_second_interval": [128.0, 128.0],
        "decode_tokens_per_second": 4.0, "decode_tokens_per_second_interval": [4.0, 4.0], "speed_repeats": 3,
    }  # fmt: skip
    restless = scripted((2.0, 4.0), (2.0, 8.0), *[(2.0, 4.0)] * 50, seconds=1e9)
    assert restless["speed_repeats"] == 9, "of nine the second largest bounds the interval, of eight the largest"
    assert restless["decode_tokens_per_second_interval"] == [4.0, 4.0]
    found = scripted(*[(1.0, float(each)) for each in (2, 3, 4, 5, 6)], seconds=19.0)
    assert found["speed_repeats"] == 5, "after 1 + 2 + 1 + 3 + 1 + 4 + 1 + 5 = 18 seconds there is time for one more"
    assert found["decode_tokens_per_second"] == 4.0
    assert found["decode_tokens_per_second_interval"] == [pytest.approx(16 / 6), 8.0]
    slow = scripted(*[(100.0, 200.0), (150.0, 300.0)] * 25, seconds=19.0)
    assert slow["speed_repeats"] == 3, "so few have a spread"


def test_rounds_end_when_all_processes_say_so(scripted):
    asked = []

    def agreed(ends):
        asked.append(ends())
        return len(asked) == 4

    assert scripted(*[(2.0, 4.0)] * 50, agreed=agreed)["speed_repeats"] == 6
    assert asked == [True] * 4


def test_a_median_lies_in_its_interval_as_often_as_it_says():
    draws = torch.rand(4000, 12, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(low < 0.5 < high for low, high in map(median_interval, draws)) / len(draws)
    assert 0.95 < covered < 0.97, "1 - 2 * (1 + 12 + 66) / 2**12"
    assert median_interval([3.0]) == [3.0, 3.0] and median_interval([3.0, 1.0, 2.0]) == [1.0, 3.0]


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch_size", "repeats"])
def test_a_size_of_nothing_is_refused_before_anything_runs(model, name):
    timed = copy.deepcopy(model)
    timed.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(InputError, match=f"^there is no speed with {name}=0: give at least 1$"):
        throughput(timed, **{name: 0})


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_masked_cut_and_merged_models_score_alike(tokenizer, examples, space_name):
    pytest.importorskip("rouge_score")
    base = tiny_model(seed=5)
    space = MaskSpace.from_config(base.config, space_name)
    model = add_lora(base, space, r=2, alpha=4.0, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    mask = torch.rand(space.size, generator=generator) < 0.6
    for structure in space.structures:
        mask[structure.start] = True
    tasks = [Task("qa", LABELS), Task("free", metrics=ROUGE, max_new_tokens=5)]
    asked = [*examples, *(type(e)(e.document, e.prompt, " the cat sat", None, "free") for e in examples[:4])]
    windows = sliding_windows(asked, tokenizer, 12)

    def scores(form):
        return evaluate_model(form, tokenizer, windows, asked, tasks=tasks, batch_size=4)

    dense = scores(model)
    with MaskController(model, space).masks(mask, "sum"):
        masked = scores(model)
    cut = cut_model(model, space, mask)
    for other in (scores(cut), scores(merge_adapter(cut))):
        assert other["tasks"]["qa"]["items"] == masked["tasks"]["qa"]["items"]
        assert other["tasks"]["free"]["items"] == masked["tasks"]["free"]["items"]
        assert other["perplexity"] == pytest.approx(masked["perplexity"], rel=1e-4)
        assert other["perplexity_interval"] == pytest.approx(masked["perplexity_interval"], rel=1e-4)
    assert dense["perplexity"] != pytest.approx(masked["perplexity"], rel=1e-2), "the mask must matter in this test"
