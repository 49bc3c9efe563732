"""The user's own columns, in all formats, and conversations through a chat template."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atp.data.chat import chat_of, plain_chat
from atp.data.custom import read_examples, tasks_of
from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings
from atp.ground.errors import InputError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path, rows):
    """One file of rows, in the format that the suffix says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def chat_tokenizer(bos):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<s>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_all_columns_in_all_formats(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    assert read_examples(write(file, [{"text": "plain"}]))[0].text == "plain"
    asked = read_examples(write(file, [{"prompt": "q", "completion": " a"}]))[0]
    assert (asked.prompt, asked.completion, asked.task) == ("q", " a", "answers")
    talked = read_examples(write(file, [{"messages": TALK}]))[0]
    assert talked.text == "System: Be brief.\nUser: Hello?\nAssistant: Hi." and talked.completion == " Hi."
    related = read_examples(write(file, [{"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}]))[
        0
    ]
    assert (related.label, related.task, related.passage) == ("entailment", "nli", "It rains.")
    assert related.text.startswith("Premise: It rains.\nHypothesis: It is wet.\n") and related.text.endswith(
        " entailment"
    )


def test_one_premise_is_one_document(tmp_path):
    rows = [
        {"premise": f"fact {n // 3}", "hypothesis": f"claim {n}", "label": ("neutral", "entailment")[n % 2]}
        for n in range(60)
    ]
    splits = load_recipe(DataSettings(recipe="custom", train=write(tmp_path / "a.jsonl", rows)))
    assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == [42, 6, 12]
    assert [(task.name, task.metrics) for task in splits.tasks] == [("nli", ("accuracy",))]
    own = tasks_of(splits.test, ("neutral", "entailment"))
    assert own[0].labels == ("neutral", "entailment")


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizers_template_renders_messages(tmp_path, bos):
    source = write(tmp_path / "a.jsonl", [{"messages": TALK}])
    example = read_examples(source, chat=chat_of(chat_tokenizer(bos)))[0]
    # BOS is left to the encoding where the tokenizer puts it, and EOS ends the answer in training.
    start = "" if bos else "<s>"
    assert example.prompt == f"{start}<system>Be brief.</s><user>Hello?</s><assistant>" and example.completion == "Hi."
    plain = chat_tokenizer(bos)
    plain.chat_template = None
    assert chat_of(plain) is plain_chat


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' is not a list of records"),
        ([], "'messages' is not a list of records"),
        ([{"role": "user"}], "'messages' is not a list of records"),
        ([*TALK[:2], {"role": "bot", "content": "x"}], "'messages' is not a list of records"),
        (TALK[:2], "do not end with the assistant.s answer"),
        (TALK[2:], "do not end with the assistant.s answer"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    with pytest.raises(InputError, match=f"a.jsonl, line 1: .*{message}"):
        read_examples(write(tmp_path / "a.jsonl", [{"messages": messages}]))


def test_a_template_that_refuses_names_the_row(tmp_path):
    tokenizer = chat_tokenizer(False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = write(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(InputError, match=r"line 1: the chat template rejects the messages \(roles must alternate\)"):
        read_examples(source, chat=chat_of(tokenizer))


def test_entailment_labels_are_checked(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": "maybe"}
    with pytest.raises(InputError, match="label 'maybe' is not one of entailment, neutral, contradiction"):
        read_examples(write(tmp_path / "a.jsonl", [row]))
    assert read_examples(write(tmp_path / "a.jsonl", [row]), ("maybe", "sure"))[0].label == "maybe"
    with pytest.raises(InputError, match="column 'hypothesis' is missing"):
        read_examples(write(tmp_path / "a.jsonl", [{"premise": "a", "label": "neutral"}]))


def test_numbers_for_labels_are_answered_in_short(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 1}
    with pytest.raises(InputError, match="the number 1, .*data.label_names, or write the label's name: entailment, n"):
        read_examples(write(tmp_path / "a.jsonl", [row]))


def test_labels_and_columns_in_messages_are_short(tmp_path):
    many = tuple(f"label {n}" for n in range(10**4))
    for row in ({"prompt": "a", "completion": "x" * 10**5}, {"x" * 10**5: "a"}):
        with pytest.raises(InputError) as caught:
            read_examples(write(tmp_path / "a.jsonl", [row]), many)
        assert len(str(caught.value)) < 700


def test_a_template_that_breaks_names_the_row(tmp_path):
    tokenizer = chat_tokenizer(False)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(InputError, match="line 1: the chat template rejects the messages"):
        read_examples(write(tmp_path / "a.jsonl", [{"messages": TALK}]), chat=chat_of(tokenizer))


def test_a_template_that_knows_no_tools_is_named(tmp_path):
    """A call of a tool comes without a content, which such templates add to a text."""
    tokenizer = chat_tokenizer(False)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    talk = [TALK[0], call, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "One."}]
    with pytest.raises(InputError, match=r"line 1: .*rejects .* it may know no calls of tools: take a mod"):
        read_examples(write(tmp_path / "a.jsonl", [{"messages": talk}]), chat=chat_of(tokenizer))


def test_limit_reads_the_first_rows_only(tmp_path):
    rows = [{"text": f"{n}"} for n in range(1000)]
    for suffix in (".jsonl", ".parquet"):
        assert [e.text for e in read_examples(write(tmp_path / f"a{suffix}", rows), limit=3)] == ["0", "1", "2"]
