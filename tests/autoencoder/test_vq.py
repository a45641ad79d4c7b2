import unittest.mock
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from carrara.data import shapes
from carrara.model.optimizer import Muon
from tests.tiny import SGD, autoencoder_model, batch, batches, trainer, vq


def images() -> torch.Tensor:
    return batch(range(3))["images"].float() / 127.5 - 1


def noise_for(autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(pictures), *autoencoder.noise_shape(*pictures.shape[2:]))


def test_the_loss_is_that_of_the_quantised_latents():
    autoencoder, pictures = vq(commitment_weight=0.25), images()
    reconstruction, penalty, logged = autoencoder.training_pass(pictures, noise_for(autoencoder, pictures))
    z = autoencoder.posterior(pictures)[0]
    code = autoencoder.latents_of(autoencoder.tokens(pictures), 2, 2)
    torch.testing.assert_close(reconstruction, autoencoder.decoded(code))
    torch.testing.assert_close(logged, {"commitment": (z - code).square().mean()})
    torch.testing.assert_close(penalty, 0.25 * logged["commitment"])
    assert logged.keys() == set(autoencoder.logged)


def test_the_gradient_passes_straight_through():
    """The encoder gets the gradient that the decoder has at the code, and none through the choice."""
    autoencoder, pictures = vq(commitment_weight=0.0), images()
    autoencoder.training_pass(pictures, noise_for(autoencoder, pictures))[0].square().mean().backward()
    found = {name: p.grad for name, p in autoencoder.named_parameters() if p.grad is not None}
    autoencoder.zero_grad()
    code = autoencoder.latents_of(autoencoder.tokens(pictures), 2, 2).clone().requires_grad_()
    autoencoder.decoded(code).square().mean().backward()
    assert code.grad is not None and code.grad.any()
    autoencoder.posterior(pictures)[0].backward(code.grad)
    assert found.keys() == {name for name, _ in autoencoder.named_parameters()}
    for name, p in autoencoder.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_commitment_pulls_latents_to_their_codes():
    autoencoder, pictures = vq(), images()
    z = autoencoder.posterior(pictures)[0].detach().requires_grad_()
    with unittest.mock.patch.object(autoencoder, "posterior", return_value=(z, None)):
        _, _, logged = autoencoder.training_pass(pictures, noise_for(autoencoder, pictures))
    logged["commitment"].backward()
    code = autoencoder.quantised(autoencoder.assign(z))
    torch.testing.assert_close(z.grad, 2 * (z.detach() - code) / z.numel())


def test_only_training_moves_the_codebook():
    autoencoder, pictures = vq(), images()
    before = autoencoder.codes.clone()
    autoencoder.eval().training_pass(pictures, noise_for(autoencoder, pictures))
    autoencoder.after_step()
    assert torch.equal(autoencoder.codes, before)
    autoencoder.train().training_pass(pictures, noise_for(autoencoder, pictures))
    assert torch.equal(autoencoder.codes, before)  # not before the step
    autoencoder.after_step()
    assert not torch.equal(autoencoder.codes, before)


def test_micro_batches_move_it_once_a_step(tmp_path):
    """As one batch would, at equal weights."""
    still = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}
    ends = []
    for size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = autoencoder_model(autoencoder=vq(), **still)
        run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=accumulate)
        run.fit(model, batches(2 * accumulate, size=size))
        ends.append(model.autoencoder.state_dict())
    torch.testing.assert_close(dict(ends[0]), dict(ends[1]), rtol=1e-4, atol=1e-5)
    assert ends[0]["codebook.counts"].sum() > 0


def test_a_batch_that_is_not_finite_leaves_the_codebook():
    autoencoder = vq()
    model = autoencoder_model(autoencoder=autoencoder, optimizer=SGD)
    model.loss(batch(range(4)))
    autoencoder.after_step()
    before = autoencoder.codes.clone()
    bad = batch(range(4, 8))
    bad["images"] = bad["images"].float()
    bad["images"][2] = torch.nan
    assert model.loss(bad)["loss"].isnan()
    autoencoder.after_step()
    assert torch.equal(autoencoder.codes, before)


def test_restarts_are_keyed():
    """The same stream gives the same codebook whatever else was drawn."""
    books: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        autoencoder = vq(restart_below=0.5)
        model = autoencoder_model(autoencoder=autoencoder, seed=seed)
        torch.manual_seed(len(books))
        for start in (0, 4):
            model.loss(batch(range(start, start + 4)))
            model.autoencoder.after_step()
        books.append(autoencoder.codes)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_a_resumed_codebook_goes_on_bit_for_bit():
    torch.manual_seed(0)
    model = autoencoder_model(autoencoder=vq(restart_below=0.5))
    for start in (0, 4):
        model.loss(batch(range(start, start + 4)))
        model.autoencoder.after_step()
    other = autoencoder_model(autoencoder=vq(restart_below=0.5))
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        each.loss(batch(range(8, 12)))
        each.autoencoder.after_step()
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_latents_are_normalised_as_they_are_encoded():
    model = autoencoder_model(autoencoder=vq())
    with torch.no_grad():
        model.autoencoder.get_parameter("quant_conv.weight").mul_(5.0)
    pictures = batch(range(200))["images"].float() / 127.5 - 1
    model.finish([pictures])
    z = model.autoencoder.encode(pictures)
    assert z.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 4, abs=1e-3)
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-3)


def test_training_reconstructs_and_uses_the_codes(tmp_path):
    """Of pictures in one of eight colours each colour gets its code."""
    torch.manual_seed(0)
    colours = torch.tensor([[255 * ((k >> c) & 1) for c in range(3)] for k in range(8)], dtype=torch.uint8)
    stream = batches(120, size=16)
    for one in stream:
        one["images"] = colours[one["positions"] * 7 % 8][:, :, None, None].expand(-1, 3, 8, 8).contiguous()
    optimizer = partial(Muon, lr=5e-3, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.0)
    autoencoder = vq()
    model = autoencoder_model(autoencoder=autoencoder, optimizer=optimizer, max_steps=120, cooldown=0.5)
    trainer(tmp_path, max_steps=120).fit(model, stream)
    model.eval()
    pictures = colours[:, :, None, None].expand(-1, 3, 8, 8).float() / 127.5 - 1
    tokens = autoencoder.tokens(pictures)
    assert len({tuple(row) for row in tokens.tolist()}) == 8
    back = autoencoder.decode_tokens(tokens, 8, 8)
    assert F.mse_loss(back, pictures) < 0.2  # 1 without a picture


@pytest.mark.slow
def test_on_shapes_most_codes_are_used():
    """More than half of them, and few without restarts."""
    pictures = torch.from_numpy(shapes.examples(0, "train", range(3200), resolution=16).images)
    fresh = torch.from_numpy(shapes.examples(0, "held_out", range(200), resolution=16).images)
    use = {}
    for restart_below in (0.03, 0.0):
        torch.manual_seed(0)
        autoencoder = vq(num_codes=128, channels=[32, 64], decay=0.97, restart_below=restart_below)
        optimizer = partial(Muon, lr=4e-3, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.0)
        model = autoencoder_model(autoencoder=autoencoder, optimizer=optimizer, max_steps=200, cooldown=0.4)
        step = model.configure_optimizers()["optimizer"]
        for start in range(0, len(pictures), 16):
            step.zero_grad()
            one = {"images": pictures[start : start + 16], "positions": torch.arange(start, start + 16)}
            model.loss(one)["loss"].backward()
            model.on_before_optimizer_step(step)
            step.step()
        with torch.no_grad():
            tokens = autoencoder.eval().tokens(fresh.float() / 127.5 - 1)
        use[restart_below] = len(tokens.unique()) / 128
    assert use[0.03] > 0.5 > 0.25 > use[0.0]
