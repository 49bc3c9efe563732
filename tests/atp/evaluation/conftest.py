"""Fixtures of the evaluation tests."""

import pytest
from tiny_scored import LABELS, tiny_model, word_tokenizer

from atp.data.splits import Example


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session")
def examples():
    prompts = ["the cat sat on the mat . is it ? Answer :", "it is the cat ? Answer :", "on the mat ? Answer :"] * 3
    pairs = enumerate(zip(prompts, LABELS * 3, strict=True))
    return [Example(str(n), "the " * n + prompt, f" {label}", label, "qa") for n, (prompt, label) in pairs]
