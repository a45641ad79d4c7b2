import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara import keyed_random
from carrara.network.conditioning import Conditioning
from carrara.network.tarflow import FlowBlock
from carrara.pipeline.flow import FlowToImage
from tests.tiny import CAPTIONS, awake, flow_model, kl, shift_and_scale, tarflow


def pipeline(guidance_scale: float = 1.0, temperature: float = 1.0, **changes: Any) -> FlowToImage:
    torch.manual_seed(0)
    model = flow_model(**changes).eval()
    awake(model.generator)
    return FlowToImage(model, 8, guidance_scale, temperature)


def pictures(made: FlowToImage, indices: list[int], seed: int = 0, on_step: Any = None) -> Tensor:
    return made([CAPTIONS[k % len(CAPTIONS)] for k in indices], indices, seed, on_step)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_picture_is_the_same_at_any_batch_size(guidance_scale):
    made = pipeline(guidance_scale)
    whole = pictures(made, list(range(8)))
    ones = torch.cat([pictures(made, [k]) for k in range(8)])
    threes = torch.cat([pictures(made, list(range(k, min(k + 3, 8)))) for k in range(0, 8, 3)])
    torch.testing.assert_close(ones, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(threes, whole, atol=1e-4, rtol=0)
    assert whole.shape == (8, 3, 8, 8) and whole.abs().max() <= 1


def test_a_seed_is_a_picture():
    made = pipeline()
    first = pictures(made, [0, 1])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(pictures(made, [0, 1]), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(pictures(made, [0, 1], seed=1), first, atol=0.01)
    assert not torch.allclose(pictures(made, [16, 17]), first, atol=0.01)  # the same captions, other numbers


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_flow_takes_a_picture_back_to_its_noise(temperature):
    made = pipeline(temperature=temperature, noise_std=None)
    kept: list[Tensor] = []
    pictures(made, [3, 4], 7, lambda step, t, x, x0_hat: kept.append(x))
    with torch.no_grad():
        z, _ = made.network(kept[-1], made.model.generator.conditioner(CAPTIONS[3:5]))
    noise = keyed_random.normal(7, torch.tensor([3, 4]), "generation/0", (3, 8, 8))
    torch.testing.assert_close(z, temperature * noise, atol=1e-4, rtol=0)


def by_hand(
    block: FlowBlock,
    z: Tensor,
    texts: Conditioning,
    nothing: Conditioning,
    scale: float,
    places: tuple[Tensor, Tensor],
) -> Tensor:
    """One forwards block's guided inverse, with all patches anew for every one, and no cache."""
    x = torch.zeros_like(z)
    for i in range(z.shape[1]):
        found = [block._affine(F.pad(x, (0, 0, 1, -1)), *places, said)[:, i] for said in (texts, nothing)]
        shift, log_scale = (found[1] + scale * (found[0] - found[1])).chunk(2, dim=-1)
        x[:, i] = z[:, i] * log_scale.exp() + shift
    return x


@torch.no_grad()
def test_guidance_extrapolates_shift_and_log_scale_of_every_patch():
    made = pipeline(3.0, network=tarflow(num_blocks=1), noise_std=None)
    [block] = made.network.blocks
    assert isinstance(block, FlowBlock)
    kept: list[Tensor] = []
    pictures(made, [0, 1], on_step=lambda step, t, x, x0_hat: kept.append(x))
    texts, nothing = made.model.generator.conditioner(CAPTIONS[:2]), made.model.generator.conditioner(["", ""])
    noise = keyed_random.normal(0, torch.tensor([0, 1]), "generation/0", (3, 8, 8))
    z, _, places = made.network._patches(noise)
    wanted = by_hand(block, z, texts, nothing, 3.0, places)
    torch.testing.assert_close(kept[0], made.network._picture(wanted, (4, 4)), atol=1e-4, rtol=0)
    assert not torch.allclose(wanted, by_hand(block, z, texts, nothing, 1.0, places), atol=0.01)


class Asked(nn.Module):
    """A conditioner that keeps the captions it is asked for."""

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner, self.captions = conditioner, []  # type: ignore[var-annotated]

    def forward(self, captions: list[str]) -> Conditioning:
        self.captions += captions
        answer: Conditioning = self.conditioner(captions)
        return answer


def test_scale_one_is_the_conditional_picture_alone():
    """Also the limit of guidance: both halves, of which the unconditional one cancels."""
    made = pipeline(1.0)
    made.model.generator.conditioner = asked = Asked(made.model.generator.conditioner)
    alone = pictures(made, [0, 1])
    assert asked.captions == CAPTIONS[:2]
    made.guidance_scale = 1 + 1e-6
    torch.testing.assert_close(pictures(made, [0, 1]), alone, atol=1e-4, rtol=0)
    assert asked.captions[-2:] == ["", ""]
    made.guidance_scale = 4.0
    assert not torch.allclose(pictures(made, [0, 1]), alone, atol=1e-3)


def test_scale_zero_is_the_picture_of_the_empty_caption():
    """But for the noise that is taken away, which is that of a picture of the caption."""
    made = pipeline(0.0, noise_std=None)
    empty = pipeline(1.0, noise_std=None)(["", ""], [0, 1], 0)
    torch.testing.assert_close(pictures(made, [0, 1]), empty, atol=1e-4, rtol=0)


def test_the_noise_of_training_is_taken_away():
    """Of Gaussian pictures N(m, s²) with noise σ the best guess is known: (s² y + σ² m) / (s² + σ²)."""
    m, s, sigma = 0.3, 0.4, 0.2
    network = tarflow(num_blocks=1)
    with torch.no_grad():
        shift_and_scale(network)[:12] = m
        shift_and_scale(network)[12:] = 0.5 * math.log(s**2 + sigma**2)
    made = FlowToImage(flow_model(network=network, noise_std=sigma).eval(), 8, 1.0, 1.0)
    kept: list[Tensor] = []
    found = pictures(made, [0, 1], on_step=lambda step, t, x, x0_hat: kept.append(x))
    noisy, clean = kept
    torch.testing.assert_close(clean, (s**2 * noisy + sigma**2 * m) / (s**2 + sigma**2))
    torch.testing.assert_close(found, clean.clamp(-1, 1))
    noise = keyed_random.normal(0, torch.tensor([0, 1]), "generation/0", (3, 8, 8))
    torch.testing.assert_close(noisy, m + (s**2 + sigma**2) ** 0.5 * noise)


@pytest.mark.parametrize(("noise_std", "num_steps"), [(0.05, 4), (None, 3)])
def test_every_block_is_a_step_and_so_is_the_last_denoising(noise_std, num_steps):
    made = pipeline(2.0, network=tarflow(num_blocks=3), noise_std=noise_std)
    told: list[tuple[int, float, Tensor]] = []
    found = pictures(made, [0, 1], on_step=lambda step, t, x, x0_hat: told.append((step, float(t), x)))
    assert made.num_steps == num_steps
    assert [step for step, _, _ in told] == list(range(num_steps))
    assert [t for _, t, _ in told] == pytest.approx([1 - (k + 1) / num_steps for k in range(num_steps)])
    assert torch.equal(made.decode(told[-1][2]), found)


def test_the_caption_changes_the_picture():
    made = pipeline()
    a, b = (made([c], [0], 0) for c in ("a big red disc", "a small blue cube"))
    assert (a - b).abs().max() > 1e-3


def test_latents_are_decoded():
    autoencoder = kl()
    made = pipeline(autoencoder=autoencoder, network=tarflow(in_channels=4, patch=1), noise_std=0.3)
    kept: list[Tensor] = []
    found = pictures(made, [0, 1], on_step=lambda step, t, x, x0_hat: kept.append(x))
    assert kept[-1].shape == (2, 4, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(found, autoencoder.decode(kept[-1]).clamp(-1, 1))


def test_no_gradient_is_kept_and_nothing_is_rounded_under_autocast():
    made = pipeline(2.0)
    alone = pictures(made, [0, 1])
    assert not alone.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pictures(made, [0, 1]), alone)
    assert all(p.grad is None for p in made.model.parameters())


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match=r"pipeline\.temperature must be above 0"):
        pipeline(temperature=temperature)
