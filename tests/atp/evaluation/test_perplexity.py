"""Perplexity by document on a tiny Llama, against float64 recomputation."""

import math

import pytest
import torch
from tiny_scored import WORDS, float64_log_probs, tiny_model, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atp.data.packing import IGNORE, PackedDataset, pack
from atp.data.splits import Example
from atp.evaluation import packed_windows, perplexity, sliding_windows
from atp.evaluation.perplexity import ScoredWindows
from atp.ground.errors import InputError, NotReached
from benchmarks.case import Variant
from benchmarks.measure import peak_bytes

TEXTS = ["the cat sat on the mat", "it is", "not sure the cat is on the mat ? yes it is the cat on the mat : no", "cat"]
EXAMPLES = [Example(str(number), text) for number, text in enumerate(TEXTS)]


def test_packed_windows_equal_float64(model, tokenizer):
    ids = torch.randint(0, 32, (5, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:9] = IGNORE
    labels[4] = IGNORE
    nll = [
        -float64_log_probs(model, ids[row].tolist())[position - 1, ids[row, position]].item()
        for row in range(5)
        for position in range(1, 16)
        if labels[row, position] != IGNORE
    ]
    for batch_size in (1, 3, 8):
        result = perplexity(model, packed_windows(PackedDataset(ids, labels), tokenizer), batch_size)
        assert result["tokens"] == len(nll) == 3 * 15 + 9
        assert result["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_packed_tokens_count_towards_their_own_document_and_its_examples_once(model, tokenizer):
    windows = packed_windows(pack(EXAMPLES, tokenizer, 8), tokenizer)
    result = perplexity(model, windows)
    lengths = [len(text.split()) + 1 for text in TEXTS]
    stream = [document for document, length in enumerate(lengths) for _ in range(length)]
    scored = [document for position, document in enumerate(stream[: len(stream) // 8 * 8]) if position % 8]
    assert [tokens for _, tokens in result["items"]] == [scored.count(d) for d in range(4) if d in scored]
    assert (result["length"], result["stride"], result["bos"]) == (8, 8, False)
    same = [Example("one", text) for text in TEXTS]
    result = perplexity(model, sliding_windows(same, tokenizer, 16))
    apart = perplexity(model, sliding_windows(EXAMPLES, tokenizer, 16))
    assert result["documents"] == 1 and result["perplexity"] == pytest.approx(apart["perplexity"])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(64, None), (8, None), (8, 7), (8, 1), (5, 3)])
def test_sliding_windows_score_every_token_once(model, bos, length, stride):
    tokenizer = word_tokenizer(bos)
    windows = sliding_windows(EXAMPLES, tokenizer, length, stride)
    result = perplexity(model, windows, batch_size=3)
    step = length // 2 if stride is None else stride
    items = []
    for text in TEXTS:
        ids = [WORDS.index("<s>")] * bos + [WORDS.index(word) for word in text.split()]
        nll = 0.0
        for position in range(1, len(ids)):
            # The first window that reaches this token scores it: the one with the most context before it.
            begin = 0 if position < length else math.ceil((position - length + 1) / step) * step
            nll -= float64_log_probs(model, ids[begin : position + 1])[-2, ids[position]].item()
        items.append([nll, len(ids) - 1])
    items = [item for item in items if item[1]]
    assert result["documents"] == len(items) == 3 + bos
    for found, expected in zip(result["items"], items, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    total = math.exp(sum(nll for nll, _ in items) / sum(count for _, count in items))
    assert result["perplexity"] == pytest.approx(total, rel=1e-5)
    low, high = result["perplexity_interval"]
    assert low < result["perplexity"] < high
    assert (result["bos"], result["length"], result["stride"]) == (bos, length, step)


def test_bits_per_byte(model):
    """Of a byte-level tokenizer: the nats of all scored tokens over the bytes that they stand for."""
    text = "caf\u00e9 \u2603"  # 5 + 1 + 3 bytes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<s>": 0} | {one: number for number, one in enumerate(alphabet, 1)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")
    wide = tiny_model(vocabulary=257)
    windows = sliding_windows([Example("0", text), Example("1", "ab")], bytewise, 16)
    found = perplexity(wide, windows)
    ids = bytewise(text).input_ids, bytewise("ab").input_ids
    nats = [-sum(float64_log_probs(wide, own)[at - 1, own[at]].item() for at in range(1, len(own))) for own in ids]
    assert [item[1:] for item in found["items"]] == [[9 - 1, 9 - 1], [1, 1]], "the first token is context"
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / 9 / math.log(2), rel=1e-5)
    low, high = found["bits_per_byte_interval"]
    assert low <= found["bits_per_byte"] <= high
    packed = packed_windows(pack([Example("0", text)] * 3, bytewise, 6), bytewise)
    counted = packed.bytes[packed.labels != IGNORE]
    assert counted.sum() == (packed.labels[packed.labels != IGNORE] != 0).sum(), "the end of a text has no bytes"
    special = torch.zeros(1, 4, dtype=torch.int64)
    assert "bits_per_byte" not in perplexity(wide, ScoredWindows(special, special, special, {}, torch.zeros(1, 4)))
    assert "bits_per_byte" not in perplexity(model, sliding_windows(EXAMPLES, word_tokenizer(), 16))


def test_first_windows_and_progress(model):
    ids = torch.arange(96).view(6, 16) % 32
    documents = torch.arange(6)[:, None].expand(6, 16)
    seen = []
    windows = ScoredWindows(ids, ids, documents, {})
    few = perplexity(model, windows, 3, max_windows=4, progress=lambda *at: seen.append(at))
    assert few == perplexity(model, ScoredWindows(ids[:4], ids[:4], documents[:4], {}), 3)
    assert seen == [(3, 4), (4, 4)] and few["documents"] == 4


def test_logits_of_one_batch_exist_at_a_time():
    vocabulary, ids = 4096, torch.arange(96).view(6, 16) % 32
    model = tiny_model(vocabulary=vocabulary)
    windows = ScoredWindows(ids, ids, torch.zeros_like(ids), {})
    one = peak_bytes(Variant(lambda: perplexity(model, windows, 2, max_windows=2)), "forward", "cpu")
    all_three = peak_bytes(Variant(lambda: perplexity(model, windows, 2)), "forward", "cpu")
    assert one > 2 * 16 * vocabulary * 4 and all_three < 1.1 * one


@pytest.mark.parametrize("stride", [0, 16, 20])
def test_stride_that_leaves_tokens_out_is_refused(tokenizer, stride):
    with pytest.raises(InputError, match=f"stride {stride} does not fit windows of 16"):
        sliding_windows(EXAMPLES, tokenizer, 16, stride)


def test_a_loss_that_is_not_finite_is_no_perplexity(tokenizer):
    """One token of the third document has a NaN embedding."""
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[WORDS.index("not")] = math.nan
        broken.lm_head.weight = torch.nn.Parameter(tiny_model(seed=1).lm_head.weight)
    assert math.isfinite(perplexity(broken, sliding_windows(EXAMPLES[:2], tokenizer, 8))["perplexity"])
    with pytest.raises(NotReached, match="document 3 .* not finite"):
        perplexity(broken, sliding_windows(EXAMPLES, tokenizer, 8))
