import pytest

from carrara.errors import UserError
from carrara.network.labels import UNKNOWN, Labels


def test_labels_are_the_different_captions():
    labels = Labels(3)
    assert not labels.trained
    labels.train_on(iter(["cube", "disc", "cube", "arc"]))
    assert labels(["arc", "cube", "disc", "ring"]).tolist() == [0, 1, 2, UNKNOWN]
    again = Labels(3)
    again.load_state_dict(labels.state_dict())
    assert again.trained and again(["disc"]).tolist() == [2]


def test_sentences_are_no_labels():
    with pytest.raises(UserError, match=r"more than 3 different ones, such as 'd': name labels with data\.caption"):
        Labels(3).train_on("abcdef")


def test_the_empty_caption_is_no_label():
    labels = Labels(2)
    labels.train_on(["", "disc", "", "cube"])
    assert labels.names == ["cube", "disc"] and labels([""]).tolist() == [UNKNOWN]
