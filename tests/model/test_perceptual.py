import pytest
import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.model.perceptual import Perceptual
from tests.tiny import autoencoder_model, batch, batches, equal, trainer, weights


class Features(nn.Module):
    """Speaks the language of the published file: pixels from 0 to 255 in, features out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert not resize_images and return_lpips
        return self.conv(x / 255).flatten(1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vgg.pt"
    torch.jit.script(Features()).save(str(path))
    return str(path)


def test_the_distance_is_that_of_the_features(file):
    perceptual = Perceptual(file)
    a, b = torch.rand(2, 3, 8, 8) * 2 - 1, torch.rand(2, 3, 8, 8) * 2 - 1
    fa, fb = (perceptual.network((x + 1) * 127.5, False, True) for x in (a, b))
    torch.testing.assert_close(perceptual.distance(a, b), (fa - fb).square().sum(1))
    assert (perceptual.distance(a, a) == 0).all()


def test_it_is_in_float32_under_autocast(file):
    perceptual = Perceptual(file)
    a, b = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perceptual.distance(a, b), Perceptual(file).distance(a, b))
        assert perceptual.distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_the_reconstruction_gets_its_gradient_and_the_network_none(file):
    model = autoencoder_model(perceptual=file)
    losses = model.loss(batch(range(2)))
    assert tuple(losses) == model.loss_names == ("loss", "reconstruction", "kl", "perceptual")
    wanted = losses["reconstruction"] + 1e-3 * losses["kl"] + 0.1 * losses["perceptual"]
    torch.testing.assert_close(losses["loss"], wanted)
    losses["perceptual"].backward()
    assert model.autoencoder.get_parameter("quant_conv.weight").grad is not None
    assert model.perceptual is not None and all(p.grad is None for p in model.perceptual.parameters())


def test_it_is_neither_trained_nor_saved(file, tmp_path):
    model = autoencoder_model(perceptual=file)
    assert model.perceptual is not None
    before = weights(model.perceptual)
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, batches(2))
    assert equal(weights(model.perceptual), before)
    assert not model.perceptual.network.training
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert not any(key.startswith("perceptual.") for key in saved["state_dict"])


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"model.perceptual=.*absent.pt: no such file; download https://"):
        Perceptual(str(tmp_path / "absent.pt"))


@pytest.mark.parametrize("content", [b"", b"not torch at all", b"PK\x03\x04 cut"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "vgg.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no TorchScript network"):
        Perceptual(str(path))
