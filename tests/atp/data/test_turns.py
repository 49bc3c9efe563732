"""Every turn of the assistant is learned, and nothing else: the mask follows from the chat template."""

import json
import signal
from pathlib import Path

import pytest
import torch
from tiny_chat import CHATML, FORGETFUL, MARKED, OPAQUE, TALK, TOOLS, chat_tokenizer, learned

from atp.config import ATPConfig
from atp.data.chat import chat_of, plain_chat
from atp.data.custom import read_examples
from atp.data.packing import IGNORE, pack, unpacked
from atp.data.splits import Example
from atp.ground.errors import InputError
from atp.inputs.loading import data_settings

LEARNED = ["First answer.<|im_end|>", "Second.<|im_end|>", "Third.<|im_end|>"]


def read(folder, tokenizer, row, every_turn=True):
    (folder / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return read_examples(str(folder / "a.jsonl"), chat=chat_of(tokenizer, every_turn=every_turn))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETFUL], ids=["prefixes", "marked", "forgetful"])
def test_all_answers_and_their_ends_are_learned(tmp_path, template, bos):
    tokenizer = chat_tokenizer(template, bos)
    examples = read(tmp_path, tokenizer, {"messages": TALK})
    whole = pack(examples, tokenizer, 400, loss_on="assistant")
    assert learned(tokenizer, whole) == LEARNED
    assert learned(tokenizer, pack(examples, tokenizer, 400, loss_on="completion")) == LEARNED[2:]
    # What is learned does not change what is read.
    assert torch.equal(whole.input_ids, pack(examples, tokenizer, 400, loss_on="all").input_ids)
    (ragged,) = unpacked(examples, tokenizer, 400, loss_on="assistant")
    assert torch.equal(ragged["labels"], whole.labels[0, : len(ragged["labels"])])
    text = tokenizer.decode(ragged["input_ids"])
    assert text.startswith("<s><|im_start|>system\nBe brief.") and text.count("<s>") == 1


def test_the_mask_is_that_of_transformers(monkeypatch):
    tokenizer = chat_tokenizer(MARKED)
    talk = chat_of(tokenizer, every_turn=True)(TALK)
    theirs = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = (torch.tensor(theirs[name]) for name in ("input_ids", "assistant_masks"))
    (ours,) = unpacked([example(talk)], tokenizer, 1000, loss_on="assistant")
    assert torch.equal(ours["input_ids"], ids)
    assert torch.equal(ours["labels"] != IGNORE, mask.bool()) and 20 < mask.sum() < len(ids) / 2
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="cannot be found: set data.loss_on=completion"):
        pack([example(talk)], tokenizer, 400, loss_on="assistant")  # it has no offsets


def example(talk):
    return Example("0", talk.prompt, talk.completion, turns=talk.turns)


def test_without_a_template_answers_end_with_their_line():
    assert chat_of(chat_tokenizer(None)) is plain_chat
    talk = plain_chat(TALK)
    assert [talk.prompt[start:end] for start, end in talk.turns] == [" First answer.\n", " Second.\n"]
    assert talk.prompt.startswith("System: Be brief.\nUser: One?\nAssistant: First") and talk.completion == " Third."


def test_a_template_that_hides_its_turns_is_refused_in_one_sentence(tmp_path):
    tokenizer = chat_tokenizer(OPAQUE)
    with pytest.raises(InputError, match="line 1: the chat template does not show .*message 3.* data.loss_on=completi"):
        read(tmp_path, tokenizer, {"messages": TALK})
    assert read(tmp_path, tokenizer, {"messages": TALK}, every_turn=False)[0].completion == "Third."
    assert read(tmp_path, tokenizer, {"messages": TALK[:3]})[0].turns == (), "there is no earlier turn to find"


def test_an_answer_said_before_is_not_taken_for_a_turn():
    """Where a text stands is not searched for: a user may have said the same."""
    repeated = [{**m, "content": "Same."} if m["role"] != "system" else m for m in TALK]
    for template in (CHATML, MARKED, FORGETFUL):
        talk = chat_of(chat_tokenizer(template), every_turn=True)(repeated)
        assert [talk.prompt[start - 10 : end] for start, end in talk.turns] == ["assistant\nSame.<|im_end|>"] * 2
    first = chat_of(chat_tokenizer(CHATML), every_turn=True)(TALK[2:])
    assert [first.prompt[start:end] for start, end in first.turns] == LEARNED[:2], "the assistant may begin"


def test_calls_of_tools_are_turns(tmp_path):
    call = [{"type": "function", "function": {"name": "search", "arguments": {"q": "x"}}}]
    messages = [
        {"role": "user", "content": "Find x.", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "found", "tool_calls": None},
        {"role": "assistant", "content": "Here.", "tool_calls": None},
    ]
    tokenizer, tools = chat_tokenizer(TOOLS), [{"name": "search"}]
    for given in (tools, json.dumps(tools)):
        (found,) = read(tmp_path, tokenizer, {"messages": messages, "tools": given})
        assert found.prompt.startswith("tools: search\n<s><|im_start|>user\nFind x.")
        assert [found.prompt[start:end] for start, end in found.turns] == ["CALL search<|im_end|>"]
    (last,) = read(tmp_path, tokenizer, {"messages": messages[:2]})
    assert last.completion == "CALL search" and last.turns == ()
    assert plain_chat(messages).prompt.startswith('User: Find x.\nAssistant: [{"type": "function"')
    with pytest.raises(InputError, match="line 1: column 'tools' is not valid JSON"):
        read(tmp_path, tokenizer, {"messages": messages, "tools": "[{"})
    with pytest.raises(InputError, match="line 1: column 'tools' holds 5, not a list of schemas"):
        read(tmp_path, tokenizer, {"messages": messages, "tools": 5})


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_the_setting_says_whether_turns_are_looked_for(loss_on):
    config = ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o"}, [f"data.loss_on={loss_on}"])
    talk = data_settings(config, chat_tokenizer(CHATML)).chat(TALK)
    assert len(talk.turns) == (2 if loss_on == "assistant" else 0)
    assert ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o"}).data.loss_on == "assistant"


NAMES = ("qwen2_5", "qwen3", "qwen2_5_training", "llama3_1", "llama3_2", "gemma3", "phi3", "glm4moe")


@pytest.mark.parametrize("name", NAMES)
def test_templates_of_well_known_models_show_their_turns(name):
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl has no {name}")
    talk = chat_of(chat_tokenizer(path.read_text(encoding="utf-8")), every_turn=True)(TALK)
    turns = [talk.prompt[start:end] for start, end in talk.turns]
    assert len(turns) == 2 and "First answer." in turns[0] and "Second." in turns[1]
    assert not any(word in turn for turn in turns for word in ("One?", "Two?", "Three?", "brief", "user\n"))


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", TALK, r"rejects the messages \(roles must alternate\)"),
        ("{{ raise_exception('') }}", TALK, r"rejects the messages \(TemplateError\)"),
        ("{{ messages[0].content + 1 }}", TALK, "the chat template rejects the messages"),
        # A call of a tool comes without a content, which such templates add to a text.
        ("{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}",
         [TALK[0], CALL, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "One."}],
         "rejects .* it may know no calls of tools: take a mod"),
        # It would have no completion, and a text without one is learned whole.
        (CHATML, [*TALK[:-1], {"role": "assistant", "content": " "}], "the assistant's last answer is empty; remove"),
    ],
)  # fmt: skip
def test_what_a_template_rejects_names_the_row(tmp_path, template, messages, message):
    with pytest.raises(InputError, match=f"a.jsonl, line 1: .*{message}"):
        read(tmp_path, chat_tokenizer(template), {"messages": messages})


def test_a_template_that_loops_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("atp.data.chat._MOST_SECONDS", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}"
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError, match="the chat template takes more than 0.2 s of CPU time"):
        chat_of(chat_tokenizer(loops))(TALK)
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    assert chat_of(chat_tokenizer(CHATML))(TALK).prompt
