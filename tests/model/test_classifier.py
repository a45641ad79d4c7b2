import math

import pytest
import torch

from tests.tiny import CAPTIONS, batch, classifier_model


def test_the_loss_is_the_cross_entropy_of_the_labels():
    model = classifier_model(CAPTIONS)
    one = batch(range(8))
    logits = model.classifier(one["images"].float() / 127.5 - 1).log_softmax(1)
    expected = -sum(logits[k, sorted(CAPTIONS).index(caption)] for k, caption in enumerate(one["captions"])) / 8
    torch.testing.assert_close(model.loss(one)["loss"], expected)
    torch.nn.init.zeros_(model.classifier.head.weight)
    torch.nn.init.zeros_(model.classifier.head.bias)
    assert model.loss(one)["loss"].item() == pytest.approx(math.log(model.classifier.labels.num_classes))


def test_labels_that_were_not_in_training_are_left_out():
    model = classifier_model(CAPTIONS[:4])
    whole, known = batch(range(8)), batch(range(4))
    torch.testing.assert_close(model.loss(whole)["loss"], model.loss(known)["loss"])
    assert model.loss(whole | {"captions": ["?"] * 8})["loss"].item() == 0


def test_what_is_exported_is_the_classifier():
    model = classifier_model(CAPTIONS)
    assert model.exported is model.classifier and model.kind == "classifier"
