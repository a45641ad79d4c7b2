import math

import pytest
import torch

from carrara.errors import UserError
from carrara.metric.embedding_pairs import caption_hash
from carrara.metric.r_precision import RPrecision
from carrara.metric.recall import Recall, recall_at


def one_hot(*places: int, dim: int = 8) -> torch.Tensor:
    return torch.eye(dim)[list(places)]


def r_precision(images, texts, captions, order=None, r=100) -> float:
    metric = RPrecision(images.shape[1], r)
    order = torch.arange(len(images)) if order is None else order
    for part in order.split(5):
        metric.update(images[part], texts[part], [captions[i] for i in part], part)
    return float(metric.compute())


def test_caption_hash_is_fixed_and_fits_int64():
    assert caption_hash("a red square") == caption_hash("a red square") != caption_hash("a red  square")
    assert caption_hash("") == int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "big", signed=True)
    torch.tensor([caption_hash(str(i)) for i in range(100)], dtype=torch.int64)


def test_r_precision_counts_pictures_nearest_to_their_own_caption():
    texts = one_hot(0, 1, 2, 3)
    images = one_hot(0, 1, 3, 2)  # the last two show each other's caption
    assert r_precision(images, texts, list("abcd")) == 0.5
    assert r_precision(texts, texts, list("abcd")) == 1.0
    assert r_precision(torch.ones(4, 8), texts, list("abcd")) == 0.0  # a tie is a miss


def test_another_copy_of_the_caption_is_not_a_wrong_answer():
    texts = one_hot(0, 0, 0, 1)
    assert r_precision(texts, texts, ["a", "a", "a", "b"]) == 1.0


def test_r_precision_compares_r_candidates_chosen_by_the_captions_alone():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(60, 16, generator=generator)
    images = texts + 2 * torch.randn(60, 16, generator=generator)
    captions = [f"caption {i}" for i in range(60)]
    scores = [r_precision(images, texts, captions, r=r) for r in (2, 5, 20, 100)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    order = torch.randperm(60, generator=generator)
    assert [r_precision(images, texts, captions, order, r) for r in (2, 5, 20, 100)] == scores
    metric = RPrecision(16, 5)
    metric.update(images, texts, captions, torch.arange(60))
    metric.compute()
    assert metric.num_candidates == 5


def test_r_precision_at_chance_is_one_in_r():
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, 2000, 16, generator=generator)
    captions = [str(i) for i in range(2000)]
    assert r_precision(images, texts, captions, r=4) == pytest.approx(0.25, abs=0.04)


def test_r_precision_of_one_caption_is_no_number():
    assert math.isnan(r_precision(one_hot(0, 1), one_hot(0, 0), ["a", "a"]))


def test_recall_averages_both_directions():
    texts = torch.eye(3, dtype=torch.float64)
    similarity = torch.tensor([[0.9, 0.8, 0.0], [0.95, 0.5, 0.1], [0.0, 0.1, 0.7]], dtype=torch.float64)
    # picture -> caption: hit, miss (second), hit; caption -> picture: miss (second), miss (second), hit
    assert float(recall_at(1, similarity, texts)) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert float(recall_at(2, similarity, texts)) == 1.0


def test_recall_counts_ties_and_nan_as_misses():
    same = torch.ones(4, 2, dtype=torch.float64)
    assert float(recall_at(1, same, same)) == 0.0
    assert float(recall_at(1, same * torch.nan, same)) == 0.0


def test_recall_keeps_one_picture_of_each_caption():
    metric = Recall(8, ks=(1, 2), max_captions=3)
    # The second "a" would tie with the first. The picture of "d" is wrong, but the fourth caption by index.
    metric.update(one_hot(0, 1), one_hot(3, 1), ["d", "b"], torch.tensor([4, 2]))
    metric.update(one_hot(0, 0, 2), one_hot(0, 0, 2), ["a", "a", "c"], torch.tensor([0, 1, 3]))
    recall = metric.compute()
    assert {name: float(value) for name, value in recall.items()} == {"recall_at_1": 1.0, "recall_at_2": 1.0}
    assert metric.num_captions == 3


def test_recall_of_nothing_is_an_error():
    metric = Recall(8)
    metric.update(torch.empty(0, 8), torch.empty(0, 8), [], torch.empty(0, dtype=torch.int64))
    with pytest.raises(UserError, match="validation set is empty"):
        metric.compute()
