"""Splits: whole documents, the same for the same seed, never shared."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp.data.splits import Example, Splits, document_id, split_off
from atp.ground.errors import InputError


def examples(*texts):
    return [Example(document_id(text), text) for text in texts]


def test_document_id_is_blind_to_form_only():
    assert document_id("The  ACR, of\n2009!") == document_id("the acr of 2009")
    assert document_id("ﬁne") == document_id("fine")
    assert document_id("the acr of 2009") != document_id("the acr of 2010")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    owners=st.lists(st.integers(0, 12), min_size=4, max_size=60).filter(lambda x: len(set(x)) > 1),
    seed=st.integers(0, 5),
    share=st.floats(0.05, 0.6),
)
def test_split_off_keeps_documents_whole(owners, seed, share):
    data = [Example(str(owner), f"text {index}") for index, owner in enumerate(owners)]
    rest, part = split_off(data, share, str(seed))
    assert sorted(e.prompt for e in rest + part) == sorted(e.prompt for e in data)
    assert not {e.document for e in rest} & {e.document for e in part}
    assert len({e.document for e in part}) == max(1, round(share * len(set(owners))))
    # Documents, not their order in the file, decide where they go.
    again = split_off(data[::-1], share, str(seed))
    assert {e.prompt for e in again[1]} == {e.prompt for e in part}


def test_keys_give_independent_draws():
    data = examples(*(f"document {n}" for n in range(400)))
    first = {e.document for e in split_off(data, 0.5, "one")[1]}
    second = {e.document for e in split_off(data, 0.5, "two")[1]}
    # The overlap of two draws of half is 100 +- 5 (hypergeometric).
    assert 80 < len(first & second) < 120


def test_shared_document_is_refused_with_a_sample():
    with pytest.raises(InputError, match="1 document.* both the train and the test data .*'Same, text'"):
        Splits(examples("a", "same text"), examples("b"), examples("Same, text"), "made up")


def test_empty_split_is_refused():
    with pytest.raises(InputError, match="calibration split is empty"):
        Splits(examples("a"), [], examples("b"), "made up")


def test_fingerprints_see_content_and_order():
    def prints(*train):
        return Splits(list(train), examples("b"), examples("c"), "made up").fingerprints

    one, two = Example("1", "ab", "c"), Example("2", "x")
    assert prints(one, two) == prints(one, two)
    assert prints(one, two)["train"] != prints(two, one)["train"]
    assert prints(one)["train"] != prints(Example("1", "a", "bc"))["train"]
    assert prints(one)["test"] == prints(two)["test"]
