from dataclasses import replace
from typing import Any

import pytest
import torch

from carrara.errors import UserError
from carrara.pipeline.base import Watch
from carrara.pipeline.one_step import OneStep
from tests.tiny import CAPTIONS, awake, gan_model, kl, latent_gan_model, vae_model

every_model = pytest.mark.parametrize(
    "build", [gan_model, lambda: latent_gan_model(kl()), vae_model], ids=["gan", "latent_gan", "vae"]
)


def pipeline(build: Any, temperature: float = 1.0) -> OneStep:
    torch.manual_seed(0)
    model = build().eval()
    awake(model.generator)
    return OneStep(model, temperature)


def make(made: OneStep, indices: list[int], seed: int = 0, **more: Any) -> torch.Tensor:
    return made([CAPTIONS[k % len(CAPTIONS)] for k in indices], indices, seed, **more)


@every_model
def test_a_picture_is_the_same_at_any_batch_size(build):
    made = pipeline(build)
    whole = make(made, list(range(6)))
    ones = torch.cat([make(made, [k]) for k in range(6)])
    torch.testing.assert_close(ones, whole, atol=1e-4, rtol=0)
    assert whole.shape == (6, 3, 8, 8) and whole.abs().max() <= 1 and not whole.requires_grad


@every_model
def test_a_seed_is_a_picture_and_the_global_generator_is_left_alone(build):
    made = pipeline(build)
    first = make(made, [0, 1])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(make(made, [0, 1]), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(make(made, [0, 1], seed=1), first, atol=0.01)
    assert not torch.allclose(make(made, [16, 17]), first, atol=0.01)  # the same captions, other numbers


@every_model
def test_the_caption_is_heard(build):
    made = pipeline(build)
    red, blue = (made([f"a big {color} disc"], [0], 0) for color in ("red", "blue"))
    assert not torch.allclose(red, blue, atol=1e-3)


@every_model
def test_temperature_scales_the_noise(build):
    made = pipeline(build)
    cold = replace(made, temperature=0.0)
    assert torch.equal(make(cold, [0, 1]), make(cold, [0, 1], seed=1))
    warm, half = make(made, [0, 1]), make(replace(made, temperature=0.5), [0, 1])
    assert (half - make(cold, [0, 1])).abs().mean() < (warm - make(cold, [0, 1])).abs().mean()
    assert half.ne(warm).any()


@every_model
def test_nothing_is_on_the_way_to_be_seen(build):
    made = pipeline(build)
    watch = Watch(made, num_frames=10, num_samples=1)
    make(made, [0], on_step=watch)
    assert made.num_steps == 0 and not watch.frames


@pytest.mark.parametrize("temperature", [-0.1, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(UserError, match=r"pipeline.temperature must be a number from 0 on"):
        OneStep(gan_model(), temperature)
