"""Answers by likelihood against float64, greedy ones against a plain loop, and ROUGE against counts by hand."""

import pytest
import torch
from tiny_scored import LABELS, WORDS, float64_log_probs, tiny_model, word_tokenizer

from atp.data.splits import Example
from atp.data.tasks import Task
from atp.evaluation.generation import first_paragraph, generate_answers, rouge_items, rouge_scores
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


def test_long_questions_and_prompts_lose_their_left_end(model, tokenizer, examples):
    question = tokenize_questions(tokenizer, [examples[-1]], LABELS, max_length=6)[0]
    assert question.prompt == tokenizer(examples[-1].prompt).input_ids[-5:]
    with pytest.raises(InputError, match="max_length 1"):
        tokenize_questions(tokenizer, examples, LABELS, max_length=1)
    short, long = generate_answers(model, tokenizer, ["is it ?", "the cat is it ?"], max_new_tokens=4, max_length=7)
    assert short == long
    with pytest.raises(InputError, match="max_length 4 leaves no room for a prompt and 4 tokens"):
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4, max_length=4)


def test_labels_beside_the_task_and_answers_of_a_model_that_gives_nan_are_refused(model, tokenizer, examples):
    with pytest.raises(InputError, match="maybe are not among yes, no"):
        label_scores(model, tokenizer, examples, ("yes", "no"))
    with pytest.raises(InputError, match="no labelled examples"):
        label_scores(model, tokenizer, [], LABELS)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NotReached, match="question 1 are not finite"):
        label_scores(broken, tokenizer, examples, LABELS)


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


PROMPTS = ["the cat sat on the mat .", "is it ?", "not sure the cat : Answer", "mat"]


def greedy(model, ids, steps):
    """The likeliest next token, again and again, each from a fresh unbatched pass."""
    new = []
    for _ in range(steps):
        new.append(int(float64_log_probs(model, ids + new)[-1].argmax()))
        if new[-1] == WORDS.index("</s>"):
            break
    return new


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batched_answers_equal_a_plain_loop(model, batch_size, bos):
    tokenizer = word_tokenizer(bos)
    seen = []
    answers = generate_answers(
        model, tokenizer, PROMPTS, batch_size, max_new_tokens=6, max_length=64, progress=lambda *at: seen.append(at)
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = [WORDS.index("<s>")] * bos + [WORDS.index(word) if word in WORDS else 0 for word in prompt.split()]
        assert answer == tokenizer.decode(greedy(model, ids, 6), skip_special_tokens=True).strip()
    assert len(set(answers)) > 1 and seen[-1] == (4, 4)


def test_an_answer_ends_at_the_models_own_end_tokens_and_at_a_blank_line(model, tokenizer):
    longer = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    ends = tokenizer.convert_tokens_to_ids(longer[0].split()[1])
    shorter = tiny_model()
    shorter.generation_config.eos_token_id = [1, ends]
    answer = generate_answers(shorter, tokenizer, PROMPTS, max_new_tokens=6)[0]
    assert answer.split() == longer[0].split()[:2] and len(longer[0].split()) > 2
    assert first_paragraph("\n the first\nstill\n\nthe second") == "the first\nstill"
    assert first_paragraph("  ") == ""


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Stems: cat sat mat / cat sit mat. Unigrams 2 of 3 and 3; bigrams none of 2; longest common subsequence 2.
    one, two, longest = rouge_items(["cats sat mats"], ["cat sitting mat"])[0]
    assert (one, two, longest) == pytest.approx((2 / 3, 0, 2 / 3))
    # All three words, other order: unigrams 1, bigram "a b" 1 of 2, subsequence 2 of 3.
    assert rouge_items(["axe bow cup"], ["cup axe bow"])[0] == pytest.approx((1, 1 / 2, 2 / 3))
    # Recall 2/4, precision 2/2.
    assert rouge_items(["axe bow cup dog"], ["axe bow"])[0][0] == pytest.approx(2 / 3)
    assert rouge_items(["axe"], [""])[0] == pytest.approx((0, 0, 0))


def test_scores_are_means_with_intervals(model, tokenizer):
    pytest.importorskip("rouge_score")
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    right = [Example(str(n), prompt, answer) for n, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))]
    perfect = rouge_scores(model, tokenizer, right, max_new_tokens=6)
    told = [bool(answer) for answer in answers]
    assert perfect["rouge1"] == pytest.approx(sum(told) / 4) and perfect["n"] == 4
    mixed = [*right[:2], *(Example(e.document, e.prompt, " zebra") for e in right[2:])]
    half = rouge_scores(model, tokenizer, mixed, max_new_tokens=6)
    assert half["rougeL"] == pytest.approx(sum(told[:2]) / 4)
    low, high = half["rougeL_interval"]
    assert low < half["rougeL"] < high
    assert [item[3] for item in half["items"]] == answers
    with pytest.raises(InputError, match="no answers to generate"):
        rouge_scores(model, tokenizer, [])


def test_missing_package_names_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match="pip install rouge-score"):
        rouge_items(["a"], ["a"])
