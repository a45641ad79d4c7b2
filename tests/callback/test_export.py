import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from carrara.autoencoder.kl import KL
from carrara.callback.checkpoint import Checkpoints, retention
from carrara.callback.checkpoint_file import VerifiedCheckpointIO, newest_valid
from carrara.callback.ema import EMA
from carrara.callback.evaluation import Evaluation
from carrara.callback.export import Export
from carrara.callback.log import JsonLines
from carrara.component import load_component
from tests.tiny import Validation, autoencoder_model, batches, trainer, weights

NODE = {
    "_target_": "carrara.autoencoder.kl.KL",
    "latent_channels": 4,
    "downsampling": 4,
    "channels": [8, 16],
    "num_blocks": 1,
    "patch": 2,
    "kl_weight": 1e-6,
}


def train(folder, model, *others: Callback, max_steps: int = 3, resume=None, score=lambda *_: {"val/psnr": 20.0}):
    ema = EMA(0.9)
    log = JsonLines(folder / "metrics.jsonl", 4, 10)
    evaluation = Evaluation([score], Validation(4), 10, ema, folder / "samples", log)  # type: ignore[arg-type]
    card = {"fingerprint": "abc", "data": {"name": "noise", "fingerprint": "def"}}
    export = Export(
        folder,
        NODE,
        lambda: (one["images"] for one in batches(5)),
        ema,
        evaluation,
        card,
        lambda scores: {"scores": scores, "hash": "123"},
    )
    checkpoints = Checkpoints(folder / "checkpoints", 1e9, 2, retention(2, None, 0, dict), 4, ema)
    callbacks = [ema, checkpoints, evaluation, *others, export]
    run = trainer(folder, *callbacks, max_steps=max_steps, logger=[log], plugins=[VerifiedCheckpointIO()])
    run.fit(model, batches(3), ckpt_path=resume, weights_only=True)
    return ema


def test_the_averaged_part_is_exported_with_its_scores(tmp_path):
    model = autoencoder_model()
    ema = train(tmp_path, model)
    part, card = load_component(tmp_path / "component", "autoencoder")
    for name, value in part.named_parameters():
        assert torch.equal(value, ema.average[f"autoencoder.{name}"])
    assert not torch.equal(
        part.get_parameter("quant_conv.weight"), model.autoencoder.get_parameter("quant_conv.weight")
    )
    assert card["scores"] == {"val/psnr": 20.0} and card["fingerprint"] == "abc" and card["steps"] == 3
    assert card["data"] == {"name": "noise", "fingerprint": "def"}
    assert json.loads((tmp_path / "scores.json").read_text()) == {"scores": {"val/psnr": 20.0}, "hash": "123"}


def test_latents_are_measured_with_the_averaged_weights(tmp_path):
    train(tmp_path, autoencoder_model())
    part, _ = load_component(tmp_path / "component", "autoencoder")
    assert isinstance(part, KL)
    images = torch.cat([one["images"] for one in batches(5)]).float() / 127.5 - 1
    with torch.no_grad():
        mean, logvar = part.posterior(images)
    std = (mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(part.latent_mean, mean.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(part.latent_std, std, atol=1e-4, rtol=1e-3)


def test_a_model_writes_more_into_its_component(tmp_path, monkeypatch):
    model = autoencoder_model()
    monkeypatch.setattr(model, "write_exported", lambda folder: (folder / "more").write_text("of the model"))
    train(tmp_path, model)
    assert (tmp_path / "component" / "more").read_text() == "of the model"


class Stop(Callback):
    def __init__(self, hook: str, step: int) -> None:
        def stop(trainer, *_):
            if trainer.global_step == step:
                raise KeyboardInterrupt

        setattr(self, hook, stop)


def test_an_unfinished_run_exports_nothing(tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tmp_path, autoencoder_model(), Stop("on_train_batch_end", 2))
    assert not (tmp_path / "component").exists() and not (tmp_path / "scores.json").exists()


def test_a_run_killed_while_it_exported_is_finished_when_it_is_resumed(tmp_path):
    """Its last checkpoint is of the last step: there is nothing left to train."""
    model = autoencoder_model()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tmp_path, model, Stop("on_train_end", 3))
    assert not (tmp_path / "component").exists()
    checkpoint = newest_valid(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step=00000003.ckpt"
    ema = train(tmp_path, autoencoder_model(), resume=checkpoint, score=lambda *_: pytest.fail("was scored already"))
    part, card = load_component(tmp_path / "component", "autoencoder")
    assert card["scores"] == {"val/psnr": 20.0} and card["steps"] == 3
    for name, value in part.named_parameters():
        assert torch.equal(value, ema.average[f"autoencoder.{name}"])


def test_exporting_leaves_the_weights_in_training_alone(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append({k: v for k, v in weights(pl_module).items() if "latent_" not in k})

    model = autoencoder_model()
    train(tmp_path, model, Look())
    after = {k: v for k, v in weights(model).items() if "latent_" not in k}
    assert all(torch.equal(seen[0][k], v) for k, v in after.items())
