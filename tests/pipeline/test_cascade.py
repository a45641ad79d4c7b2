from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from carrara.autoencoder.shrunken import Enlarger, Shrunken
from carrara.diffusion.parameterization import X0
from carrara.diffusion.sampler import Euler
from carrara.network.conditioning import Conditioning
from carrara.network.resize import enlarge
from carrara.pipeline.base import Pipeline, Watch
from carrara.pipeline.cascade import Cascade
from carrara.pipeline.super_resolution import Enlarged
from carrara.pipeline.text_to_image import TextToImage
from tests.model.test_super_resolution import model
from tests.tiny import CAPTIONS, awake, diffusion_model, objective, sampling, unet


class Believes(nn.Module):
    """Takes the enlarged small picture for the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.picture is not None
        return conditioning.picture + 0 * x


def first_stage() -> TextToImage:
    torch.manual_seed(0)
    made = diffusion_model(autoencoder=Shrunken(3, 2), network=unet(resolution=4)).eval()
    awake(made.predictor)
    return TextToImage(made, 8, sampling(Euler(), num_steps=3))


def cascade(augmentation: float = 0.2, believes: bool = False) -> Cascade:
    small = first_stage()
    torch.manual_seed(1)
    if believes:
        made = model(network=Believes(), objective=objective(parameterization=X0()))
    else:
        made = model(network=awake(unet(picture_channels=3)))
    return Cascade(made.eval(), small, 8, sampling(Euler(), num_steps=4), augmentation)


def test_the_second_stage_starts_from_the_first_ones_picture():
    made = cascade(0.0, believes=True)
    small = made.small_pictures.latents(CAPTIONS[:2], [0, 1], 5).clamp(-1, 1)
    torch.testing.assert_close(made(CAPTIONS[:2], [0, 1], 5), enlarge(small, 2).clamp(-1, 1))


def test_noise_is_added_to_the_small_picture():
    exact, noised = (cascade(s, believes=True)(CAPTIONS[:2], [0, 1], 0) for s in (0.0, 0.5))
    assert (noised - exact).std() > 0.1


def test_the_strip_shows_the_small_picture_first():
    made, seen = cascade(), []
    watch = Watch(made, 7, num_samples=1)

    def on_step(step: int, t: Tensor, x: Tensor, x0_hat: Tensor) -> None:
        seen.append((step, float(t), x.shape[-1]))
        watch(step, t, x, x0_hat)

    last = made(["a big red disc"] * 2, [0, 1], 0, on_step)
    assert [step for step, _, _ in seen] == list(range(7)) == list(range(made.num_steps))
    assert [size for _, _, size in seen] == [4] * 3 + [8] * 4 and seen[2][1] == seen[6][1] == 0
    assert all(frame.shape == (1, 3, 8, 8) for frame in watch.frames)
    assert torch.equal(watch.frames[-1], last[:1])
    small = made.small_pictures(["a big red disc"], [0], 0)
    torch.testing.assert_close(watch.frames[2], small)


def test_a_picture_is_the_same_at_any_batch_size():
    made = cascade()
    whole = made(CAPTIONS[:3], [0, 1, 2], 0)
    ones = torch.cat([made([CAPTIONS[k]], [k], 0) for k in range(3)])
    torch.testing.assert_close(ones, whole, atol=1e-4, rtol=0)
    assert not torch.allclose(made(CAPTIONS[:3], [0, 1, 2], 1), whole, atol=0.01)


def test_a_weaker_model_guides_with_the_same_small_picture():
    made = cascade(0.0, believes=True)
    guided = replace(made, sampling=sampling(Euler(), 5.0, 4, weak=made.model))
    torch.testing.assert_close(guided(CAPTIONS[:1], [0], 0), made(CAPTIONS[:1], [0], 0), atol=1e-5, rtol=0)


def test_stages_that_do_not_fit_are_named():
    made = cascade()
    with pytest.raises(ValueError, match=r"pipeline\.augmentation=0\.6 lies outside of \[0, 0\.5\]"):
        replace(made, augmentation=0.6)
    with pytest.raises(ValueError, match=r"part\.small_pictures makes pictures of 8 / 2 pixels, .* of 16 / 2"):
        replace(made, resolution=16)


def test_a_first_stage_that_makes_no_pictures_is_refused():
    """Nor is one whose latents are those of an auto-encoder, however small."""
    made = cascade(0.0)
    enlarger = diffusion_model(autoencoder=Enlarger(3, 2, 8, 1), network=unet(resolution=4))
    of_latents = replace(made.small_pictures, model=enlarger)
    for first in (object(), of_latents):
        with pytest.raises(ValueError, match=r"part\.small_pictures makes no small pictures: name a run"):
            replace(made, small_pictures=first)  # type: ignore[arg-type]


def test_one_small_picture_is_enlarged_as_often_as_there_are_captions():
    stage = cascade(0.0, believes=True).second_stage
    small = torch.rand(1, 3, 4, 4) * 2 - 1
    made = Enlarged(stage, small)
    assert isinstance(made, Pipeline) and made.num_steps == 4
    torch.testing.assert_close(made(["", ""], [0, 1], 0), enlarge(small, 2).clamp(-1, 1).expand(2, -1, -1, -1))
