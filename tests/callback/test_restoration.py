import json

import pytest
import torch
from PIL import Image

from carrara.callback.restoration import Restoration
from carrara.corruption.base import as_stored
from carrara.corruption.noise import Gaussian
from carrara.metric.psnr import psnr
from carrara.model.restoration import restored
from tests.tiny import awake, batch, drunet, restoration_model, setting


@torch.no_grad()
def test_noisy_and_restored_pictures_are_held_against_the_originals():
    model = restoration_model(corruption=Gaussian(0.4, 0)).eval()
    awake(model)
    scores = Restoration(num_images=5, batch_size=2, num_previews=2)(model, setting(20))
    names = {"noisy_psnr", "psnr", "num_images"}
    assert scores.keys() == {f"{prefix}{name}" for prefix in ("val/", "val_seen/") for name in names}
    one = batch(range(0, 10, 2))  # the held-out ones
    noisy = as_stored(model.corruption(one["images"].float() / 127.5 - 1, one["keys"], 0))
    assert scores["val/noisy_psnr"] == pytest.approx(psnr(noisy, one["images"]).mean().item(), rel=1e-6)
    answer = restored(model.restoration, noisy)
    assert scores["val/psnr"] == pytest.approx(psnr(answer, one["images"]).mean().item(), rel=1e-4)
    assert scores["val/num_images"] == 5


@torch.no_grad()
def test_it_is_the_same_every_time_for_any_chunks_and_ranks():
    model = restoration_model().eval()
    first = Restoration(5, 2, 2)(model, setting(20))
    torch.manual_seed(5)
    assert Restoration(5, 4, 2)(model, setting(20)) == pytest.approx(first, rel=1e-6)


@torch.no_grad()
def test_triples_to_look_at(tmp_path):
    model = restoration_model(network=drunet(residual=False)).eval()  # begins as zero, and answers grey
    Restoration(8, 4, 4)(model, setting(20, samples_dir=tmp_path))
    facts = json.loads((tmp_path / "denoising=0001.json").read_text())
    assert len(facts["captions"]) == 4 and facts["columns"] == 9
    image = Image.open(tmp_path / "denoising=0001.png")
    assert image.size == (9 * 8, 2 * 8)
    tiles = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(2, 8, 9, 8, 3)
    original = batch([0])["images"][0].permute(1, 2, 0)
    noisy, grey, clean = tiles[0, :, 0], tiles[0, :, 1], tiles[0, :, 2]
    assert torch.equal(clean, original) and not torch.equal(noisy, original)
    assert (grey.float() - 127.5).abs().max() <= 0.5
    assert (noisy.float() - original.float()).abs().mean() > 10
