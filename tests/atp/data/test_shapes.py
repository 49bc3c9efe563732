"""Rows as other programs write them, and columns with other names."""

import json

import pytest
from tiny_chat import CHATML, chat_tokenizer

from atp.data.chat import chat_of
from atp.data.custom import Meaning, read_examples, tasks_of
from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings
from atp.ground.errors import InputError

CHAT = chat_of(chat_tokenizer(CHATML), every_turn=True)
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}


def write(folder, *rows, name="a.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(folder / name)


def one(folder, row, **meaning):
    """The one example of a row."""
    return read_examples(write(folder, row), meaning=Meaning(**meaning))[0]


@pytest.mark.parametrize(
    ("row", "lines"),
    [
        ({"instruction": "Add.", "input": "", "output": "3"}, ["User: Add.", "Assistant: 3"]),
        ({"instruction": "Add.", "input": None, "output": "3"}, ["User: Add.", "Assistant: 3"]),
        ({"instruction": "Add.", "output": "3"}, ["User: Add.", "Assistant: 3"]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["User: Add.", "", "1 2", "Assistant: 3"]),
        (
            {"instruction": "Now?", "output": "3", "system": "Count.", "history": [["One?", "1"]]},
            ["System: Count.", "User: One?", "Assistant: 1", "User: Now?", "Assistant: 3"],
        ),
        ({"question": "Why?", "answer": "So."}, ["User: Why?", "Assistant: So."]),
        ({"question": "Why?", "context": "A.", "answer": "So."}, ["User: A.", "", "Why?", "Assistant: So."]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ["User: Hi?", "Assistant: Ho."]),
        ({"prompt": [USER], "completion": "Ho."}, ["User: Hi?", "Assistant: Ho."]),
        (
            {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}], "system": "Sing."},
            ["System: Sing.", "User: Hi?", "Assistant: Ho."],
        ),
        ({"conversations": [USER, ASSISTANT], "system": ""}, ["User: Hi?", "Assistant: Ho."]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, ASSISTANT]},
         ["User: Hi?", "Assistant: Ho."]),
    ],
)  # fmt: skip
def test_shapes_are_recognised_by_their_columns(tmp_path, row, lines):
    found = one(tmp_path, row)
    assert found.text == "\n".join(lines) and found.completion == " " + lines[-1].removeprefix("Assistant: ")
    assert found.task == "answers"


def test_instructions_and_questions_go_through_the_chat_template(tmp_path):
    for row in ({"instruction": "Hi?", "output": "Ho."}, {"question": "Hi?", "answer": "Ho."}):
        found = one(tmp_path, row, chat=CHAT)
        assert found.prompt == "<s><|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        assert found.completion == "Ho."


def test_calls_and_their_results_in_sharegpt(tmp_path):
    call = {"name": "search", "arguments": {"q": "x"}}
    spoken = [("human", "Find x."), ("function_call", json.dumps(call)), ("observation", "found"), ("gpt", "Here.")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in spoken]}
    found = one(tmp_path, row)
    assert found.prompt.startswith('User: Find x.\nAssistant: [{"type": "function", "function": {"name": "search"')
    assert found.prompt.endswith("\nTool: found\nAssistant:")
    row["conversations"][1]["value"] = "search(x)"
    with pytest.raises(InputError, match="line 1: a message from function_call is not valid JSON"):
        one(tmp_path, row)


def test_answers_in_a_prompt_of_messages_are_context(tmp_path):
    rest = [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}]
    asked = {"prompt": [USER, ASSISTANT, rest[0]], "completion": [rest[1]]}
    assert one(tmp_path, asked, chat=CHAT).turns == ()
    told = one(tmp_path, {"prompt": [USER], "completion": [ASSISTANT, *rest]}, chat=CHAT)
    assert [told.prompt[start:end] for start, end in told.turns] == ["Ho.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'conversations' is not a list of records .* 'from'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "'conversations' is not a list of records"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "do not end with the assistant's answer"),
        ({"instruction": "a"}, "column 'output' is missing"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' holds 3, not text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' is not a list of pairs of texts"),
        ({"question": "a"}, "column 'answer' is missing"),
        ({"prompt": [USER], "completion": []}, "'completion' is not a list of records"),
        ({"prompt": [USER], "completion": [USER]}, "do not end with the assistant's answer"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "'messages' is not a list of records"),
        ({"messages": "hello"}, "'messages' is not a list of records"),
        ({"messages": []}, "'messages' is not a list of records"),
        ({"messages": [{"role": "user"}]}, "'messages' is not a list of records"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "'messages' is not a list of records"),
        ({"messages": [USER]}, "do not end with the assistant's answer"),
        ({"messages": [ASSISTANT]}, "do not end with the assistant's answer"),
        ({"premise": "a", "hypothesis": "b", "label": "maybe"},
         "label 'maybe' is not one of entailment, neutral, contradiction"),
        ({"premise": "a", "label": "neutral"}, "column 'hypothesis' is missing"),
        ({"premise": "a", "hypothesis": "b", "label": 1},
         "the number 1, .*data.label_names, or write the label's name: entailment, n"),
    ],
)  # fmt: skip
def test_rows_that_are_not_quite_a_shape(tmp_path, row, message):
    with pytest.raises(InputError, match=f"a.jsonl, line 1: .*{message}") as caught:
        one(tmp_path, row)
    assert len(str(caught.value)) < 300


def test_labels_and_columns_in_messages_are_short(tmp_path):
    many = tuple(f"label {n}" for n in range(10**4))
    for row in ({"prompt": "a", "completion": "x" * 10**5}, {"x" * 10**5: "a"}):
        with pytest.raises(InputError) as caught:
            one(tmp_path, row, labels=many)
        assert len(str(caught.value)) < 700


def test_one_premise_and_one_prompt_are_one_document(tmp_path):
    asked = [{"prompt": f"case {n // 3}", "completion": f" answer {n}"} for n in range(60)]
    splits = load_recipe(DataSettings(recipe="custom", train=write(tmp_path, *asked)))
    parts = [{example.prompt for example in part} for part in (splits.train, splits.calibration, splits.test)]
    assert [len(part) for part in parts] == [14, 2, 4] and len(set.union(*parts)) == 20, "none is in two parts"
    rows = [
        {"premise": f"fact {n // 3}", "hypothesis": f"claim {n}", "label": ("neutral", "entailment")[n % 2]}
        for n in range(60)
    ]
    splits = load_recipe(DataSettings(recipe="custom", train=write(tmp_path, *rows)))
    assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == [42, 6, 12]
    assert [(task.name, task.metrics) for task in splits.tasks] == [("nli", ("accuracy",))]
    own = tasks_of(splits.test, ("neutral", "entailment"))
    assert own[0].labels == ("neutral", "entailment")
    assert one(tmp_path, rows[0] | {"label": "maybe"}, labels=("maybe", "sure")).label == "maybe"


def test_columns_are_found_under_other_names(tmp_path):
    row = {"text": "unrelated", "q": "Why?", "deep": {"a": "So."}, "id": "book 1"}
    columns = {"prompt": "q", "completion": "deep.a", "document": "id"}
    found, other = one(tmp_path, row, columns=columns), one(tmp_path, row | {"q": "How?"}, columns=columns)
    assert (found.prompt, found.completion) == ("Why?", " So."), "a space where the columns meet without one"
    assert found.document == other.document != one(tmp_path, row).document
    spaced = one(tmp_path, row | {"q": "Why?\n"}, columns=columns)
    assert spaced.text == "Why?\nSo."
    assert one(tmp_path, {"prompt": "a", "completion": "b"}).text == "ab", "ours are joined as they are"
    turned = {"talk": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]}
    assert one(tmp_path, turned, columns={"messages": "talk"}).text == "User: Hi?\nAssistant: Ho."


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "q", "completion": "b"}, r"line 1: column 'b' is missing \(found: q, a\)"),
        ({"prompt": "q"}, r"line 1: column 'completion' is missing \(found: q, a\)"),
        ({"question": "a", "answer": "q"}, "line 1: column 'a' holds 3, not text"),
        ({"prompts": "q"}, "data.columns.prompts is unknown: use answer, completion, context, conversations"),
    ],
)
def test_bad_maps_name_the_users_column(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        one(tmp_path, {"q": "Why?", "a": 3}, columns=columns)


def test_numbers_become_labels_by_their_names(tmp_path):
    names = ("entailment", "neutral", "contradiction")
    row = {"premise": "a", "hypothesis": "b"}
    assert one(tmp_path, row | {"label": 2}, label_names=names).label == "contradiction"
    assert one(tmp_path, row | {"label": "neutral"}, label_names=names).label == "neutral"
    with pytest.raises(InputError, match="'label' holds 3, but data.label_names has names for 0 to 2"):
        one(tmp_path, row | {"label": 3}, label_names=names)
    with pytest.raises(InputError, match="'label' holds -1, but data.label_names"):
        one(tmp_path, row | {"label": -1}, label_names=names)
    (tmp_path / "a.csv").write_text("premise,hypothesis,label\na,b,1\n", encoding="utf-8")
    assert read_examples(str(tmp_path / "a.csv"), meaning=Meaning(label_names=names))[0].label == "neutral"


@pytest.mark.parametrize(
    ("row", "meaning", "columns"),
    [
        ({"text": "a", "label": "yes"}, {"labels": ("no", "yes")}, "{prompt: text, completion: label}"),
        ({"text": "a", "label": 1}, {"label_names": ("no", "yes")}, "{prompt: text, completion: label}"),
        ({"body": "a", "kind": "yes"}, {"labels": ("yes",), "columns": {"text": "body"}},
         "{prompt: body, completion: COLUMN}"),
        ({"text": "a"}, {"labels": ("no", "yes")}, "{prompt: text, completion: COLUMN}"),
    ],
)  # fmt: skip
def test_a_text_that_would_not_teach_its_label_is_refused(tmp_path, row, meaning, columns):
    with pytest.raises(
        InputError, match="line 1: a text teaches no label, and data.labels or .* set data.columns="
    ) as e:
        one(tmp_path, row, **meaning)
    assert str(e.value).endswith(f"data.columns={columns}")


def test_a_classification_is_a_prompt_with_a_numbered_completion(tmp_path):
    rows = [{"text": f"review {n}", "label": n % 2} for n in range(20)]
    splits = load_recipe(
        DataSettings(
            recipe="custom", train=write(tmp_path, *rows), label_names=("bad", "good"),
            columns={"prompt": "text", "completion": "label"},
        )
    )  # fmt: skip
    assert {e.text.split()[-1] for e in splits.train} == {"bad", "good"}
    assert all(int(e.text.split()[1]) % 2 == (e.label == "good") == e.text.endswith(" good") for e in splits.train)
    assert [(task.name, task.labels) for task in splits.tasks] == [("qa", ("bad", "good"))]
