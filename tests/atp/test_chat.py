"""`atp chat`: answers equal those of a plain greedy pass, appear in pieces, and remember the conversation."""

import io
import json
import sys

import pytest
import torch
from tiny_folder import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp.cli.chat import Conversation, asks_once, talk
from atp.data.chat import plain_chat
from atp.ground.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("chat") / "model"
    return save(place, max_position_embeddings=48, eos_token_id=None, initializer_range=1.0)


def greedy(folder, prompt, tokens):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, -tokens:], skip_special_tokens=True)


def test_a_plain_answer_is_the_greedy_continuation_piece_by_piece_and_sampling_differs(folder):
    pieces = []
    answer = Conversation(str(folder), plain=True).ask("the cat sat on", pieces.append, tokens=9)
    assert "".join(pieces) == answer.text and len([piece for piece in pieces if piece]) > 1
    assert answer.text.split() == greedy(folder, "the cat sat on", 9).split()
    assert answer.tokens == 9 and answer.seconds > 0 and answer.speed == pytest.approx(9 / answer.seconds)
    chat = Conversation(str(folder), plain=True)
    torch.manual_seed(0)
    sampled = {chat.ask("the cat", lambda text: None, tokens=8, temperature=5.0).text for _ in range(4)}
    assert len(sampled) > 1
    assert len({chat.ask("the cat", lambda text: None, tokens=8).text for _ in range(2)}) == 1


def test_conversations_remember_and_two_models_answer_side_by_side_one_of_a_run_folder(folder):
    chat, said = Conversation(str(folder.parent)), []
    first = chat.ask("the cat", said.append, tokens=4)
    chat.ask("it was", said.append, tokens=4)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    prompt = plain_chat([*chat.messages[:3], {"role": "assistant", "content": ""}]).prompt
    assert chat.messages[3]["content"].split() == greedy(folder, prompt, 4).split()
    assert chat.messages[1]["content"] == first.text.strip()
    lines = []
    chats = [Conversation(str(folder), plain=True), Conversation(str(folder.parent), plain=True)]
    talk(chats, ["the mat", "a cat"], lambda text, end="\n": lines.append(text + end), tokens=3)
    text = "".join(lines)
    assert text.count(f"{folder}:\n") == 2 and text.count("(3 tokens, ") == 4


def test_what_cannot_be_answered_is_refused(folder, tmp_path):
    chat = Conversation(str(folder), plain=True)
    with pytest.raises(InputError, match="the prompt is empty"):
        chat.ask("  ", print)
    with pytest.raises(InputError, match="50 tokens and the model reads no more"):
        chat.ask("the cat " * 25, print)
    assert chat.ask("the cat " * 23, lambda text: None, tokens=100).tokens == 2, "as much as fits"
    with pytest.raises(InputError, match="cannot load the"):
        Conversation(str(tmp_path / "none"))


SINGLE = {"prompt": "the cat", "completion": " sat"}
ONE = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}
TWO = {"messages": ONE["messages"] * 2}


@pytest.mark.parametrize(
    ("rows", "once"), [([SINGLE] * 3, True), ([ONE] * 3, True), ([ONE, TWO], False), ([{"text": "the cat"}], False)]
)
def test_a_model_tuned_on_single_questions_is_asked_each_alone(folder, tmp_path, rows, once):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder)
    (run / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = {"model": {"path": "base"}, "output_dir": "out", "data": {"train": str(run / "data.jsonl")}}
    (run / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert asks_once(str(run)) is asks_once(str(run / "model")) is once
    chat, lines = Conversation(str(run)), []
    assert ("single questions" in chat.manner) is once and ("/new" in chat.manner) is not once
    talk([chat], ["the cat", "it was"], lambda text, end="\n": lines.append(text + end), tokens=3)
    assert len(chat.messages) == (2 if once else 4)
    (run / "data.jsonl").unlink()
    assert not asks_once(str(run)), "nobody knows any more"


def test_prompts_are_asked_alone_and_a_file_on_stdin_is_a_conversation(folder, monkeypatch, atp):
    asked = []

    def note(chat, text, say, **options):
        asked.append((text, len(chat.messages)))
        return ask(chat, text, say, **options)

    def call(*words):
        asked.clear()
        code, out, err = atp("chat", folder, "--tokens", 2, *words)
        assert code == 0
        return out, err

    ask = Conversation.ask
    monkeypatch.setattr(Conversation, "ask", note)
    _, err = call("--prompt", "the cat", "--prompt", "it was")
    assert asked == [("the cat", 0), ("it was", 0)] and "each --prompt is asked alone" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\nit was\n/new\nthe mat\n"))
    out, err = call()
    assert asked == [("the cat", 0), ("it was", 2), ("the mat", 0)] and "remembers the conversation" in err
    assert "> " not in out and "remembers" not in out
