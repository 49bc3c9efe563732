"""What a run shows of its models' answers: one question, and prompts side by side."""

import pytest

from atp.data.splits import Example
from atp.data.tasks import ROUGE, Task
from atp.evaluation import samples as shown
from atp.evaluation.answers import answered_question
from atp.evaluation.samples import Sample, held_out_samples, sample_answers

QA, SECOND = Task("qa", ("yes", "no")), Task("second", ("yes", "no"))
FREE = Task("free", metrics=ROUGE)
TRUTH = ["yes", "no", "no", "yes"]


def questions(task="qa"):
    return [Example(str(n), f"{task} question {n}", "", label, task) for n, label in enumerate(TRUTH)]


def scored(*answers, task="qa"):
    return {"tasks": {task: {"items": [list(pair) for pair in zip(TRUTH, answers, strict=True)]}}}


def test_the_first_that_tuning_taught():
    models = {
        "original": scored("yes", "no", "yes", "no"),
        "tuned_dense": scored("yes", "no", "yes", "yes"),
        "final": scored("no", "no", "no", "yes"),
    }
    told = answered_question(models, [Example("x", "plain text"), *questions()], [FREE, QA])
    assert (told["task"], told["prompt"], told["truth"]) == ("qa", "qa question 2", "no")
    assert told["models"] == {"original": "yes", "tuned_dense": "yes", "final": "no"}
    assert told["chosen"] == (
        "A question that tuning taught: the first of 2 (of 4 test questions of qa) that the original model gets wrong "
        "and the final one right. For 1 it is the other way around."
    )


@pytest.mark.parametrize("final", [("yes", "no", "yes", "no"), ("no", "no", "yes", "no")])
def test_without_such_a_question_the_first_is_shown_and_it_says_so(final):
    """The second model even unlearns one, which must not pass for one that tuning taught."""
    models = {"original": scored("yes", "no", "yes", "no"), "final": scored(*final)}
    told = answered_question(models, questions(), [QA])
    assert told["prompt"] == "qa question 0" and told["models"]["final"] == final[0]
    assert told["chosen"].startswith("The first test question: there is none")


def test_every_task_is_looked_through():
    models = {
        "original": {"tasks": scored(*TRUTH)["tasks"] | scored("no", *TRUTH[1:], task="second")["tasks"]},
        "final": {"tasks": scored(*TRUTH)["tasks"] | scored(*TRUTH, task="second")["tasks"]},
    }
    test = [example for pair in zip(questions(), questions("second"), strict=True) for example in pair]
    told = answered_question(models, test, [QA, SECOND])
    assert (told["task"], told["prompt"]) == ("second", "second question 0")
    assert answered_question({"original": {"tasks": {}}, "final": {"tasks": {}}}, questions(), [FREE]) is None


def question(number, task):
    return Example(str(number), f"{task} {number}?", f" answer {number}", task=task)


def test_tasks_take_turns_and_plain_text_is_divided_between_words():
    test = [question(0, "a"), question(0, "a"), question(1, "a"), question(2, "a"), question(0, "b")]
    assert [sample.prompt for sample in held_out_samples(test, 4)] == ["a 0?", "b 0?", "a 1?", "a 2?"]
    assert held_out_samples(test, 1) == [Sample("a 0?", " answer 0")]
    assert held_out_samples(test, 0) == [] and len(held_out_samples(test, 99)) == 4
    text = " one two three four five six "
    (sample,) = held_out_samples([Example("d", text), Example("e", "  "), Example("f", "x")], 4)[:1]
    assert sample.prompt + sample.reference == text.strip()
    assert sample.reference.startswith(" ") and sample.prompt.split() + sample.reference.split() == text.split()
    (long,) = held_out_samples([Example("d", "word " * 10_000)], 1)
    assert 250 < len(long.prompt) <= 320 and len(long.prompt + long.reference) <= 600
    (unspaced,) = held_out_samples([Example("d", "文" * 40)], 1)
    assert len(unspaced.prompt) == len(unspaced.reference) == 20


@pytest.mark.parametrize(
    ("reference", "positions", "most"),
    [("mat", 128, 8), ("the cat sat on the mat .", 128, 14), ("the " * 500, 128, 64), ("the " * 500, 24, 12)],
)
def test_no_more_is_generated_than_the_references_ask_for(
    model, tokenizer, monkeypatch, reference, positions, most
):  # fmt: skip
    """And no more than half of the positions that the model has."""
    asked, generate = [], shown.generate_answers

    def watched(*arguments, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return generate(*arguments, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(shown, "generate_answers", watched)
    monkeypatch.setattr(model.config, "max_position_embeddings", positions)
    answers = sample_answers(model, tokenizer, [Sample("the cat " * 400, "it"), Sample("is it ?", reference)])
    assert asked == [most] and len(answers) == 2
    assert all(len(answer.split()) <= most for answer in answers)
    assert sample_answers(model, tokenizer, []) == [] and len(asked) == 1
