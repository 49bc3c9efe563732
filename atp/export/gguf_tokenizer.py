"""A tokenizer as keys of a GGUF file, from which llama.cpp builds its own.

llama.cpp has two kinds of BPE. Byte-level BPE (`gpt2`) takes merges and the name of a pre-tokenizer that is built into
it; sentencepiece BPE (`llama`) takes a score for each token. What a tokenizer does is read from its definition, not
from the name of its model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.data.chat import chat_of
from atp.ground.errors import InputError, shorten

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",  # Granite 3 too, which llama.cpp calls refact and splits alike
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
}
"""llama.cpp's name of a pre-tokenizer, by its steps and whether words of the vocabulary skip the merges."""
_SPACE = "\u2581"  # stands for a space in sentencepiece vocabularies
_AT_THE_BEGINNING = {
    True: (
        "llama.cpp puts a space after every special token, where transformers puts one before the beginning of a text "
        "alone: a text with special tokens inside has other tokens there"
    ),
    False: (
        "llama.cpp finds the tokens of transformers in texts that begin with a special token, as those of the chat "
        "template; before others transformers puts a space, and llama.cpp none"
    ),
}
"""What llama.cpp does otherwise with and without a space, for a tokenizer that puts one only where a text begins."""


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[str]:
    """Adds vocabulary, merges or scores, special tokens and chat template; returns remarks, one sentence each.

    config: the model's. Rows of its embedding without a token are marked as unused, and its special tokens count where
    the tokenizer has none. Raises `InputError` for a tokenizer that llama.cpp would read otherwise, naming the reason.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise _refused("it has no tokenizer.json form")
    content = json.loads(core.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(f"its vocabulary is {model['type']} and not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"its BPE uses {key}")
    tokens = _tokens(content, config.vocab_size)
    texts = [text for text, _ in tokens]
    if len(set(texts)) < len(texts):
        double = next(text for text in texts if texts.count(text) > 1)
        raise _refused(f"two of its tokens are '{shorten(double)}'")
    writer.add_token_list(texts)
    writer.add_token_types([kind for _, kind in tokens])
    remarks: list[str] = []
    if model.get("byte_fallback"):
        prefixed = _prepends_space(content)
        if prefixed and (content["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
            # llama.cpp puts a space before each piece of text between special tokens, or before none.
            prefixed = not _chat_begins_with_a_token(tokenizer, content)
            remarks.append(_AT_THE_BEGINNING[prefixed])
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(content, texts))
        writer.add_add_space_prefix(prefixed)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(content))
        writer.add_token_merges([" ".join(pair) for pair in _pairs(model)])
    _add_special(writer, tokenizer, config)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
    return remarks


def _refused(why: str) -> InputError:
    return InputError(
        f"llama.cpp cannot read the model's tokenizer as it is, because {why}: give a model with a byte-level or "
        "sentencepiece BPE tokenizer as Llama, Mistral, Qwen, SmolLM and Granite have it"
    )


def _tokens(content: dict[str, Any], vocab_size: int) -> list[tuple[str, TokenType]]:
    """Text and type of every row of the embedding."""
    vocabulary = {index: text for text, index in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    largest = max(vocabulary | added, default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"the model's tokenizer has {largest + 1} tokens, but its embedding has {vocab_size} rows: use the model's "
            "own tokenizer, or widen the embedding with resize_token_embeddings"
        )
    tokens = []
    for index in range(vocab_size):
        text = vocabulary.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in vocabulary else TokenType.UNUSED
        if content["model"].get("byte_fallback"):
            if re.fullmatch("<0x[0-9A-F]{2}>", text):
                kind = TokenType.BYTE
            elif text == content["model"].get("unk_token"):
                kind = TokenType.UNKNOWN
        if index in added and kind != TokenType.UNKNOWN:
            text = added[index]["content"]
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        tokens.append((text, kind))
    return tokens


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges, the first to apply first; older files hold them as text."""
    merges = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in merges]


def _steps(pre_tokenizer: dict[str, Any] | None) -> Iterator[str]:
    """What a byte-level pre-tokenizer does, in order: a regular expression per split, `digits`, `gpt2` or `bytes`."""
    if pre_tokenizer is None:
        return
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from _steps(part)
    elif kind == "Digits" and pre_tokenizer["individual_digits"]:
        yield "digits"
    elif kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        yield "gpt2" if pre_tokenizer["use_regex"] else "bytes"
    elif kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        yield pre_tokenizer["pattern"].get("Regex", kind)
    else:
        yield kind


def _pre_tokenizer(content: dict[str, Any]) -> str:
    normalizer = content["normalizer"]
    # llama.cpp does not compose characters either way; almost all text comes composed.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(f"it changes text by a normalizer of type {normalizer['type']}")
    steps = tuple(_steps(content["pre_tokenizer"]))
    name = _PRE_TOKENIZERS.get((steps, bool(content["model"].get("ignore_merges"))))
    if name is None:
        raise _refused(f"its pre-tokenizer is none that this export knows ({', '.join(steps) or 'none'})")
    return name


def _prepends_space(content: dict[str, Any]) -> bool:
    """Whether a sentencepiece tokenizer puts a space before a text. Raises `InputError` for any other kind."""
    normalizer, pre_tokenizer = content["normalizer"], content["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = {"type": "Prepend", "prepend": _SPACE}
    # Gemma's pre-tokenizer splits at spaces, of which the normalizer has left none.
    idle = pre_tokenizer is None or (pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "})
    if idle and replaces in steps and all(step in (replaces, prepends) for step in steps):
        return prepends in steps
    if normalizer is None and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        if pre_tokenizer["replacement"] == _SPACE and not pre_tokenizer["split"]:
            return pre_tokenizer["prepend_scheme"] != "never"
    raise _refused("it has byte tokens but treats spaces otherwise than sentencepiece")


def _chat_begins_with_a_token(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> bool:
    """Whether what the chat template renders begins with an added token, after the token that begins any text."""
    if tokenizer.chat_template is None:
        return False
    try:
        prompt = chat_of(tokenizer)([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).prompt
    except InputError:  # a template for other conversations
        return False
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"][:1]
    return first in [[token["id"]] for token in content["added_tokens"]]


def _scores(content: dict[str, Any], texts: list[str]) -> list[float]:
    """Scores with which joining the best neighbours first follows the merges.

    llama.cpp joins any two neighbours that make a token. So every way to split a token must be a merge, and all merges
    to one token must follow each other, as they do where merges come from a sentencepiece vocabulary.
    """
    vocabulary, added = content["model"]["vocab"], {token["content"] for token in content["added_tokens"]}
    pairs = [pair for pair in _pairs(content["model"]) if "".join(pair) not in added]
    made = [token for token, _ in groupby("".join(pair) for pair in pairs)]
    ways = {
        (token[:end], token[end:])
        for token in vocabulary.keys() - added
        for end in range(1, len(token))
        if token[:end] in vocabulary and token[end:] in vocabulary
    }
    if len(set(made)) < len(made) or ways != set(pairs):
        raise _refused("it has byte tokens but its merges are not those of a sentencepiece vocabulary")
    rank = {token: position for position, token in enumerate(made)}
    return [-float(rank.get(text, len(made))) for text in texts]


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    known: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        ids = (getattr(holder, f"{name}_token_id", None) for holder in (tokenizer, config))
        found = next((i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size), None)
        if found is not None:
            known[name] = found
            getattr(writer, f"add_{name}_token_id")(found)
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    surrounded = [
        (bos, eos)
        for bos in (False, True)
        for eos in (False, True)
        if whole == [*([known.get("bos")] if bos else []), *plain, *([known.get("eos")] if eos else [])]
    ]
    if not surrounded:
        raise _refused("what it puts around a text is not its beginning or ending token")
    writer.add_add_bos_token(surrounded[0][0])
    writer.add_add_eos_token(surrounded[0][1])
