import math
import unittest.mock

import pytest
import torch

from carrara.divergence import kl_to_uniform
from tests.tiny import autoencoder_model, batch, batches, gumbel, trainer


def images(count: int = 3) -> torch.Tensor:
    return batch(range(count))["images"].float() / 127.5 - 1


def noise_for(autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(pictures), *autoencoder.noise_shape(*pictures.shape[2:]))


def codes_seen(autoencoder, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the decoder is given in a training pass."""
    with unittest.mock.patch.object(autoencoder, "decoded", wraps=autoencoder.decoded) as decoded:
        autoencoder.training_pass(pictures, noise)
    return decoded.call_args.args[0]


def test_the_penalty_is_the_weighted_kl_a_token():
    autoencoder, pictures = gumbel(kl_weight=0.5), images()
    _, penalty, logged = autoencoder.training_pass(pictures, noise_for(autoencoder, pictures))
    logits = autoencoder.logits(autoencoder.posterior(pictures)[0])
    torch.testing.assert_close(logged, {"kl": kl_to_uniform(logits, 1).mean()})
    torch.testing.assert_close(penalty, 0.5 * logged["kl"])
    assert logged.keys() == set(autoencoder.logged)


@torch.no_grad()
def test_at_a_low_temperature_the_codes_come_as_often_as_they_are_likely():
    torch.manual_seed(0)
    autoencoder = gumbel(num_codes=4, temperature=0.01)
    autoencoder.step.fill_(10)
    autoencoder.embedding.weight.copy_(torch.eye(4))  # the decoder is given the weights themselves
    autoencoder.logits.weight.mul_(3)
    one = images(1)
    weights = codes_seen(autoencoder, one.expand(4000, -1, -1, -1), torch.randn(4000, 4, 2, 2))
    share = autoencoder.logits(autoencoder.posterior(one)[0]).softmax(1)
    assert (weights.amax(1) > 0.99).float().mean() > 0.95
    torch.testing.assert_close(weights.mean(0), share[0], atol=0.03, rtol=0)
    assert share.amax() - share.amin() > 0.2


def test_at_a_temperature_the_weights_are_the_relaxation():
    """softmax((log q + g) / τ), Jang et al. 2017, eq. 2, place by place."""
    autoencoder, pictures = gumbel(), images(1)
    autoencoder.step.fill_(5)
    noise = noise_for(autoencoder, pictures)
    seen = codes_seen(autoencoder, pictures, noise)[0, :, 1, 0]
    tau = 0.1 + 0.9 * 0.5  # halfway
    log_q = autoencoder.logits(autoencoder.posterior(pictures)[0])[0, :, 1, 0].log_softmax(0).double()
    u = torch.distributions.Normal(0.0, 1.0).cdf(noise[0, :, 1, 0].double())
    y = ((log_q - (-u.log()).log()) / tau).exp()
    torch.testing.assert_close(seen, ((y / y.sum()) @ autoencoder.codes.double()).float(), rtol=1e-4, atol=1e-5)


def test_outside_training_it_is_the_likeliest_code():
    autoencoder, pictures = gumbel().eval(), images()
    seen = codes_seen(autoencoder, pictures, noise_for(autoencoder, pictures))
    assert torch.equal(seen, autoencoder.latents_of(autoencoder.tokens(pictures), 2, 2))
    logits = autoencoder.logits(autoencoder.posterior(pictures)[0])
    for k, row in enumerate(autoencoder.tokens(pictures).view(3, 2, 2)):
        for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert logits[k, :, place[0], place[1]].argmax() == row[place]


def test_the_temperature_falls_by_optimizer_steps(tmp_path):
    autoencoder = gumbel(temperature=0.1, anneal_steps=4)
    model = autoencoder_model(autoencoder=autoencoder)
    seen = [float(autoencoder.temperature)]
    model.on_train_batch_end = lambda *_: seen.append(float(autoencoder.temperature))  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=3, accumulate_grad_batches=2).fit(model, batches(6))
    wanted = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert seen == pytest.approx([wanted[k] for k in (0, 0, 1, 1, 2, 2, 3)])
    autoencoder.step.fill_(99)
    assert float(autoencoder.temperature) == pytest.approx(0.1)


def test_the_temperature_goes_on_in_a_resumed_run():
    autoencoder, other = gumbel(), gumbel()
    for _ in range(3):
        autoencoder.after_step()
    other.load_state_dict(autoencoder.state_dict())
    assert float(other.temperature) == float(autoencoder.temperature) < 1


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"temperature": 2.0}, {"anneal_steps": 0}])
def test_a_senseless_temperature_is_refused(change):
    (key,) = change
    with pytest.raises(ValueError, match=rf"autoencoder\.{key}={change[key]}"):
        gumbel(**change)


def test_gradients_reach_encoder_codes_and_logits():
    autoencoder, pictures = gumbel(), images()
    reconstruction, penalty, _ = autoencoder.training_pass(pictures, noise_for(autoencoder, pictures))
    (reconstruction.square().mean() + penalty).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in autoencoder.named_parameters() if "weight" in name)
