from collections.abc import Iterator

import torch
from torch import Tensor

from carrara.callback.components import MeasureComponents
from tests.dalle2 import autoregressive_prior_model
from tests.tiny import batch, batches, trainer


def images() -> Iterator[Tensor]:
    yield from (batch(range(k, k + 8))["images"] for k in range(0, 32, 8))


def no_images() -> Iterator[Tensor]:
    raise AssertionError("they are known")


def test_components_are_measured_before_the_first_step_on_the_training_pictures(tmp_path):
    model, expected = autoregressive_prior_model(), autoregressive_prior_model()
    expected.clip.load_state_dict(model.clip.state_dict())
    rows = torch.cat(list(images())).float() / 127.5 - 1
    expected.network.tokens.measure(model.clip.image_directions(rows))
    model.network.tokens.components.zero_()
    trainer(tmp_path, MeasureComponents(images), max_steps=1).fit(model, batches(1))
    torch.testing.assert_close(model.network.tokens.state_dict(), expected.network.tokens.state_dict())


def test_a_resumed_run_keeps_the_components_of_its_checkpoint(tmp_path):
    model = autoregressive_prior_model()
    run = trainer(tmp_path, MeasureComponents(no_images), max_steps=1)
    run.fit(model, batches(1))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = autoregressive_prior_model(model.clip)
    again.network.tokens.components.zero_()
    resumed = trainer(tmp_path, MeasureComponents(no_images), max_steps=2)
    resumed.fit(again, batches(2, 1), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    torch.testing.assert_close(again.network.tokens.state_dict(), model.network.tokens.state_dict())
