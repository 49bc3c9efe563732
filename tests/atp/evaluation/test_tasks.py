"""Answers by likelihood on a tiny Llama, against float64 recomputation."""

import pytest
import torch
from tiny_scored import LABELS, WORDS, float64_log_probs, tiny_model

from atp.data.splits import Example
from atp.data.tasks import Task
from atp.evaluation.suite import check_questions
from atp.evaluation.tasks import Question, label_scores, score_labels, tokenize_questions
from atp.ground.errors import InputError, NotReached


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
    result = label_scores(model, tokenizer, examples, LABELS, batch_size=4)
    assert result["n"] == 9
    assert result["accuracy"] == pytest.approx(sum(e.label == b for e, b in zip(examples, best, strict=True)) / 9)
    assert sum(result["confusion"][t][p] for t in LABELS for p in LABELS) == 9
    assert all(result["confusion"][e.label][b] > 0 for e, b in zip(examples, best, strict=True))
    relabelled = [Example(e.document, e.prompt, f" {b}", b) for e, b in zip(examples, best, strict=True)]
    assert label_scores(model, tokenizer, relabelled, LABELS)["accuracy"] == 1.0
    assert result["items"] == [[e.label, b] for e, b in zip(examples, best, strict=True)]


def test_long_prompts_lose_their_left_end(model, tokenizer, examples):
    question = tokenize_questions(tokenizer, [examples[-1]], LABELS, max_length=6)[0]
    assert question.prompt == tokenizer(examples[-1].prompt).input_ids[-5:]
    with pytest.raises(InputError, match="max_length 1"):
        tokenize_questions(tokenizer, examples, LABELS, max_length=1)


def test_label_refusals(model, tokenizer, examples):
    with pytest.raises(InputError, match="maybe are not among yes, no"):
        label_scores(model, tokenizer, examples, ("yes", "no"))
    with pytest.raises(InputError, match="no labelled examples"):
        label_scores(model, tokenizer, [], LABELS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("yes", "no", "maybe", "sure thing", "sure bet"), "labels 'sure thing' and 'sure bet' become the same tokens"),
        (("yes", "no", "maybe", "  "), "label ' ' becomes no token after a prompt: change data.labels"),
    ],
)
def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused(model, tokenizer, examples, labels, message):
    """Words that the tokenizer does not know become <unk>, whichever they are."""
    with pytest.raises(InputError, match=message):
        label_scores(model, tokenizer, examples, labels)
    with pytest.raises(InputError, match=message):
        check_questions(tokenizer, model.config, examples, [Task("qa", labels)])
    check_questions(tokenizer, model.config, examples, [Task("qa", ("yes", "no", "maybe"))])


def test_answers_of_a_model_that_gives_nan_are_not_scored(tokenizer, examples):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NotReached, match="question 1 are not finite"):
        label_scores(broken, tokenizer, examples, LABELS)
