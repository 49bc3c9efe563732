"""`atp chat`: answers equal those of a plain greedy pass, appear in pieces, and remember the conversation."""

import pytest
import torch
from tiny_folder import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp.chat import Chat, talk
from atp.data.chat import plain_chat
from atp.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=48, eos_token_id=None, initializer_range=1.0
    )


def greedy(folder, prompt, tokens):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, -tokens:], skip_special_tokens=True)


def test_a_plain_answer_is_the_greedy_continuation_piece_by_piece(folder):
    pieces = []
    answer = Chat(str(folder), plain=True).ask("the cat sat on", pieces.append, tokens=9)
    assert "".join(pieces) == answer.text and len([piece for piece in pieces if piece]) > 1
    assert answer.text.split() == greedy(folder, "the cat sat on", 9).split()
    assert answer.tokens == 9 and answer.seconds > 0 and answer.speed == pytest.approx(9 / answer.seconds)


def test_a_conversation_remembers_and_a_run_folder_gives_its_final_model(folder):
    chat, said = Chat(str(folder.parent)), []
    first = chat.ask("the cat", said.append, tokens=4)
    chat.ask("it was", said.append, tokens=4)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    prompt = plain_chat([*chat.messages[:3], {"role": "assistant", "content": ""}]).prompt
    assert chat.messages[3]["content"].split() == greedy(folder, prompt, 4).split()
    assert chat.messages[1]["content"] == first.text.strip()


def test_two_models_answer_side_by_side(folder):
    lines = []
    chats = [Chat(str(folder), plain=True), Chat(str(folder.parent), plain=True)]
    talk(chats, ["the mat", "a cat"], lambda text, end="\n": lines.append(text + end), tokens=3)
    text = "".join(lines)
    assert text.count(f"{folder}:\n") == 2 and text.count("(3 tokens, ") == 4


def test_sampling_differs_from_the_likeliest_tokens(folder):
    chat = Chat(str(folder), plain=True)
    torch.manual_seed(0)
    sampled = {chat.ask("the cat", lambda text: None, tokens=8, temperature=5.0).text for _ in range(4)}
    assert len(sampled) > 1
    assert len({chat.ask("the cat", lambda text: None, tokens=8).text for _ in range(2)}) == 1


def test_what_cannot_be_answered_is_refused(folder, tmp_path):
    chat = Chat(str(folder), plain=True)
    with pytest.raises(InputError, match="the prompt is empty"):
        chat.ask("  ", print)
    with pytest.raises(InputError, match="50 tokens and the model reads no more"):
        chat.ask("the cat " * 25, print)
    assert chat.ask("the cat " * 23, lambda text: None, tokens=100).tokens == 2, "as much as fits"
    with pytest.raises(InputError, match="cannot load the"):
        Chat(str(tmp_path / "none"))
