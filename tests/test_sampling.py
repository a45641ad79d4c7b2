import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.build import build_sampling
from carrara.callback.checkpoint_file import VerifiedCheckpointIO
from carrara.command.train_check import check_modules
from carrara.config import compose
from carrara.errors import UserError
from carrara.parts import needed_parts
from carrara.run_folder import save_config
from carrara.sampling import SAMPLING_KEYS, check_likelihood, load_weak, set_sampling
from tests.tiny import classifier_model, diffusion_model, kl

CONF = Path(__file__).parents[1] / "conf"
NOTHING: dict[str, Any] = dict.fromkeys(SAMPLING_KEYS)
PIXELS = diffusion_model().autoencoder


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return compose(
        CONF, "train", ["model=pixel_unet", "diffusion/schedule=linear", "diffusion/parameterization=v"]
    ).config


@pytest.fixture
def config(composed) -> dict[str, Any]:
    return deepcopy(composed)


def test_every_key_changes_what_it_names(config):
    order = NOTHING | {
        "sampler": "heun_churn", "spacing": "karras", "thresholding": "dynamic", "num_steps": 7, "guidance_scale": 4.0,
        "guidance_rescale": 0.5, "guidance_interval": [0.1, 0.8],
    }  # fmt: skip
    before = deepcopy(config)
    set_sampling(config, CONF, NOTHING)
    assert config == before
    set_sampling(config, CONF, order)
    sampling = build_sampling(config, PIXELS)
    assert type(sampling.sampler).__name__ == "Heun" and sampling.sampler.draws_noise
    assert sampling.num_steps == 7 and type(sampling.thresholding).__name__ == "Dynamic"
    assert (sampling.guidance.scale, sampling.guidance.rescale, sampling.guidance.interval) == (4, 0.5, (0.1, 0.8))
    assert not torch.allclose(sampling.times, torch.linspace(1, 0, 8).double())
    rest = {key: value for key, value in config.items() if key != "diffusion"}
    assert rest == {key: value for key, value in before.items() if key != "diffusion"}


def test_what_a_pipeline_has_is_set_there():
    """And nothing else of diffusion is known to a run without it."""
    config = {"name": "dalle", "pipeline": {"temperature": 1.0, "guidance_scale": 1.0}}
    set_sampling(config, CONF, NOTHING | {"temperature": 0.5, "guidance_scale": 3.0})
    assert config["pipeline"] == {"temperature": 0.5, "guidance_scale": 3.0}
    for value in ("abc", float("nan")):
        with pytest.raises(UserError, match="temperature must be a number, not"):
            set_sampling(config, CONF, NOTHING | {"temperature": value})
    with pytest.raises(UserError, match="dalle is not sampled with a sampler: leave it out"):
        set_sampling(config, CONF, NOTHING | {"sampler": "ddim"})


def test_unknown_options_and_runs_that_sample_nothing(config):
    with pytest.raises(UserError, match="sampler=huen is not known; did you mean heun"):
        set_sampling(config, CONF, NOTHING | {"sampler": "huen"})
    with pytest.raises(UserError, match="is not known"):
        set_sampling(config, CONF, NOTHING | {"sampler": "../schedule/flow"})
    with pytest.raises(UserError, match="spacing=x is not known; there are karras"):
        set_sampling(config, CONF, NOTHING | {"spacing": "x"})
    autoencoder = {"name": "autoencoder"}
    set_sampling(autoencoder, CONF, NOTHING)
    with pytest.raises(UserError, match="pixel_unet is not sampled with a temperature: leave it out"):
        set_sampling(config, CONF, NOTHING | {"temperature": 0.9})
    with pytest.raises(UserError, match="autoencoder samples nothing: leave num_steps out"):
        set_sampling(autoencoder, CONF, NOTHING | {"num_steps": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 1001}, "num_steps is 1001, but the schedule's table has 1000"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2.5}, "num_steps is 2.5"),
        ({"num_steps": "ten"}, "num_steps is ten"),
        ({"guidance_scale": "abc"}, 'scale of .*Guidance must be a number, not "abc"'),
        ({"guidance_interval": 0.5}, "interval of .*Guidance must be a list, not 0.5"),
        ({"guidance_rescale": 2}, "guidance.rescale"),
        ({"guidance_interval": [1, 0]}, "guidance.interval"),
    ],
)
def test_what_a_schedule_does_not_have_is_told(config, changes, message):
    set_sampling(config, CONF, NOTHING | changes)
    with pytest.raises(UserError, match=message):
        build_sampling(config, PIXELS)


def test_singular_spacings_and_bounds_on_latents_are_refused(config):
    set_sampling(config, CONF, NOTHING | {"thresholding": "static"})
    build_sampling(config, PIXELS)
    with pytest.raises(UserError, match="latents of an auto-encoder have no bounds"):
        build_sampling(config, kl())
    config["diffusion"]["schedule"] = {"_target_": "carrara.diffusion.schedule.Flow", "shift": 1.0}
    set_sampling(config, CONF, NOTHING | {"spacing": "logsnr"})
    with pytest.raises(UserError, match=r"diffusion.spacing: .*LogSNR.*Flow"):
        build_sampling(config, PIXELS)


# --- autoguidance ---


@pytest.mark.parametrize(
    ("steps", "message"), [(0, "num_steps is 0"), (1001, "table has 1000"), (2.5, "num_steps is 2.5")]
)
def test_impossible_likelihood_steps(config, steps, message):
    check_likelihood(config, diffusion_model(), 1000)
    with pytest.raises(UserError, match=f"likelihood_steps={steps}: .*{message}"):
        check_likelihood(config, diffusion_model(), steps)


@pytest.mark.parametrize("model", [classifier_model(["a", "b"]), diffusion_model(kl(downsampling=4))])
def test_likelihood_steps_are_of_diffusion_in_pixels(config, model):
    with pytest.raises(UserError, match="pixel_unet is no diffusion of pixels, which likelihood_steps is for: leave"):
        check_likelihood(config, model, 100)


def test_a_weak_model_where_nothing_is_guided(config, tmp_path):
    set_sampling(config, CONF, NOTHING | {"guidance_scale": 1})
    with pytest.raises(UserError, match="guides nothing"):
        load_weak("weak", config, tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match="is not guided"):
        load_weak("weak", {"name": "autoencoder"}, tmp_path, torch.device("cpu"))


def test_a_weak_model_that_is_not_there_or_damaged(config, tmp_path):
    with pytest.raises(UserError, match="no run nowhere"):
        load_weak("nowhere", config, tmp_path, torch.device("cpu"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step=00000001.ckpt"
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_weak(str(checkpoint), config, tmp_path, torch.device("cpu"))
    VerifiedCheckpointIO().save_checkpoint({"a": 1}, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_weak(str(checkpoint), config, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("diffusion", "schedule"),
            {"_target_": "carrara.diffusion.schedule.Cosine", "s": 0.008},
            "diffusion.schedule",
        ),
        (("diffusion", "parameterization"), {"_target_": "carrara.diffusion.parameterization.X0"}, "parameterization"),
        (("data", "resolution"), 16, "data.resolution"),
    ],
)
def test_a_weak_model_of_something_else_is_refused(config, tmp_path, monkeypatch, path, value, message):
    theirs = deepcopy(config)
    theirs[path[0]][path[1]] = value
    (tmp_path / "weak").mkdir()
    save_config(tmp_path / "weak", theirs)
    monkeypatch.setattr(
        "carrara.sampling.load_trained", lambda folder, checkpoint=None: (theirs, diffusion_model(), {})
    )
    with pytest.raises(UserError, match=f"weak=weak cannot guide this run: .*{message}"):
        load_weak("weak", config, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("name", ["dalle2", "imagen", "prior"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_weak_model_of_another_kind_is_refused(config, tmp_path, monkeypatch, name, ours):
    """Nor is DALL-E 2's decoder guided by a weak one, were it its own."""
    other = compose(CONF, "train", [f"model={name}"]).config
    mine, theirs = (other, config) if ours else (config, other)
    (tmp_path / "weak").mkdir()
    save_config(tmp_path / "weak", theirs)
    guide = diffusion_model()
    monkeypatch.setattr("carrara.sampling.load_trained", lambda folder, checkpoint=None: (theirs, guide, {}))
    with pytest.raises(UserError, match=rf"weak=weak trained {theirs['name']}, which cannot guide {mine['name']}"):
        load_weak("weak", mine, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model=autoencoder", "autoencoder=gumbel", "trainer.max_steps=200"], "autoencoder.anneal_steps=600 are more"),
        (["model=dalle", "autoencoder=gumbel", "size.autoencoder.max_steps=200"], "anneal_steps=600 are more than"),
        (["model=autoencoder", "model.adversarial_weight=0.1"], "model.adversarial_start=5000 is after the last of"),
        (["model=autoencoder", "autoencoder=gumbel"], None),
        (["model=autoencoder", "model.adversarial_weight=0.1", "trainer.max_steps=5001"], None),
    ],
)
def test_a_training_that_is_too_short_for_its_settings_is_told(overrides, told, caplog, monkeypatch):
    composed = compose(CONF, "train", [*overrides, "size=demo"])
    monkeypatch.setattr(logging.getLogger("carrara"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        check_modules(composed.config, needed_parts(CONF, composed, None))
    assert len(caplog.records) == (told is not None) and (told or "") in caplog.text


@pytest.mark.parametrize(
    ("schedule", "target", "thresholding", "doubtful"),
    [
        ("cosine", "epsilon", "unbounded", True),
        ("cosine_table", "score", "unbounded", True),
        ("cosine", "v", "unbounded", False),
        ("cosine", "epsilon", "static", False),
        ("linear", "epsilon", "unbounded", False),
        ("edm", "epsilon", "unbounded", False),
        ("flow", "flow", "unbounded", False),
    ],
)
def test_a_start_from_next_to_nothing_is_told(schedule, target, thresholding, doubtful, caplog, monkeypatch):
    """Measured: experiments/README.md, objectives."""
    parts = [f"schedule={schedule}", f"parameterization={target}", f"thresholding={thresholding}"]
    config = compose(CONF, "train", ["model=pixel_unet", *(f"diffusion/{part}" for part in parts)]).config
    monkeypatch.setattr(logging.getLogger("carrara"), "propagate", True)  # a command of an earlier test may have set it
    with caplog.at_level(logging.WARNING):
        check_modules(config, [])
    assert (f"{target} with the" in caplog.text and "expect noise" in caplog.text) == doubtful
    assert len(caplog.records) == doubtful
