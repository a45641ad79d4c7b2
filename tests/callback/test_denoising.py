import json

import pytest
import torch
from torch import Tensor, nn

from carrara.autoencoder.identity import Identity
from carrara.callback.denoising import Denoising
from carrara.diffusion.schedule import VarianceExploding
from carrara.metric.psnr import psnr
from carrara.model.diffusion import DiffusionModel
from tests.tiny import diffusion_model, objective, setting


class Known(nn.Module):
    """Answers with the flow that leads to grey, whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: object) -> Tensor:
        self.seen.append((x, c_noise))
        sigma = VarianceExploding().sigma(c_noise.double() / 1000).float()[:, None, None, None]
        return x / sigma  # flow = eps - x0 with x0 = 0


def model(network: Known | None = None) -> DiffusionModel:
    return diffusion_model(Identity(), network=network or Known(), objective=objective(VarianceExploding())).eval()


def denoising(**changes) -> Denoising:
    settings = {"sigma": 0.5, "seed": 0, "num_images": 5, "batch_size": 2, "num_previews": 2}
    return Denoising(**settings | changes)


@torch.no_grad()
def test_it_adds_so_much_noise_and_judges_the_estimate():
    network, where = Known(), setting(20)
    one = model(network)
    scores = denoising()(one, where)
    names = {"noisy_psnr", "denoised_psnr", "num_images"}
    assert scores.keys() == {f"{prefix}{name}" for prefix in ("val/", "val_seen/") for name in names}
    images = where.validation.take(where.validation.splits["held_out"][:5])["images"]
    x_t = torch.cat([x for x, _ in network.seen])[:5]
    assert (x_t - (images.float() / 127.5 - 1)).std().item() == pytest.approx(0.5, abs=0.03)
    assert scores["val/noisy_psnr"] == pytest.approx(psnr(x_t.clamp(-1, 1), images).mean().item(), abs=1e-2)
    grey = torch.full_like(images, 128)
    assert scores["val/denoised_psnr"] == pytest.approx(psnr(grey, images).mean().item(), abs=0.05)


@torch.no_grad()
def test_it_is_the_same_every_time_for_any_chunks():
    one = model()
    first = denoising()(one, setting(20))
    torch.manual_seed(5)
    assert denoising(batch_size=4)(one, setting(20)) == pytest.approx(first, rel=1e-6)
    assert denoising(sigma=1.0)(one, setting(20))["val/noisy_psnr"] < first["val/noisy_psnr"]


@torch.no_grad()
def test_pairs_to_look_at(tmp_path):
    denoising()(model(), setting(20, samples_dir=tmp_path))
    facts = json.loads((tmp_path / "denoising=0001.json").read_text())
    assert len(facts["captions"]) == 2 and facts["tile"] == 8
