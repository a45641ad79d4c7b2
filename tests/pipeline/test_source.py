from dataclasses import replace

import pytest
import torch
from torch import Tensor

from carrara.diffusion.langevin import PredictorCorrector
from carrara.diffusion.multistep import DPMSolverPP2M
from carrara.diffusion.sampler import Ancestral, Euler
from carrara.pipeline.source import Source
from carrara.pipeline.text_to_image import TextToImage
from tests.tiny import awake, diffusion_model, kl, sampling

IMAGE = torch.rand(3, 8, 8) * 2 - 1
LEFT = torch.zeros(8, 8, dtype=torch.bool)
LEFT[:, :3] = True
SAMPLERS = [Euler(), Ancestral(), DPMSolverPP2M(True), PredictorCorrector()]


def pipeline(**changes) -> TextToImage:
    torch.manual_seed(0)
    model = diffusion_model(**changes).eval()
    awake(model.predictor)
    return TextToImage(model, 8, sampling(None, 1.0, 20))


def paint(made: TextToImage, source: Source, sampler=None, num_steps: int = 20, **how) -> Tensor:
    how_to = sampling(sampler, 1.0, num_steps)
    return replace(made, sampling=how_to, source=source)(["a big red disc"] * 2, [0, 1], 0, **how)


@pytest.mark.parametrize(
    ("strength", "first", "count"), [(1.0, 1.0, 20), (0.5, 0.5, 10), (0.26, 0.25, 5), (0.01, 0.05, 1)]
)
def test_strength_is_the_share_of_the_steps_that_are_made(strength: float, first: float, count: int):
    times = Source(IMAGE, strength).rest_of(torch.linspace(1, 0, 21, dtype=torch.float64))
    assert times[0].item() == pytest.approx(first) and times[-1] == 0 and len(times) == count + 1
    seen = []
    paint(pipeline(), Source(IMAGE, strength), on_step=lambda step, t, x, x0_hat: seen.append(t.item()))
    assert len(seen) == count


def test_the_less_strength_the_nearer_to_the_picture():
    made = pipeline()
    distances = [(paint(made, Source(IMAGE, s)) - IMAGE).square().mean().item() for s in (0.1, 0.4, 0.9)]
    assert distances[0] < distances[1] < distances[2]


def test_it_starts_from_the_noised_picture():
    """One step of a denoiser that knows nothing shows where it started."""
    made, seen = pipeline(), []

    def forward(x: Tensor, c_noise: Tensor, conditioning: object) -> Tensor:
        seen.append(x.clone())
        return x * 0

    made.model.predictor.network.forward = forward
    paint(made, Source(IMAGE, 0.25))
    noise = (seen[0] - 0.75 * IMAGE) / 0.25
    assert noise.mean().abs() < 0.2 and noise.std().item() == pytest.approx(1, abs=0.15)
    assert not torch.equal(noise[0], noise[1])  # its own for each picture


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_outside_the_mask_nothing_changes_and_inside_it_is_painted(sampler, strength: float):
    made, inside = pipeline(), []
    whole = paint(made, Source(IMAGE, strength), sampler)
    result = paint(
        made, Source(IMAGE, strength, LEFT), sampler, on_step=lambda step, t, x, x0_hat: inside.append((x, x0_hat))
    )
    assert torch.equal(result[:, :, ~LEFT], IMAGE[:, ~LEFT].expand(2, -1, -1))
    assert not torch.allclose(result[:, :, LEFT], IMAGE[:, LEFT].expand(2, -1, -1), atol=0.1)
    assert not torch.allclose(result[:, :, LEFT], whole[:, :, LEFT])  # it sees its surroundings
    for _, x0_hat in inside:  # the estimate is the picture itself there, at every step
        assert torch.equal(x0_hat[:, :, ~LEFT], IMAGE[:, ~LEFT].expand(2, -1, -1))
    torch.testing.assert_close(inside[-1][0][:, :, ~LEFT], IMAGE[:, ~LEFT].expand(2, -1, -1))


def test_the_kept_part_is_noised_as_the_time_says():
    """For a deterministic sampler x is there alpha image + sigma eps with one eps, at every step."""
    made, noises = pipeline(), []

    def on_step(step: int, t: Tensor, x: Tensor, x0_hat: Tensor) -> None:
        if t > 0:
            noises.append((x - (1 - t) * IMAGE)[:, :, ~LEFT] / t)

    paint(made, Source(IMAGE, 1.0, LEFT), Euler(), on_step=on_step)
    for noise in noises:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-3)


def test_a_latent_with_any_pixel_to_paint_is_painted():
    made = pipeline(autoencoder=kl(downsampling=4))
    kept = []
    paint(made, Source(IMAGE, 1.0, LEFT), on_step=lambda step, t, x, x0_hat: kept.append(x0_hat))
    z0 = made.model.autoencoder.encode(IMAGE[None])[0]
    right = torch.stack([torch.isclose(x0_hat, z0).all(1)[:, :, 1].all() for x0_hat in kept])
    left = torch.stack([torch.isclose(x0_hat, z0).all(1)[:, :, 0].any() for x0_hat in kept])
    assert right.all() and not left.any()


def test_pictures_from_a_picture_are_the_same_at_any_batch_size():
    made, source = pipeline(), Source(IMAGE, 0.6, LEFT)
    whole = paint(made, source)
    one = replace(made, source=source)(["a big red disc"], [1], 0)
    torch.testing.assert_close(one[0], whole[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("strength", [0, -1, 1.1])
def test_impossible_strengths_are_refused(strength: float):
    with pytest.raises(ValueError, match="strength"):
        Source(IMAGE, strength)
