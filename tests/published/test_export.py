"""What we export is opened by `diffusers` and makes the same pictures."""

import json
import os
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from carrara.autoencoder.identity import Identity
from carrara.autoencoder.kl import KL
from carrara.build import build_objective
from carrara.component import save_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import build
from carrara.diffusion.guidance import Guidance
from carrara.diffusion.sampler import Ancestral
from carrara.errors import UserError
from carrara.pipeline.denoising import Sampling
from carrara.pipeline.text_to_image import TextToImage
from carrara.published.export import export_pipeline
from tests import tiny
from tests.published.pipelines import LENGTH, WIDTH, lively, start, text_encoder, tokenizer

CAPTIONS = ["a red disc above a blue square", "stone"]
CONFIG: dict[str, Any] = {
    "data": {"resolution": 16},
    "network": {
        "_target_": "carrara.network.unet.UNet",
        "in_channels": 4,
        "resolution": 8,
        "channels": [64, 128],
        "attention": [True, False],
        "num_blocks": 1,
        "depth": 1,
        "heads": [4, 8],
        "expansion": 4,
        "context_width": WIDTH,
        "pooled_width": 0,
        "qk_norm": False,
        "learned_positions": False,
    },
    "autoencoder": {
        "_target_": "carrara.autoencoder.kl.KL",
        "latent_channels": 4,
        "downsampling": 2,
        "channels": [64, 64],
        "num_blocks": 1,
        "patch": 1,
        "kl_weight": 1e-6,
    },
    "diffusion": {
        "schedule": {
            "_target_": "carrara.diffusion.schedule_table.ScaledLinear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_steps": 1000,
        },
        "parameterization": {"_target_": "carrara.diffusion.parameterization.Epsilon"},
        "time_sampling": {"_target_": "carrara.diffusion.time_sampling.Uniform"},
        "weighting": {"_target_": "carrara.diffusion.weighting.Unweighted"},
    },
}
ZERO = {
    "schedule": {
        "_target_": "carrara.diffusion.schedule_table.ZeroTerminalSNR",
        "table": CONFIG["diffusion"]["schedule"],
    },
    "parameterization": {"_target_": "carrara.diffusion.parameterization.V"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Pretrained, KL]:
    """Network, conditioner and auto-encoder, with statistics far from 0 and 1."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    text_encoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    network, autoencoder = lively(tiny.awake(build(CONFIG["network"]))), build(CONFIG["autoencoder"])
    assert isinstance(autoencoder, KL)
    lively(autoencoder)
    autoencoder.set_statistics(torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.tensor([0.3, 2.0, 1.5, 3.0]))
    return network.eval(), Pretrained(str(folder), WIDTH, LENGTH, "max_length"), autoencoder.eval()


def changed(**nodes: dict[str, Any]) -> dict[str, Any]:
    return CONFIG | {name: CONFIG[name] | node for name, node in nodes.items()}


@pytest.mark.parametrize(("scale", "num_steps"), [(1.0, 8), (7.5, 8), (7.5, 30)])
@pytest.mark.parametrize("diffusion", [{}, ZERO], ids=["epsilon", "v, zero terminal SNR"])
def test_the_same_noise_becomes_the_same_picture(parts, tmp_path, scale, num_steps, diffusion):
    config = changed(diffusion=diffusion)
    network, conditioner, autoencoder = parts
    export_pipeline(tmp_path / "exported", config, *parts)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DPMSolverMultistepScheduler) and theirs.tokenizer.model_max_length == LENGTH
    objective = build_objective(config)
    model = tiny.diffusion_model(autoencoder, network=network, conditioner=conditioner, objective=objective)
    sampling = Sampling(Ancestral(eta=0.0), objective.schedule.times(num_steps), Guidance(scale))
    pipeline = TextToImage(model.eval(), 16, sampling)
    ours = pipeline(CAPTIONS, range(2), 0)
    noise = start(pipeline, CAPTIONS)
    how = {"num_inference_steps": num_steps, "guidance_scale": scale, "latents": noise, "output_type": "pt"}
    pictures = theirs(CAPTIONS, **how).images
    assert pictures.std() > 0.05  # not all at the clamps
    assert (pictures * 2 - 1 - ours).abs().max() < 1e-3


@torch.no_grad()
def test_its_text_encoder_is_read_by_us_again(parts, tmp_path):
    export_pipeline(tmp_path / "exported", CONFIG, *parts)
    expected = parts[1](CAPTIONS)
    for folder in (tmp_path / "exported", tmp_path / "exported" / "text_encoder"):
        found = Pretrained(str(folder), WIDTH, LENGTH, "max_length")(CAPTIONS)
        assert torch.allclose(found.tokens, expected.tokens, rtol=1e-5) and torch.equal(found.mask, expected.mask)


def test_the_part_decides_how_the_auto_encoder_is_built(parts, tmp_path):
    card = {"fingerprint": "", "data": {}, "scores": {}}
    save_component(tmp_path / "kl", "autoencoder", CONFIG["autoencoder"], parts[2], card)
    config = changed(autoencoder={"channels": [96, 96]}) | {"part": {"autoencoder": str(tmp_path / "kl")}}
    export_pipeline(tmp_path / "exported", config, *parts)
    written = json.loads((tmp_path / "exported" / "vae" / "config.json").read_text())
    assert written["block_out_channels"] == [64, 64]


def test_all_that_has_no_place_is_named_at_once(parts, tmp_path):
    config = changed(
        network={
            "channels": [48, 96],
            "qk_norm": True,
            "learned_positions": True,
            "pooled_width": 8,
            "expansion": 2,
        },
        autoencoder={"patch": 2, "downsampling": 4, "channels": [48, 96]},
        diffusion={
            "schedule": {"_target_": "carrara.diffusion.schedule.Flow", "shift": 1.0},
            "parameterization": {"_target_": "carrara.diffusion.parameterization.Flow"},
        },
    )
    with pytest.raises(UserError) as mistake:
        export_pipeline(tmp_path / "x", config, build(config["network"]), tiny.text(), build(config["autoencoder"]))
    for needed in (
        "network.learned_positions=false", "network.qk_norm=false", "network.pooled_width=0", "network.expansion=4",
        "network.channels in multiples of 64", "autoencoder.patch=1", "autoencoder.channels in multiples of 64",
        "conditioner=clip or open_clip", "diffusion/schedule=linear", "diffusion/parameterization=epsilon, v or x0",
    ):  # fmt: skip
        assert needed in str(mistake.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["dit", "identity", "longest", "layer"])
def test_other_parts_are_refused(parts, tmp_path, what):
    network, conditioner, autoencoder = parts
    needed = {
        "dit": "network=unet",
        "identity": "autoencoder=kl",
        "longest": "conditioner.padding=max_length",
        "layer": "conditioner.layer=null",
    }[what]
    if what == "dit":
        network = tiny.dit()
    elif what == "identity":
        autoencoder = Identity()
    elif what == "layer":
        conditioner = Pretrained(conditioner.encoder.name, WIDTH, LENGTH, "max_length", layer=1)
    else:
        conditioner = Pretrained(conditioner.encoder.name, WIDTH, LENGTH)
    with pytest.raises(UserError, match=f"it needs {needed}$"):
        export_pipeline(tmp_path / "x", CONFIG, network, conditioner, autoencoder)


def test_a_folder_that_cannot_be_made_is_told(parts, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"export=.*/thesis\.txt/x cannot be made: (File exists|Not a directory)"):
        export_pipeline(tmp_path / "thesis.txt" / "x", CONFIG, *parts)


def test_a_full_folder_is_left_alone(parts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_pipeline(tmp_path / "full", CONFIG, *parts)
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    export_pipeline(tmp_path / "empty", CONFIG, *parts)
    assert (tmp_path / "empty" / "model_index.json").is_file()
