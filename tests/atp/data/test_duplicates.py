"""Near-duplicates against an all-pairs comparison of word runs."""

import random

import pytest

from atp.data.assemble import Parts, assemble, by_count
from atp.data.duplicates import near_duplicates
from atp.data.settings import DataSettings
from atp.data.splits import Example, document_id
from atp.ground.errors import InputError

WORDS = [f"w{n}" for n in range(400)]


def example(text, **fields):
    return Example(document_id(text), text, **fields)


def words(seed, count=60):
    return random.Random(seed).choices(WORDS, k=count)


def test_equals_all_pairs():
    rng = random.Random(4)
    pool = [words(n, rng.randint(3, 40)) for n in range(60)]

    def mixture(seed):
        rng = random.Random(seed)
        parts = rng.sample(pool, 3)
        return " ".join(word for part in parts for word in part[: rng.randint(2, 40)])

    def runs(text):
        tokens = text.split()
        return {tuple(tokens[n : n + 5]) for n in range(max(len(tokens) - 4, 1))}

    ours, theirs = ([example(mixture(seed + start)) for seed in range(60)] for start in (0, 1000))
    expected = {
        a.document
        for a in ours
        for b in theirs
        if a.document != b.document
        and len(runs(a.text) & runs(b.text)) >= 3
        and 2 * len(runs(a.text) & runs(b.text)) >= min(len(runs(a.text)), len(runs(b.text)))
    }
    assert near_duplicates(ours, theirs) == expected and 0 < len(expected) < 60
    for same in (", ".join(theirs[0].text.split()).upper() + "!!", "w1 w2"):  # the same document, and a short one
        assert near_duplicates([example(same)], theirs) == set()


def test_an_instruction_in_front_of_every_question_makes_no_duplicates():
    instruction = " ".join(words(7, 50))
    asked = [example(f"{instruction} {' '.join(words(100 + n, 12))}") for n in range(40)]
    assert near_duplicates(asked[10:], asked[:10]) == set()
    doubled = example(f"{instruction} {asked[3].text.split(' ', 50)[50]} please")
    assert near_duplicates([*asked[10:], doubled], asked[:10]) == {doubled.document}


def test_what_is_common_shows_in_the_whole_data_set():
    phrase = " ".join(words(8, 30))
    asked = [example(f"{phrase} {n}") for n in range(30)]
    assert len(near_duplicates(asked[3:6], asked[:3])) == 3
    assert near_duplicates(asked[3:6], asked[:3], asked) == set()


def test_data_of_doubles_is_refused():
    base = words(0)
    parts = Parts(*([example(" ".join([*base, str(n)]))] for n in range(3)))
    with pytest.raises(InputError, match="near-duplicates of held-out ones, such as .*: add text"):
        assemble(parts, DataSettings(general_share=0), (), "here")


def test_the_document_counts_not_the_prompt_around_it():
    question = " ".join(words(50, 30))
    one, two = (
        Example(document_id(text), f"{text} {question}", passage=text) for text in ("a short clause", "another clause")
    )
    assert near_duplicates([one], [two]) == set()


def test_held_out_documents_stay_and_their_doubles_go():
    base, other = words(0), words(1)
    near = [*base[:50], *words(2, 10)]
    nearer = [*other[:50], *words(3, 10)]
    parts = Parts(
        train=[example(" ".join(text)) for text in (near, nearer, words(4))],
        calibration=[example(" ".join(other)), example(" ".join([*base[5:], "end"]))],
        test=[example(" ".join(base))],
    )
    splits = assemble(parts, DataSettings(general_share=0), (), "here")
    assert [e.text for e in splits.train] == [" ".join(words(4))]
    assert [e.text for e in splits.calibration] == [" ".join(other)]
    assert splits.test == parts.test
    assert splits.description == (
        "here: 1 train, 1 calibration (0 of them general text), 1 test; 3 near-duplicates of held-out documents dropped"
    )


def test_a_validation_split_leaves_the_others_as_they_are_and_shares_nothing_with_training():
    texts = [" ".join(words(10 + n)) for n in range(40)]
    parts = Parts(*([example(text) for text in part] for part in (texts[:30], texts[30:35], texts[35:])))
    without = assemble(parts, DataSettings(general_share=0), (), "here")
    settings = DataSettings(general_share=0, validation_share=0.2)
    splits = assemble(parts, settings, (), "here")
    assert (splits.test, splits.calibration) == (without.test, without.calibration)
    assert len(splits.validation) == 6 and "24 train, 5 calibration (0 of them general text), 6 validation" in (
        splits.description
    )
    assert {e.document for e in splits.train + splits.validation} == {e.document for e in without.train}
    assert set(splits.fingerprints) == {*without.fingerprints, "validation"}
    near = " ".join([*splits.validation[0].text.split()[5:], "end"])
    parts.train.append(example(near))
    again = assemble(parts, settings, (), "here")
    both = [[e.text for e in part] for part in (again.train, again.validation)]
    assert not any(near in part and splits.validation[0].text in other for part, other in (both, both[::-1]))


@pytest.mark.parametrize("counts", [(6, 2, 4), (3, 3, 3), (12, 0, 0)])
def test_counts_are_met_by_whole_documents(counts):
    examples = [Example(f"document {n // 2}", f"text {n}") for n in range(24)]
    parts = by_count(examples, *counts, "key")
    lists = (parts.train, parts.calibration, parts.test)
    assert [len(part) for part in lists] == [count + count % 2 for count in counts]
    documents = [{e.document for e in part} for part in lists]
    assert sum(map(len, documents)) == len(set.union(*documents))
    again = by_count(list(reversed(examples)), *counts, "key")
    assert {e.document for e in again.train} == documents[0]


def test_too_few_examples_are_shared_out():
    parts = by_count([example(f"text {n}") for n in range(60)], 1000, 100, 100, "key")
    assert [len(part) for part in (parts.train, parts.calibration, parts.test)] == [50, 5, 5]
