"""What a trained noise predictor must have learned: models of 8 × 8 shapes, trained here for a minute or two each."""

import pytest
import torch
from torch import Tensor

from carrara.autoencoder.identity import Identity
from carrara.conditioner.base import Conditioner
from carrara.conditioner.text import Text, Unconditional
from carrara.data import shapes
from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import EDM, Epsilon
from carrara.diffusion.schedule import VarianceExploding
from carrara.diffusion.schedule_table import Linear
from carrara.diffusion.time_sampling import SingleLevel, Uniform
from carrara.diffusion.weighting import Noise, Unweighted
from carrara.model.diffusion import DiffusionModel
from carrara.network.conditioning import Conditioning
from tests import tiny

pytestmark = pytest.mark.slow
STEPS, BATCH, TEST = 500, 32, 512


def train(objective: Objective, conditioner: Conditioner, steps: int = STEPS) -> DiffusionModel:
    torch.manual_seed(0)
    examples = shapes.examples(0, "train", range(4000), resolution=8)
    if isinstance(conditioner, Text):
        conditioner.tokenizer.train_on(examples.captions)
    model = tiny.diffusion_model(
        Identity(),
        network=tiny.unet(channels=[64], attention=[True], context_width=64, pooled_width=64),
        conditioner=conditioner,
        objective=objective,
        optimizer=lambda groups: tiny.Muon(groups, lr=5e-3, momentum=0.95, betas=(0.9, 0.98), weight_decay=0.0),
        max_steps=steps,
        warmup_steps=20,
        cooldown=0.4,
    )
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    order = torch.randperm(steps * BATCH, generator=torch.Generator().manual_seed(0)) % 4000
    images = torch.from_numpy(examples.images)
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        batch = {
            "images": images[rows],
            "captions": [examples.captions[k] for k in rows],
            "positions": torch.arange(step * BATCH, (step + 1) * BATCH),
        }
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> DiffusionModel:
    conditioner = Text(vocab_size=512, max_length=48, width=64, depth=2, heads=2)
    return train(Objective(Linear(), Epsilon(), Uniform(), Unweighted()), conditioner)


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


@pytest.fixture(scope="module")
def pixels() -> tuple[Tensor, Tensor]:
    """Training and test pictures (N, 192) in [−1, 1], float64."""
    found = (
        shapes.examples(0, "train", range(4000), resolution=8),
        shapes.examples(0, "seen", range(TEST), resolution=8),
    )
    train, test = (torch.from_numpy(examples.images).double().flatten(1) / 127.5 - 1 for examples in found)
    return train, test


@pytest.mark.parametrize("times", [SingleLevel(0.5), Uniform()], ids=["denoising_autoencoder", "score_network"])
@torch.no_grad()
def test_it_denoises_better_than_any_linear_filter(times, pixels):
    """E2: pictures are not Gaussian. Wiener's is the best linear filter; it knows the pictures' covariance."""
    train_pixels, test_pixels = pixels
    sigma = 0.5
    noisy = test_pixels + sigma * torch.randn(test_pixels.shape, generator=torch.Generator().manual_seed(1)).double()
    mean, covariance = train_pixels.mean(0), torch.cov(train_pixels.T)
    gain = torch.linalg.solve(covariance + sigma**2 * torch.eye(len(mean)), covariance)
    wiener = (mean + (noisy - mean) @ gain - test_pixels).square().mean()

    schedule = VarianceExploding()
    with torch.enable_grad():
        model = train(Objective(schedule, EDM(0.5), times, Noise()), Unconditional(64), steps=300)
    predict = model.objective.predict(model.predictor.network, model.predictor.conditioner([""] * TEST))
    t = schedule.t_from_logsnr(-2 * torch.tensor(sigma).double().log())
    x0_hat = model.objective.denoiser(predict)(noisy.reshape(TEST, 3, 8, 8).float(), t)
    assert (x0_hat.double().flatten(1) - test_pixels).square().mean() < 0.9 * wiener


@torch.no_grad()
def test_the_score_is_that_of_the_noisy_density():
    """A10: denoising score matching finds the score of a mixture of Gaussians, known in closed form."""
    schedule, sigma = VarianceExploding(0.05, 5), 0.3
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])

    def draw(n: int) -> Tensor:
        return means[(torch.rand(n) < 0.7).long()] + 0.1 * torch.randn(n, 2)

    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(3, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU(), torch.nn.Linear(128, 2)
    )

    def network(x: Tensor, c_noise: Tensor, conditioning: None) -> Tensor:
        return layers(torch.cat([x, c_noise[:, None] / 1000], dim=1))

    objective = Objective(schedule, EDM(1.0), Uniform(), Noise())
    predict = objective.predict(network, None)
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(2000):
            x0 = draw(512)
            loss = objective.loss(predict, x0, torch.randn_like(x0), torch.rand(512)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x = (draw(2000) + sigma * torch.randn(2000, 2)).double()
    variance = 0.1**2 + sigma**2
    from_mean = means.double() - x[:, None]
    share = (torch.tensor([0.3, 0.7]).log() - from_mean.square().sum(-1) / (2 * variance)).softmax(-1)
    score = (share[..., None] * from_mean).sum(1) / variance
    t = schedule.t_from_logsnr(-2 * torch.tensor(sigma).double().log())
    learnt = (objective.denoiser(predict)(x.float(), t) - x.float()) / sigma**2
    assert torch.nn.functional.cosine_similarity(learnt.double().flatten(), score.flatten(), dim=0) > 0.95
