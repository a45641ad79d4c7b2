import pytest
import torch

from carrara.autoencoder.identity import Identity


def test_pictures_are_their_own_latents():
    autoencoder, images = Identity(), torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(autoencoder.encode(images), images)
    assert torch.equal(autoencoder.encode(images, torch.randn_like(images)), images)  # the posterior has no width
    assert torch.equal(autoencoder.decode(images), images)
    assert autoencoder.latent_shape(8, 8) == (3, 8, 8)
    assert not list(autoencoder.parameters())


@pytest.mark.parametrize("node", [{"latent_channels": 4}, {"downsampling": 2}])
def test_it_is_of_pixels_only(node):
    with pytest.raises(ValueError, match="autoencoder=identity has latent_channels=3 and downsampling=1"):
        Identity(**node)
