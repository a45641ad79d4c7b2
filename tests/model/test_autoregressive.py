import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.model.autoregressive import AutoregressiveModel
from carrara.pipeline.autoregressive import AutoregressiveToImage
from tests.tiny import (
    CAPTIONS,
    Stream,
    autoregressive_model,
    awake,
    batch,
    kl,
    text_image_transformer,
    trainer,
    vq,
)


def told(rows: list[int]) -> dict[str, Any]:
    """A batch whose pictures follow from their captions."""
    return batch(rows) | {"images": batch([k % len(CAPTIONS) for k in rows])["images"]}


def by_hand(model: AutoregressiveModel, of: dict[str, Any], captions: list[str]) -> tuple[float, float]:
    """Mean nats of an image token, and of a caption's mean text token, one after the other, in float64."""
    image, text = [], []
    for row, caption in enumerate(captions):
        ids, mask = model.network.read([caption])
        tokens = model.autoencoder.tokens(model.images(of)[row : row + 1])
        text_logits, image_logits = model.network(ids, mask, tokens, (4, 4))
        for k in range(16):
            image.append(-image_logits[0, k].double().log_softmax(0)[tokens[0, k]].item())
        words = range(1, int(mask.sum()))
        nats = [-text_logits[0, k - 1].double().log_softmax(0)[ids[0, k]].item() for k in words]
        text.append(sum(nats) / len(nats))
    return sum(image) / len(image), sum(text) / len(text)


def test_a_uniform_model_loses_the_logarithm_of_its_choices():
    losses = autoregressive_model().loss(batch(range(5)))  # its last layers are zero at first
    assert losses["image_nll"].item() == pytest.approx(math.log(16))
    assert losses["text_nll"].item() == pytest.approx(math.log(300))
    assert losses["loss"].item() == pytest.approx(7 / 8 * math.log(16) + 1 / 8 * math.log(300))


def test_the_loss_is_the_cross_entropy_of_every_token():
    """Each image token; of the text all after the start, the end too, and no padding."""
    model = autoregressive_model(image_weight=2.0, text_weight=3.0).eval()
    awake(model.network)
    of = batch(range(3)) | {"captions": ["a", "a big red disc", ""]}
    losses = model.loss(of, torch.rand(3))
    image, text = by_hand(model, of, of["captions"])
    assert losses["image_nll"].item() == pytest.approx(image, rel=1e-5)
    assert losses["text_nll"].item() == pytest.approx(text, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(2 * image + 3 * text, rel=1e-5)
    assert set(losses) == set(model.loss_names)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_a_sample_adds_to_the_loss_depends_on_no_other(dropout):
    """So that any number of ranks and micro-batches has the same gradient."""
    model = autoregressive_model(caption_dropout=dropout).eval()
    awake(model.network)
    captions = ["a", "a big red disc", "", "big blue", "a small", "a"]
    whole = model.loss(batch(range(6)) | {"captions": captions})
    alone = [model.loss(batch([k]) | {"captions": [caption]}) for k, caption in enumerate(captions)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([one[name] for one in alone]).mean(), value)


def test_a_dropped_caption_tells_nothing_and_is_not_learned():
    model = autoregressive_model(caption_dropout=1.0).eval()
    awake(model.network)
    of = batch(range(4))
    dropped = model.loss(of)
    assert dropped["text_nll"] == 0
    assert dropped["image_nll"].item() == pytest.approx(by_hand(model, of, [""] * 4)[0], rel=1e-5)
    kept = model.loss(of, torch.rand(4))  # validation
    assert kept["image_nll"].item() == pytest.approx(by_hand(model, of, of["captions"])[0], rel=1e-5)
    assert kept["text_nll"] > 0


def test_which_captions_are_dropped_depends_on_the_position_alone():
    model = autoregressive_model(caption_dropout=0.3)
    read: list[str] = []
    original = model.network.read

    def watched(captions: list[str]) -> tuple[Tensor, Tensor]:
        read.extend(captions)
        return original(captions)

    model.network.read = watched  # type: ignore[method-assign]
    model.loss(batch(range(100)))
    together = [caption == "" for caption in read]
    read.clear()
    for k in range(0, 100, 25):
        model.loss(batch(range(k, k + 25)))
    assert [caption == "" for caption in read] == together
    assert 15 < sum(together) < 45


def test_the_auto_encoder_is_frozen_and_the_network_exported(tmp_path):
    model = autoregressive_model()
    before = {name: value.clone() for name, value in model.autoencoder.state_dict().items()}
    trainer(tmp_path, max_steps=2).fit(model, Stream([told(list(range(8))) for _ in range(2)]))
    assert all(torch.equal(before[name], value) for name, value in model.autoencoder.state_dict().items())
    assert not model.autoencoder.training and model.exported is model.network and model.kind == "network"
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {"network"}


def test_an_auto_encoder_without_tokens_or_with_others_is_refused():
    with pytest.raises(ValueError, match="no tokens: take a discrete one, autoencoder=vq or gumbel"):
        autoregressive_model(autoencoder=kl())
    with pytest.raises(ValueError, match=r"network\.num_codes=16, but the auto-encoder has 8 codes"):
        autoregressive_model(autoencoder=vq(num_codes=8))


def test_training_beats_counting_and_draws_what_the_caption_says(tmp_path: Path):
    """16 captions with a picture each: who has learned them knows every token."""
    model = autoregressive_model(
        network=text_image_transformer(width=32),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        max_steps=60,
        cooldown=0.3,
    )
    everything = told(list(range(16)))
    with torch.no_grad():  # codes among the latents, so that all are used
        model.autoencoder.codes.copy_(model.autoencoder.posterior(model.images(everything))[0].movedim(1, -1)[:, 1, 2])
    steps = [told(list(range(16 * k, 16 * k + 16))) for k in range(60)]
    trainer(tmp_path, max_steps=60, gradient_clip_val=1.0).fit(model, Stream(steps))
    model.eval()
    with torch.no_grad():
        losses = model.loss(everything, torch.rand(16))
        tokens = model.autoencoder.tokens(model.images(everything))
    shares = tokens.flatten().bincount(minlength=16) / tokens.numel()
    unigram = float(torch.special.entr(shares).sum())
    assert losses["image_nll"] < 0.25 * unigram < 0.25 * math.log(16)
    # "a", a size, a colour, a shape, the end: who knows that has log(2 · 4 · 2) nats for 5 tokens
    assert losses["text_nll"].item() == pytest.approx(math.log(16) / 5, rel=0.1)
    pipeline = AutoregressiveToImage(model, 8, None, 1.0, 1, None, 1.0, 1)
    wanted = model.autoencoder.decode_tokens(tokens, 8, 8).clamp(-1, 1)
    made = pipeline(CAPTIONS, range(16), 0)
    assert ((made - wanted).abs().flatten(1).amax(1) < 1e-5).float().mean() > 0.8
