import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image

from carrara.autoencoder.shrunken import Enlarger, Shrunken
from carrara.callback.reconstruction import Reconstruction
from carrara.metric.psnr import psnr
from carrara.pipeline.pictures import to_uint8
from tests.tiny import autoencoder_model, batch, gumbel, setting, vq


@torch.no_grad()
def test_psnr_is_that_of_the_mean_reconstruction():
    model = autoencoder_model().eval()
    scores = Reconstruction(num_images=5, batch_size=2, num_previews=2, check=None)(model, setting(20))
    assert scores.keys() == {"val/psnr", "val/num_images", "val_seen/psnr", "val_seen/num_images"}
    images = batch(range(0, 10, 2))["images"]  # the held-out ones
    back = model.autoencoder.decode(model.autoencoder.encode(images.float() / 127.5 - 1))
    assert scores["val/psnr"] == pytest.approx(psnr(to_uint8(back), images).mean().item(), rel=1e-4)
    assert scores["val/num_images"] == 5


@torch.no_grad()
def test_what_enlarges_is_compared_with_bicubic():
    model = autoencoder_model(autoencoder=Enlarger(3, 2, width=8, num_blocks=1)).eval()
    scores = Reconstruction(num_images=5, batch_size=2, num_previews=2, check=None)(model, setting(20))
    images = batch(range(0, 10, 2))["images"]
    plain = Shrunken(3, 2)
    bicubic = plain.decode(plain.encode(images.float() / 127.5 - 1))
    assert scores["val/psnr_bicubic"] == pytest.approx(psnr(to_uint8(bicubic), images).mean().item(), rel=1e-6)
    assert scores["val/psnr"] != scores["val/psnr_bicubic"] and "val_seen/psnr_bicubic" in scores


@torch.no_grad()
def test_the_statistics_do_not_change_the_reconstruction():
    model, score = autoencoder_model().eval(), Reconstruction(4, 4, 2, None)
    before = score(model, setting(8))["val/psnr"]
    model.autoencoder.set_statistics(torch.ones(4), torch.full((4,), 3.0))
    assert score(model, setting(8))["val/psnr"] == pytest.approx(before, abs=1e-3)


@torch.no_grad()
def test_captions_that_the_parser_cannot_read_are_not_scored():
    """Labels, say."""
    score = Reconstruction(4, 4, 2, lambda captions, images: [{}] * len(captions))
    assert "val/reconstruction_accuracy" not in score(autoencoder_model().eval(), setting(8))


@torch.no_grad()
def test_a_parser_reads_the_reconstructions():
    seen: list[torch.Tensor] = []

    def check(captions, images):
        seen.append(images)
        return [{"all": k % 2 == 0} for k in range(len(captions))]

    scores = Reconstruction(4, 4, 2, check)(autoencoder_model().eval(), setting(8))
    assert scores["val/reconstruction_accuracy"] == 0.5
    assert seen[0].dtype == torch.uint8 and not torch.equal(seen[0], batch(range(0, 8, 2))["images"])


@torch.no_grad()
def test_pairs_to_look_at(tmp_path):
    Reconstruction(4, 4, 2, None)(autoencoder_model().eval(), setting(8, samples_dir=tmp_path))
    image = Image.open(tmp_path / "reconstruction=0001.png")
    assert image.size == (4 * 8, 8)
    facts = json.loads((tmp_path / "reconstruction=0001.json").read_text())
    assert [tile["caption"] for tile in facts["captions"]] == batch([0, 2])["captions"]


@pytest.mark.parametrize("kind", [vq, gumbel])
@torch.no_grad()
def test_the_use_of_a_codebook_is_counted_over_all_pictures(kind):
    torch.manual_seed(0)
    autoencoder = kind()
    model = autoencoder_model(autoencoder=autoencoder).eval()
    torch.nn.init.normal_(autoencoder.get_parameter("quant_conv.weight"), std=5.0)
    scores = Reconstruction(num_images=5, batch_size=2, num_previews=2, check=None)(model, setting(20))
    images = batch(range(0, 10, 2))["images"].float() / 127.5 - 1
    tokens = autoencoder.tokens(images)
    counts = Counter(tokens.flatten().tolist())
    entropy = -sum(n / tokens.numel() * math.log(n / tokens.numel()) for n in counts.values())
    assert scores["val/codebook_use"] == len(counts) / 16
    assert scores["val/codebook_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-9)
    back = to_uint8(autoencoder.decode(autoencoder.encode(images)))
    assert scores["val/psnr"] == pytest.approx(psnr(back, batch(range(0, 10, 2))["images"]).mean().item(), rel=1e-4)
