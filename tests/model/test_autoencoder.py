import pytest
import torch
import torch.nn.functional as F

from carrara.autoencoder.identity import Identity
from carrara.divergence import kl_to_standard_normal
from tests.tiny import SGD, autoencoder_model, batch, batches, equal, gumbel, kl, trainer, vq, weights


def pictures(positions: range, resolution: int = 8) -> torch.Tensor:
    return batch(positions, resolution)["images"].float() / 127.5 - 1


def test_the_loss_is_reconstruction_and_kl():
    model, one = autoencoder_model(autoencoder=kl(kl_weight=0.5)), batch(range(3))
    losses = model.loss(one)
    mean, logvar = model.autoencoder.posterior(model.images(one))
    noise = model.normal(one, "posterior", tuple(mean.shape[1:]))
    reconstruction = model.autoencoder.decode_raw(mean + (logvar / 2).exp() * noise)
    torch.testing.assert_close(losses["reconstruction"], F.mse_loss(reconstruction, model.images(one)))
    torch.testing.assert_close(losses["kl"], kl_to_standard_normal(mean, logvar).mean() / mean[0].numel())
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + 0.5 * losses["kl"])


@pytest.mark.parametrize(("kind", "name"), [(vq, "commitment"), (gumbel, "kl")])
def test_the_penalty_is_the_auto_encoders_own(kind, name):
    model, one = autoencoder_model(autoencoder=kind()), batch(range(3))
    assert model.loss_names == ("loss", "reconstruction", name)
    losses = model.loss(one)
    noise = model.normal(one, "posterior", model.autoencoder.noise_shape(8, 8))
    reconstruction, penalty, logged = model.autoencoder.training_pass(model.images(one), noise)
    torch.testing.assert_close(losses["reconstruction"], F.mse_loss(reconstruction, model.images(one)))
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + penalty)
    torch.testing.assert_close(losses[name], logged[name])
    assert penalty > 0


def test_pixels_are_not_trained():
    with pytest.raises(ValueError, match="autoencoder: Identity has nothing to train"):
        autoencoder_model(autoencoder=Identity())


def test_the_posterior_noise_belongs_to_the_sample():
    model = autoencoder_model()
    wide = [float(model.loss(batch([k]))["reconstruction"].detach()) for k in (4, 9)]
    assert model.loss(batch([4, 9]))["reconstruction"].item() == pytest.approx(sum(wide) / 2, rel=1e-5)
    other = batch([4])
    other["positions"] += 1
    assert model.loss(other)["reconstruction"].item() != wide[0]


def test_captions_are_not_read(tmp_path):
    """Shards without captions give the identical loss trace."""
    traces = []
    for captioned in (True, False):
        torch.manual_seed(0)
        model = autoencoder_model()
        trace: list[dict[str, float]] = []
        stream = batches(4)
        if not captioned:
            for one in stream:
                one["captions"] = [""] * len(one["captions"])

        step = model.training_step

        def record(one, index, trace=trace, step=step):
            outputs = step(one, index)
            trace.append({name: value.item() for name, value in outputs.items()})
            return outputs

        model.training_step = record  # type: ignore[method-assign]
        trainer(tmp_path, max_steps=4).fit(model, stream)
        traces.append(trace)
    assert len(traces[0]) == 4 and traces[0] == traces[1]


def test_latents_are_normalised_once_it_is_finished():
    model = autoencoder_model(autoencoder=kl(downsampling=4, channels=[8, 16], patch=2))
    gains = torch.tensor([9.0, 3, 1, 5, 1, 1, 1, 1])[:, None, None, None]
    with torch.no_grad():  # channels of different scales and posteriors of different widths
        model.autoencoder.get_parameter("quant_conv.weight").mul_(gains)
        model.autoencoder.get_parameter("quant_conv.bias").copy_(torch.tensor([3.0, -2, 0, 1, -6, -3, 0, 1]))
    model.finish(pictures(range(64 * k, 64 * (k + 1)), 32) for k in range(2))
    fresh = pictures(range(1000, 1128), 32)
    with torch.no_grad():
        noise = torch.randn(len(fresh), 4, 8, 8)
        z = model.autoencoder.encode(fresh, noise)
    assert z.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=0.05)
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=0.1)
    means = model.autoencoder.encode(fresh).std((0, 2, 3))
    assert means[0].item() == pytest.approx(1, abs=0.05)  # a narrow posterior: its mean alone has unit std, too
    assert means[3] < 0.95  # a wide one: only its samples do


def test_finish_weighs_pictures_and_not_batches():
    model, images = autoencoder_model(), pictures(range(10))
    model.finish([images])
    whole = model.autoencoder.latent_mean.clone(), model.autoencoder.latent_std.clone()
    model.finish([images[:7], images[7:]])
    torch.testing.assert_close(model.autoencoder.latent_mean, whole[0])
    torch.testing.assert_close(model.autoencoder.latent_std, whole[1])


# --- the adversary ---


def adversarial(start: int = 0, weight: float = 0.5):
    return autoencoder_model(adversarial_weight=weight, adversarial_start=start, optimizer=SGD)


def gradients(module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_validation_leaves_the_discriminator_out():
    torch.manual_seed(0)
    model = autoencoder_model(adversarial_weight=0.1)
    losses = model.loss(batch(range(2)), torch.zeros(2))
    assert losses.keys() == set(model.loss_names) == {"loss", "reconstruction", "kl"}
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + 1e-3 * losses["kl"])


def test_without_weight_there_is_no_discriminator():
    assert autoencoder_model().discriminator is None


def test_hinge_losses_are_those_of_the_paper():
    model, one = adversarial(), batch(range(2), 16)
    losses = model.loss(one)
    assert losses.keys() == {*model.loss_names, "generator", "discriminator"}
    assert model.discriminator is not None
    mean, logvar = model.autoencoder.posterior(model.images(one))
    noise = model.normal(one, "posterior", tuple(mean.shape[1:]))
    fake = model.autoencoder.decode_raw(mean + (logvar / 2).exp() * noise)
    on_real, on_fake = model.discriminator(model.images(one)), model.discriminator(fake)
    wanted = 0.5 * ((1 - on_real).clamp_min(0).mean() + (1 + on_fake).clamp_min(0).mean())
    torch.testing.assert_close(losses["discriminator"], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["generator"], -on_fake.mean(), atol=1e-5, rtol=1e-5)


def test_the_players_do_not_train_each_other():
    model, one = adversarial(), batch(range(2), 16)
    assert model.discriminator is not None
    model.loss(one)["generator"].backward()
    assert not any(g.any() for g in gradients(model.discriminator))
    assert any(g.any() for g in gradients(model.autoencoder))
    model.zero_grad()
    model.loss(one)["discriminator"].backward()
    assert any(g.any() for g in gradients(model.discriminator))
    assert not any(g.any() for g in gradients(model.autoencoder))


def test_before_its_start_the_auto_encoder_does_not_feel_the_adversary():
    torch.manual_seed(0)
    plain, one = autoencoder_model(optimizer=SGD), batch(range(2), 16)
    plain.loss(one)["loss"].backward()
    for start, same in ((1, True), (0, False)):  # step 0 is the first
        torch.manual_seed(0)
        model = adversarial(start)
        model.autoencoder.load_state_dict(plain.autoencoder.state_dict())
        model.loss(one)["loss"].backward()
        pairs = zip(gradients(model.autoencoder), gradients(plain.autoencoder), strict=True)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in pairs) is same
        assert model.discriminator is not None and any(g.any() for g in gradients(model.discriminator))


def test_a_batch_is_one_step_of_both_players(tmp_path):
    model = adversarial(start=2)
    assert model.discriminator is not None
    stream = batches(4, resolution=16)
    before = weights(model.discriminator)
    seen = []
    model.on_train_batch_end = lambda *_: seen.append(model.global_step)
    run = trainer(tmp_path, max_steps=4, gradient_clip_val=1.0)
    run.fit(model, stream)
    assert run.global_step == 4 and seen == [1, 2, 3, 4]
    assert not equal(weights(model.discriminator), before)


def test_two_micro_batches_are_one_step(tmp_path):
    run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=2)
    stream = batches(6, resolution=16)
    run.fit(adversarial(), stream)
    assert run.global_step == 2 and run.fit_loop.epoch_loop.batch_progress.total.completed == 4
