"""The tokenizer in the GGUF file."""

import json
import random

import pytest
import torch
from gguf import TokenType
from test_gguf import tiny, write
from tiny_tokenizers import LLAMA3, MARKED, PLAIN, PRE_TOKENIZERS, SPECIAL, TEXTS, byte_level, sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from atp.data.encoding import byte_lengths
from atp.ground.errors import InputError
from atp.models.load import read_tokenizer
from benchmarks.gguf_forward import File


def written(folder, tokenizer, **changes):
    """The keys of a file with this tokenizer, without their prefix."""
    changes = {"vocab_size": len(tokenizer)} | changes
    write(tiny("llama-tied", **changes), folder / "model.gguf", tokenizer=tokenizer)
    return {key.removeprefix("tokenizer."): value for key, value in File(folder / "model.gguf").keys.items()}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level(tmp_path, name):
    tokenizer = byte_level(name)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    keys = written(tmp_path, tokenizer, vocab_size=len(tokenizer) + 3)
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("gpt2", name)
    tokens, types = keys["ggml.tokens"], keys["ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{len(tokenizer) + i}]" for i in range(3)]
    kinds = {token: TokenType(kind) for token, kind in zip(tokens, types, strict=True)}
    others = {token: TokenType.CONTROL for token in SPECIAL} | {"<tool>": TokenType.USER_DEFINED}
    others |= {token: TokenType.UNUSED for token in tokens[len(tokenizer) :]}
    assert {token: kind for token, kind in kinds.items() if kind != TokenType.NORMAL} == others
    assert [tuple(merge.split(" ")) for merge in keys["ggml.merges"]] == [tuple(m) for m in content["model"]["merges"]]
    assert keys["chat_template"] == tokenizer.chat_template
    ids = {name: keys[f"ggml.{key}_token_id"] for name, key in
           {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()}  # fmt: skip
    assert ids == {name: getattr(tokenizer, f"{name}_token_id") for name in ids}
    assert (keys["ggml.add_bos_token"], keys["ggml.add_eos_token"]) == (False, False)


def test_a_beginning_token_that_the_tokenizer_adds(tmp_path):
    keys = written(tmp_path, byte_level("llama-bpe", bos=True))
    assert (keys["ggml.add_bos_token"], keys["ggml.add_eos_token"]) == (True, False)


def test_transformers_finds_the_same_tokens(tmp_path):
    tokenizer = byte_level("gpt-2")
    written(tmp_path, tokenizer)
    found = read_tokenizer(tmp_path, "model.gguf")
    for text in TEXTS:
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("metaspace", [None, "first"])
def test_sentencepiece(tmp_path, metaspace):
    tokenizer = sentencepiece(metaspace=metaspace)
    keys = written(tmp_path, tokenizer)
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("llama", "default")
    assert (keys["ggml.add_bos_token"], keys["ggml.add_eos_token"], keys["ggml.add_space_prefix"]) == (
        True,
        False,
        True,
    )
    kinds = [TokenType(kind) for kind in keys["ggml.token_type"]]
    assert kinds[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert kinds[3:259] == [TokenType.BYTE] * 256 and set(kinds[259:]) == {TokenType.NORMAL}
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert _by_scores(text, keys["ggml.tokens"], keys["ggml.scores"]) == expected


@pytest.mark.parametrize(
    ("scheme", "template", "prefix", "said"),
    [
        ("first", MARKED, False, "before others transformers puts a space, and llama.cpp none"),
        ("first", PLAIN, True, "a text with special tokens inside has other tokens there"),
        ("first", "{{ raise_exception('no') }}", True, "a text with special tokens inside has other tokens there"),
        ("first", None, True, "a text with special tokens inside has other tokens there"),
        ("always", MARKED, True, None),
        ("never", MARKED, False, None),
        ("gemma", MARKED, False, None),
        (None, MARKED, True, None),
    ],
)
def test_where_a_space_is_put_before_text(tmp_path, scheme, template, prefix, said):
    tokenizer = sentencepiece(metaspace=scheme, template=template)
    _, remarks = write(tiny("llama-tied", vocab_size=len(tokenizer)), tmp_path / "model.gguf", tokenizer=tokenizer)
    assert File(tmp_path / "model.gguf").keys["tokenizer.ggml.add_space_prefix"] == prefix
    assert [remark.endswith(said or "") for remark in remarks] == ([True] if said else [])


def _by_scores(text, tokens, scores):
    """As llama.cpp: again and again joins the two neighbours whose token has the highest score, the first if equal."""
    ids, pieces = {token: index for index, token in enumerate(tokens)}, list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
                  if a + b in ids]  # fmt: skip
        if not joined:
            break
        _, at = min(joined)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    as_bytes = [[f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    return [ids[t] for piece, other in zip(pieces, as_bytes, strict=True) for t in ([piece] if piece in ids else other)]


@pytest.mark.parametrize(("make", "kind", "expected"), [
    (lambda: byte_level("qwen2"), Qwen2Tokenizer, "qwen2"), (sentencepiece, LlamaTokenizer, "default"),
])  # fmt: skip
def test_tokenizers_as_transformers_itself_defines_them(tmp_path, make, kind, expected):
    model = json.loads(make().backend_tokenizer.to_str())["model"]
    names = {} if kind is LlamaTokenizer else {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    tokenizer = kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **names)
    assert written(tmp_path, tokenizer)["ggml.pre"] == expected


def _words():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def _changed(change, **options):
    tokenizer = byte_level(**options)
    change(tokenizer.backend_tokenizer)
    return tokenizer


def _lowercase(core):
    core.normalizer = normalizers.Lowercase()


def _ends_with_start(core):
    core.post_processor = processors.TemplateProcessing(single="$A <|im_start|>", special_tokens=[("<|im_start|>", 1)])


def _other_split():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3 + "|x"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_words, "its vocabulary is WordLevel and not BPE"),
        (lambda: sentencepiece(complete=False), "its merges are not those of a sentencepiece vocabulary"),
        (lambda: byte_level(pre_tokenizer=_other_split()), r"its pre-tokenizer is none that this export knows \(\(\?i"),
        (lambda: byte_level(pre_tokenizer=pre_tokenizers.Whitespace()), r"none that this export knows \(Whitespace\)"),
        (
            lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(True)),
            r"none that this export knows \(ByteLevel\)",
        ),
        (lambda: _changed(_lowercase), "it changes text by a normalizer of type Lowercase"),
        (lambda: _changed(_ends_with_start), "what it puts around a text is not its beginning or ending token"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, make, message):
    with pytest.raises(InputError, match=f"llama.cpp cannot read the model's tokenizer as it is, because .*{message}"):
        written(tmp_path, make())
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_rows_are_refused(tmp_path):
    tokenizer = byte_level()
    with pytest.raises(InputError, match=f"tokenizer has {len(tokenizer)} tokens, but its embedding has 300 rows"):
        written(tmp_path, tokenizer, vocab_size=300)


BYTES = {name: (lambda name=name: byte_level(name), 0) for name in PRE_TOKENIZERS if name != "qwen2"}
BYTES |= {"prepended": (sentencepiece, 1), "as it is": (lambda: sentencepiece(metaspace="never"), 0)}


@pytest.mark.parametrize("name", BYTES)
def test_tokens_stand_for_the_bytes_of_a_text(name):
    """And for the space that SentencePiece puts before a text."""
    make, before = BYTES[name]
    tokenizer, rng = make(), random.Random(0)
    drawn = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2000)])) for _ in range(300))
    for text in (*TEXTS, drawn, "\U0001f600"):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        assert byte_lengths(tokenizer, ids).sum() == len(text.encode()) + before, text
    assert byte_lengths(tokenizer, torch.tensor([[tokenizer.eos_token_id, -100]])).tolist() == [[0, 0]]
