from pathlib import Path

import pytest
import torch

from carrara.architecture import check_fit, meta_modules
from carrara.callback.vocabulary import LearnVocabularies
from carrara.conditioner.labels import ClassLabels
from carrara.config import compose
from carrara.errors import UserError
from tests.tiny import CAPTIONS, batches, diffusion_model, trainer

CONF = Path(__file__).parents[2] / "conf"


def class_labels(*labels: str) -> ClassLabels:
    conditioner = ClassLabels(num_classes=8, width=4)
    conditioner.labels.train_on(labels)
    return conditioner


def test_a_label_is_one_token():
    conditioning = class_labels("disc", "cube")(["cube", "disc", "cube", ""])
    assert conditioning.tokens.shape == (4, 1, 4) and conditioning.mask.shape == (4, 1) and conditioning.mask.all()
    assert torch.equal(conditioning.pooled, conditioning.tokens[:, 0])
    cube, disc, again, empty = conditioning.pooled
    assert torch.equal(cube, again)
    assert not torch.equal(cube, disc) and not torch.equal(cube, empty) and not torch.equal(disc, empty)


def test_the_empty_caption_is_no_label():
    conditioner = class_labels("", "disc")
    assert conditioner.labels.names == ["disc"]
    assert torch.equal(conditioner([""]).pooled[0], conditioner.embedding.weight[0])
    assert torch.equal(conditioner(["disc"]).pooled[0], conditioner.embedding.weight[1])


def test_a_label_that_was_not_in_training_is_named():
    conditioner = class_labels(*"abcdefg")
    with pytest.raises(
        UserError, match=r"^the label 'ring' was not in training; there are 7: 'a', 'b', 'c', 'd', 'e', …$"
    ):
        conditioner(["a", "ring"])
    with pytest.raises(UserError, match=r"there are 1: 'a'$"):
        class_labels("a")(["b"])


def test_as_many_labels_as_there_may_be():
    conditioner = class_labels(*"abcdefgh")
    assert conditioner(list("abcdefgh")).pooled.unique(dim=0).shape[0] == 8
    with pytest.raises(UserError, match="more than 8 different ones"):
        class_labels(*"abcdefghi")


def test_the_labels_are_learnt_and_lie_in_the_state(tmp_path):
    conditioner = ClassLabels(num_classes=len(CAPTIONS), width=8)
    model = diffusion_model(conditioner=conditioner)
    before = conditioner.embedding.weight.detach().clone()
    trainer(tmp_path, LearnVocabularies(lambda: CAPTIONS[:1], lambda: CAPTIONS), max_steps=2).fit(model, batches(2))
    assert conditioner.labels.names == sorted(CAPTIONS)
    assert not torch.equal(conditioner.embedding.weight, before)
    other = ClassLabels(num_classes=len(CAPTIONS), width=8)
    other.load_state_dict(conditioner.state_dict())
    assert torch.equal(other(CAPTIONS).tokens, conditioner(CAPTIONS).tokens)


def test_the_network_fits_it():
    config = compose(
        CONF, "train", ["model=pixel_unet", "size=demo", "conditioner=labels", "data.caption=shape"]
    ).config
    modules, _ = meta_modules(config)
    check_fit(config, modules)
    assert modules["conditioner"].width == config["network"]["context_width"]
