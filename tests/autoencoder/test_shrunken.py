import pytest
import torch
import torch.nn.functional as F

from carrara.autoencoder.shrunken import Enlarger, Shrunken
from carrara.network.resize import enlarge, shrink
from tests.tiny import autoencoder_model, awake, batch


def enlarger(**changes) -> Enlarger:
    return Enlarger(**{"latent_channels": 3, "downsampling": 2, "width": 8, "num_blocks": 1} | changes)


def test_latents_are_small_pictures_and_come_back_enlarged():
    autoencoder, images = Shrunken(3, 2), torch.rand(2, 3, 8, 8) * 2 - 1
    z = autoencoder.encode(images, torch.randn(2, 3, 4, 4))  # the posterior has no width
    assert torch.equal(z, shrink(images, 2)) and autoencoder.latent_shape(8, 8) == (3, 4, 4)
    assert torch.equal(autoencoder.decode(z), enlarge(z, 2).clamp(-1, 1))
    assert autoencoder.is_bounded and not autoencoder.is_identity and not list(autoencoder.parameters())


def test_edges_do_not_leave_the_range():
    edge = torch.ones(1, 3, 4, 4)
    edge[..., :2] = -1
    assert Shrunken(3, 2).decode(edge).abs().max() == 1 and enlarge(edge, 2).abs().max() > 1


@pytest.mark.parametrize("kind", [Shrunken, lambda *node: enlarger(latent_channels=node[0])])
def test_other_channels_are_refused(kind):
    with pytest.raises(ValueError, match=r"autoencoder\.latent_channels"):
        kind(4, 2)


def test_what_is_added_to_bicubic_is_learnt():
    autoencoder, images = enlarger(), batch(range(2))["images"].float() / 127.5 - 1
    made, penalty, logged = autoencoder.training_pass(images, torch.empty(2, 0))
    bicubic = enlarge(shrink(images, 2), 2).clamp(-1, 1)
    assert made.shape == images.shape and penalty == 0 and logged == {}
    assert not torch.allclose(made, bicubic)
    for parameter in autoencoder.decoder[-1].parameters():
        parameter.data.zero_()
    torch.testing.assert_close(autoencoder.training_pass(images, torch.empty(2, 0))[0], bicubic)
    assert not autoencoder.is_bounded  # its statistics are measured


def test_it_trains_as_any_auto_encoder():
    model = autoencoder_model(autoencoder=awake(enlarger()))
    loss = model.loss(batch(range(4)))["loss"]
    images = batch(range(4))["images"].float() / 127.5 - 1
    torch.testing.assert_close(loss, F.mse_loss(model.autoencoder.decode_raw(shrink(images, 2)), images))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.autoencoder.parameters())


def test_what_has_no_weights_is_not_trained():
    with pytest.raises(ValueError, match="autoencoder: Shrunken has nothing to train"):
        autoencoder_model(autoencoder=Shrunken(3, 2))
