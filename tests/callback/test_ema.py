import pytest
import torch

from carrara.callback.ema import EMA, trainable
from carrara.model.diffusion import DiffusionModel
from tests.tiny import batch, batches, diffusion_model, equal, kl, trainer, weights


class History(EMA):
    """An EMA that keeps the weights it was given after each micro-batch."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.seen: list[tuple[int, dict[str, torch.Tensor]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seen.append((trainer.global_step, {name: p.detach().clone() for name, p in trainable(pl_module)}))


def fitted(tmp_path, ema: EMA, steps: int = 4, model: DiffusionModel | None = None, **changes) -> DiffusionModel:
    model = model or diffusion_model()
    run = trainer(tmp_path, ema, max_steps=steps, **changes)
    run.fit(model, batches(steps * changes.get("accumulate_grad_batches", 1)))
    return model


@pytest.mark.parametrize("decay", [0.9, 0.3, 0.0])
def test_the_average_is_the_one_written_by_hand(tmp_path, decay):
    ema, model = History(decay), diffusion_model()
    wanted = {name: p.detach().clone() for name, p in trainable(model)}
    fitted(tmp_path, ema, 5, model)
    assert [step for step, _ in ema.seen] == [1, 2, 3, 4, 5]
    for step, seen in ema.seen:
        d = min(decay, (1 + step) / (10 + step))  # 2/11, 3/12, …: warm-up
        wanted = {name: d * wanted[name] + (1 - d) * seen[name] for name in wanted}
    assert ema.average.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ema.average[name], value, atol=1e-6, rtol=1e-5)
    if decay == 0:
        assert equal(ema.average, ema.seen[-1][1])


def test_accumulated_micro_batches_count_once(tmp_path):
    ema, model = History(0.9), diffusion_model()
    wanted = {name: p.detach().clone() for name, p in trainable(model)}
    fitted(tmp_path, ema, 2, model, accumulate_grad_batches=3)
    assert [step for step, _ in ema.seen] == [0, 0, 1, 1, 1, 2]
    for step, seen in (ema.seen[2], ema.seen[5]):
        d = min(0.9, (1 + step) / (10 + step))
        wanted = {name: d * wanted[name] + (1 - d) * seen[name] for name in wanted}
    for name, value in wanted.items():
        torch.testing.assert_close(ema.average[name], value, atol=1e-6, rtol=1e-5)


def test_applied_puts_the_average_in_and_the_weights_back(tmp_path):
    ema = EMA(0.9)
    model = fitted(tmp_path, ema)
    before = weights(model)
    with ema.applied(model):
        inside = weights(model)
        assert all(torch.equal(inside[name], value) for name, value in ema.average.items())
        assert not equal(inside, before)
    assert equal(weights(model), before)


def test_the_weights_come_back_after_a_failure(tmp_path):
    ema = EMA(0.9)
    model = fitted(tmp_path, ema)
    before = weights(model)
    with pytest.raises(ZeroDivisionError), ema.applied(model):
        raise ZeroDivisionError
    assert equal(weights(model), before)


def test_training_does_not_feel_the_average(tmp_path):
    torch.manual_seed(0)
    plain = diffusion_model()
    trainer(tmp_path, max_steps=3).fit(plain, batches(3))
    torch.manual_seed(0)
    assert equal(weights(fitted(tmp_path, EMA(0.5), 3)), weights(plain))


def test_frozen_weights_are_neither_averaged_nor_saved(tmp_path):
    ema = EMA(0.9)
    model = fitted(tmp_path, ema, 2, diffusion_model(kl(downsampling=4)))
    assert not any(name.startswith("autoencoder.") for name in ema.average)
    assert all(value.dtype == torch.float32 for value in ema.average.values())
    with ema.applied(model):
        assert model.loss(batch(range(2)))["loss"].isfinite()


def test_a_resumed_average_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    whole = EMA(0.9)
    fitted(tmp_path, whole, 4)
    torch.manual_seed(0)
    model = diffusion_model()
    first = EMA(0.9)
    run = trainer(tmp_path, first, max_steps=2)
    run.fit(model, batches(4))
    run.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert equal(saved["callbacks"]["EMA"]["average"], first.average)

    second = EMA(0.9)
    again = trainer(tmp_path, second, max_steps=4)
    again.fit(diffusion_model(), batches(4, start=2), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert again.global_step == 4 and second.step == 4
    assert equal(second.average, whole.average)
