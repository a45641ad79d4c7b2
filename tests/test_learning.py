"""What a trained noise predictor must have learned: a model of 8 × 8 shapes, trained here for a minute or two."""

import pytest
import torch
from torch import Tensor

from carrara.autoencoder.identity import Identity
from carrara.conditioner.text import Text
from carrara.data import shapes
from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import Epsilon
from carrara.diffusion.schedule_table import Linear
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted
from carrara.model.diffusion import DiffusionModel
from carrara.network.conditioning import Conditioning
from tests import tiny

pytestmark = pytest.mark.slow
STEPS, BATCH, TEST = 500, 32, 512


@pytest.fixture(scope="module")
def trained() -> DiffusionModel:
    torch.manual_seed(0)
    train = shapes.examples(0, "train", range(4000), resolution=8)
    conditioner = Text(vocab_size=512, max_length=48, width=64, depth=2, heads=2)
    conditioner.tokenizer.train_on(train.captions)
    model = tiny.diffusion_model(
        Identity(),
        network=tiny.unet(channels=[64], attention=[True], context_width=64, pooled_width=64),
        conditioner=conditioner,
        objective=Objective(Linear(), Epsilon(), Uniform(), Unweighted()),
        optimizer=lambda groups: tiny.Muon(groups, lr=5e-3, momentum=0.95, betas=(0.9, 0.98), weight_decay=0.0),
        max_steps=STEPS,
        warmup_steps=20,
        cooldown=0.4,
    )
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    order = torch.randperm(STEPS * BATCH, generator=torch.Generator().manual_seed(0)) % 4000
    images = torch.from_numpy(train.images)
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        batch = {
            "images": images[rows],
            "captions": [train.captions[k] for k in rows],
            "positions": torch.arange(step * BATCH, (step + 1) * BATCH),
        }
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


@torch.no_grad()
def losses(model: DiffusionModel, told: str = "") -> Tensor:
    """Loss of each of the seen test pictures; `told` names what is shuffled before the network hears it."""
    test = shapes.examples(0, "seen", range(TEST), resolution=8)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.from_numpy(test.images).float() / 127.5 - 1
    eps = torch.randn(x0.shape, generator=generator)
    u = (torch.arange(TEST) + 0.5) / TEST
    other = torch.randperm(TEST, generator=generator)
    captions = [test.captions[k] for k in other] if told == "captions" else test.captions
    conditioning = model.predictor.conditioner(captions)

    def network(x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        if told == "zero":
            return torch.zeros_like(x_t)
        return model.predictor.network(x_t, time[other] if told == "time" else time, conditioning)

    return model.objective.loss(model.objective.predict(network, conditioning), x0, eps, u)


def test_the_time_is_heard(trained):
    """A2: the noise predictor told the right time beats the one told another's by 10 % and more."""
    assert losses(trained).mean() < 0.9 * losses(trained, "time").mean()


def test_the_caption_is_heard(trained):
    """B1: matched captions beat shuffled ones by 5 % and more."""
    assert losses(trained).mean() < 0.95 * losses(trained, "captions").mean()


def test_it_is_far_better_than_any_multiple_of_the_noisy_picture(trained):
    """A4: at most half the error of the best c(t)·x_t, which knows the pictures' second moment; zero scores 1."""
    test = shapes.examples(0, "seen", range(TEST), resolution=8)
    moment = (torch.from_numpy(test.images).float() / 127.5 - 1).square().mean()
    t = trained.objective.time_sampling((torch.arange(TEST) + 0.5) / TEST, trained.objective.schedule)
    alpha, sigma = trained.objective.schedule.alpha(t), trained.objective.schedule.sigma(t)
    best_multiple = 1 - sigma**2 / (alpha**2 * moment + sigma**2)
    assert losses(trained, "zero").mean() == pytest.approx(1, abs=0.02)
    assert losses(trained).mean() < 0.5 * best_multiple.mean()
