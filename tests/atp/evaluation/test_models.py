"""Perplexity, answers, speed and size on a tiny Llama, against float64 recomputation."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp.data.packing import IGNORE, PackedDataset
from atp.data.splits import Example
from atp.errors import InputError
from atp.evaluation import evaluate_model, label_accuracy, model_size, perplexity, throughput
from atp.evaluation.inference import inference
from atp.evaluation.tasks import Question, score_labels, tokenize_questions

LABELS = ("yes", "no", "maybe")
WORDS = ["<unk>", "</s>", *LABELS, *"not sure the cat sat on mat is it ? Answer :".split()]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def examples():
    prompts = ["the cat sat on the mat . is it ? Answer :", "it is the cat ? Answer :", "on the mat ? Answer :"] * 3
    return [
        Example(str(n), "the " * n + prompt, f" {label}", label)
        for n, (prompt, label) in enumerate(zip(prompts, LABELS * 3, strict=True))
    ]


def float64_log_probs(model, ids):
    """Log-probabilities after every token of one sequence, float64 [length, vocab], unbatched and unpadded."""
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        return double(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_equals_float64(model, batch_size):
    ids = torch.randint(0, 32, (5, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:9] = IGNORE
    labels[4] = IGNORE
    nll = [
        -float64_log_probs(model, ids[row].tolist())[position - 1, ids[row, position]].item()
        for row in range(5)
        for position in range(1, 16)
        if labels[row, position] != IGNORE
    ]
    result = perplexity(model, PackedDataset(ids, labels), batch_size)
    assert result["tokens"] == len(nll) == 3 * 15 + 9
    assert result["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_perplexity_of_first_windows_and_progress(model):
    ids = torch.arange(96).view(6, 16) % 32
    seen = []
    few = perplexity(model, PackedDataset(ids, ids), 3, max_windows=4, progress=lambda *at: seen.append(at))
    assert few == perplexity(model, PackedDataset(ids[:4], ids[:4]), 3)
    assert seen == [(3, 4), (4, 4)]


def test_multi_token_labels_equal_float64(model, tokenizer, examples):
    labels = ("yes", "not sure", "no")
    scores = score_labels(model, tokenize_questions(tokenizer, examples, labels, 64), batch_size=4)
    for row, example in enumerate(examples):
        prompt = tokenizer(example.prompt).input_ids
        for column, label in enumerate(labels):
            tokens = tokenizer(label).input_ids
            log_probs = float64_log_probs(model, prompt + tokens)
            expected = sum(log_probs[len(prompt) - 1 + n, token] for n, token in enumerate(tokens))
            assert scores[row, column].item() == pytest.approx(expected.item(), abs=1e-5)


def test_general_path_equals_one_token_path(model, tokenizer, examples):
    questions = tokenize_questions(tokenizer, examples, LABELS, 64)
    assert all(len(tokens) == 1 for question in questions for tokens in question.continuations)
    # A second token that every label shares a question forces one sequence a label; take its share off again.
    suffix = WORDS.index("</s>")
    longer = [Question(q.prompt, [[*tokens, suffix] for tokens in q.continuations]) for q in questions]
    tails = torch.stack([
        torch.stack([float64_log_probs(model, q.prompt + tokens)[-1, suffix] for tokens in q.continuations])
        for q in questions
    ])  # fmt: skip
    fast, general = score_labels(model, questions, 4), score_labels(model, longer, 4)
    torch.testing.assert_close(general - tails, fast, atol=1e-5, rtol=0)


def test_accuracy_counts_the_most_probable_label(model, tokenizer, examples):
    columns = [WORDS.index(label) for label in LABELS]
    best = [LABELS[float64_log_probs(model, tokenizer(e.prompt).input_ids)[-1, columns].argmax()] for e in examples]
    result = label_accuracy(model, tokenizer, examples, LABELS, batch_size=4)
    assert result["n"] == 9
    assert result["accuracy"] == pytest.approx(sum(e.label == b for e, b in zip(examples, best, strict=True)) / 9)
    assert sum(result["confusion"][t][p] for t in LABELS for p in LABELS) == 9
    assert all(result["confusion"][e.label][b] > 0 for e, b in zip(examples, best, strict=True))
    relabelled = [Example(e.document, e.prompt, f" {b}", b) for e, b in zip(examples, best, strict=True)]
    assert label_accuracy(model, tokenizer, relabelled, LABELS)["accuracy"] == 1.0
    assert label_accuracy(model, tokenizer, relabelled, LABELS, max_examples=2)["n"] == 2


def test_long_prompts_lose_their_left_end(model, tokenizer, examples):
    question = tokenize_questions(tokenizer, [examples[-1]], LABELS, max_length=6)[0]
    assert question.prompt == tokenizer(examples[-1].prompt).input_ids[-5:]
    with pytest.raises(InputError, match="max_length 1"):
        tokenize_questions(tokenizer, examples, LABELS, max_length=1)


def test_label_refusals(model, tokenizer, examples):
    with pytest.raises(InputError, match="maybe are not among yes, no"):
        label_accuracy(model, tokenizer, examples, ("yes", "no"))
    with pytest.raises(InputError, match="no labelled examples"):
        label_accuracy(model, tokenizer, [], LABELS)


def test_evaluation_leaves_the_model_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    with inference(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    model.eval()


def test_peft_wrapped_model_scores_as_its_base(model, tokenizer, examples):
    ids = torch.arange(64).view(4, 16) % 32
    windows = PackedDataset(ids, ids)
    stock = evaluate_model(model, tokenizer, windows, examples, labels=LABELS)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    wrapped = get_peft_model(copy, LoraConfig(r=2, target_modules="all-linear"))
    scored = evaluate_model(wrapped, tokenizer, windows, examples, labels=LABELS)
    assert scored["perplexity"] == pytest.approx(stock["perplexity"], rel=1e-6)
    assert scored["qa"] == stock["qa"]
    assert model_size(wrapped) == model_size(model)
    assert "qa" not in evaluate_model(model, tokenizer, windows, examples)


def test_size_counts_tied_weights_once(model):
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    size = model_size(model, torch.float32)
    assert size == {
        "params": 32 * 64 + 2 * layer + 64, "decoder_params": 2 * layer, "megabytes": 4 * size["params"] / 1e6
    }  # fmt: skip
    assert model_size(model)["megabytes"] == pytest.approx(size["megabytes"] / 2)


def test_throughput_is_tokens_over_median_seconds(model, monkeypatch):
    # A clock whose n-th reading is n^2. A repeat reads it 2 times for prefill and 1 + 1 + 4 times for decoding.
    readings = iter(n * n for n in range(100))
    monkeypatch.setattr("atp.evaluation.speed._now", lambda device: float(next(readings)))
    speed = throughput(model, prompt_tokens=28, new_tokens=4, batch_size=2, repeats=3)
    first = 8 * 2  # The median is the second of three repeats, after the warm-up.
    prefill = (first + 1) ** 2 - first**2
    decode = (first + 7) ** 2 - (first + 3) ** 2
    assert next(readings) == (8 * 4) ** 2
    assert speed["prefill_tokens_per_second"] == pytest.approx(2 * 28 / prefill)
    assert speed["decode_tokens_per_second"] == pytest.approx(2 * 4 / decode)
