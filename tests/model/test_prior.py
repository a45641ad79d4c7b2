import torch
import torch.nn.functional as F

from carrara.conditioner.image_embedding import ImageEmbedding
from tests.dalle2 import WIDTH, prior_model, unclip_model
from tests.tiny import CAPTIONS, batch


def test_what_is_generated_is_the_direction_of_the_pictures_embedding():
    model = prior_model()
    rows = batch(range(4))
    x0 = model.clean(rows)
    raw = model.clip.embed_images(rows["images"].float() / 127.5 - 1)
    torch.testing.assert_close(F.cosine_similarity(x0, raw), torch.ones(4))
    torch.testing.assert_close(x0.square().mean(1), torch.ones(4))  # what schedules expect of data


def test_the_network_is_told_the_caption_twice_and_an_empty_one_where_it_is_dropped():
    model = prior_model()
    drop = torch.tensor([False, True])
    told = model.conditioning(batch([3, 5]), drop)
    texts = model.clip.text_directions([CAPTIONS[3], ""])
    torch.testing.assert_close(told.pooled, texts)
    expected = model.predictor.conditioner([CAPTIONS[3], ""])
    assert torch.equal(told.tokens, expected.tokens) and torch.equal(told.mask, expected.mask)


def test_clip_is_neither_trained_nor_saved():
    for model in (prior_model(), unclip_model()):
        model.loss(batch(range(4)))["loss"].backward()
        assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())
        assert all(p.grad is not None for p in model.predictor.network.parameters())
        checkpoint = {"state_dict": model.state_dict()}
        model.on_save_checkpoint(checkpoint)
        assert not [key for key in checkpoint["state_dict"] if key.startswith("clip.")]


def test_validation_is_told_every_caption_and_is_the_same_every_time():
    model, rows, u = prior_model(caption_dropout=1.0), batch(range(4)), torch.linspace(0.1, 0.9, 4)
    assert model.loss(rows, u)["loss"] == prior_model(model.clip, network=model.predictor.network,
        conditioner=model.predictor.conditioner, caption_dropout=0.0).loss(rows, u)["loss"]  # fmt: skip


def test_the_decoder_is_told_the_pictures_own_embedding_or_none():
    model = unclip_model()
    rows = batch(range(2))
    told = model.conditioning(rows, torch.tensor([False, True]))
    embedding = model.clip.image_directions(rows["images"].float() / 127.5 - 1)
    conditioner = model.predictor.conditioner
    assert isinstance(conditioner, ImageEmbedding)
    expected = conditioner(torch.stack([embedding[0], conditioner.nothing]))
    torch.testing.assert_close(told.tokens, expected.tokens)
    torch.testing.assert_close(told.pooled, expected.pooled)
    assert told.tokens.shape == (2, 4, 8) and told.mask.all() and embedding.shape[1] == WIDTH


def test_captions_say_nothing_to_the_decoder():
    model, rows = unclip_model(), batch(range(4))
    assert model.loss(rows)["loss"] == model.loss({**rows, "captions": ["x"] * 4})["loss"]
