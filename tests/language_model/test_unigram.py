import math

import pytest
import torch

from carrara.errors import UserError
from carrara.language_model.unigram import Unigram


def letters(captions: list[str]) -> torch.Tensor:
    return torch.tensor([ord(letter) - ord("a") for caption in captions for letter in caption], dtype=torch.int64)


def test_probabilities_are_counts_with_one_added():
    unigram = Unigram(4, letters)
    unigram.train_on(["aab", "a"])
    expected = [-math.log(n / 8) for n in (4, 2, 1, 1)]
    torch.testing.assert_close(unigram(torch.arange(4)), torch.tensor(expected, dtype=torch.float64))


def test_counts_do_not_depend_on_how_many_captions_are_read_at_once():
    unigram = Unigram(3, letters)
    unigram.train_on("abc"[k % 3] for k in range(9000))
    torch.testing.assert_close(unigram(torch.arange(3)).exp(), torch.full((3,), 3.0, dtype=torch.float64))


def test_it_travels_in_a_state_dict():
    unigram, back = Unigram(4, letters), Unigram(4, letters)
    back.load_state_dict(unigram.state_dict())
    assert not back.trained
    unigram.train_on(["abba", "c"])
    back.load_state_dict(unigram.state_dict())
    assert torch.equal(back(torch.arange(4)), unigram(torch.arange(4)))


def test_captions_without_words_are_refused():
    with pytest.raises(UserError, match="no words to learn from"):
        Unigram(4, letters).train_on(["", "aa"])


def test_an_uncounted_one_says_so():
    with pytest.raises(RuntimeError, match="nothing has been counted"):
        Unigram(4, letters)(torch.arange(4))
