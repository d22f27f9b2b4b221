"""The worked examples beside the hardest pieces of code are true."""

import doctest

import pytest

from rooflight.tokenizer import wordkeys, workers
from rooflight.tokenizer.encoding import pairs
from rooflight.tokenizer.training import merge, ranking


@pytest.mark.parametrize("module", [wordkeys, workers, pairs, merge, ranking], ids=lambda module: module.__name__)
def test_examples(module):
    failed, tried = doctest.testmod(module, report=True)
    assert tried > 1
    assert not failed
