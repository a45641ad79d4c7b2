"""What all LightningModules promise: frozen parts, keyed randomness, the learning rate."""

import pytest
import torch

from carrara.model.base import Model
from tests.tiny import (
    autoencoder_model,
    autoregressive_model,
    batch,
    batches,
    diffusion_model,
    equal,
    evaluator_model,
    flow_model,
    kl,
    text,
    trainer,
    weights,
)


def with_frozen_parts() -> Model:
    """Latent diffusion with a frozen auto-encoder and, deeper inside, a frozen text encoder."""
    conditioner = text().requires_grad_(False)
    return diffusion_model(kl(downsampling=4), conditioner=conditioner)


def is_frozen(name: str) -> bool:
    return name.startswith(("autoencoder.", "predictor.conditioner."))


@pytest.mark.parametrize("make", [diffusion_model, flow_model, autoregressive_model])
@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("warmup_steps", -1, "be 0 or more"),
        ("cooldown", 1.5, "lie between 0 and 1"),
        ("caption_dropout", 10, "lie between 0 and 1"),
        ("caption_dropout", -0.1, "lie between 0 and 1"),
    ],
)
def test_a_share_is_one(make, key, wrong, message):
    with pytest.raises(ValueError, match=rf"model\.{key}={wrong} must {message}"):
        make(**{key: wrong})


def test_frozen_parts_stay_as_they_are_bit_for_bit(tmp_path):
    model = with_frozen_parts()
    before = weights(model)
    trainer(tmp_path, max_steps=3).fit(model, batches(3))
    after = weights(model)
    frozen = [name for name in before if is_frozen(name)]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert frozen and trained and not set(frozen) & set(trained)
    assert equal(before, after, frozen)
    assert sum(not torch.equal(before[name], after[name]) for name in trained) > len(trained) / 2


def test_frozen_parts_are_never_in_training_mode(tmp_path):
    model = with_frozen_parts()
    model.train()
    for name, module in model.named_modules():
        assert module.training is not is_frozen(f"{name}."), name
    model.eval()
    assert not any(module.training for module in model.modules())


def test_checkpoints_hold_no_frozen_part_and_load(tmp_path):
    model = with_frozen_parts()
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, batches(2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if is_frozen(key)]
    assert {key for key in weights(model) if not is_frozen(key)} == set(saved["state_dict"])

    fresh = with_frozen_parts()
    frozen = {key: value for key, value in weights(fresh).items() if is_frozen(key)}
    trainer(tmp_path, max_steps=2).fit(fresh, batches(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    state = weights(fresh)
    assert equal(state, {**weights(model), **frozen})  # what was trained comes back, what is frozen is its own


def test_the_vocabulary_is_in_the_checkpoint(tmp_path):
    model = diffusion_model()
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, batches(1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "predictor.conditioner.tokenizer._extra_state" in saved["state_dict"]


def test_images_are_scaled_to_one():
    model, one = evaluator_model(), batch([0])
    one["images"] = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert model.images(one).flatten().tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("make", [autoencoder_model, diffusion_model, evaluator_model])
def test_the_losses_are_those_that_were_named(make):
    model = make()
    losses = model.loss(batch(range(4)))
    assert tuple(losses) == model.loss_names
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    assert all(isinstance(module, torch.nn.Module) for module in model.hot)


def test_the_learning_rate_follows_its_schedule_by_optimizer_step(tmp_path):
    seen = []

    class Watching(type(diffusion_model())):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer):
            seen.append(optimizer.param_groups[0]["lr"] / 1e-3)

    template = diffusion_model(warmup_steps=1, cooldown=0.5, max_steps=4)
    template.__class__ = Watching
    trainer(tmp_path, max_steps=4, accumulate_grad_batches=2).fit(template, batches(8))
    assert seen == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_two_runs_are_the_same_and_another_seed_is_not(tmp_path):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = diffusion_model(seed=seed)
        trainer(tmp_path, max_steps=2).fit(model, batches(2))
        states.append(weights(model))
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])
