"""From a published pipeline to one that `diffusers` opens, as a user types it."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from carrara.build import build_pipeline, load_trained
from carrara.callback.checkpoint_file import newest_valid
from carrara.pipeline.text_to_image import TextToImage
from tests.published.pipelines import LENGTH, WIDTH, save_pipeline, start
from tests.test_end_to_end import run

pytestmark = pytest.mark.slow
PROMPT = "a red disc"


def arguments(published: Path) -> list[str]:
    """The LAION user's, at a tiny size and on shapes."""
    return [
        "model=latent_unet", "autoencoder=pretrained", f"part.autoencoder={published}",
        "autoencoder.channels=[64,128]", "autoencoder.num_blocks=1", "autoencoder.downsampling=2",
        "network=stable_diffusion_1", "network.channels=[64,128]", "network.attention=[true,false]",
        "network.num_blocks=1", "conditioner=clip", f"conditioner.model={published}", f"conditioner.width={WIDTH}",
        f"conditioner.max_length={LENGTH}", "diffusion=stable_diffusion", f"start.network={published}",
        "part.evaluator=null", "model.caption_mean_weight=0.0", "data.make.num_train=32", "data.make.num_val=4",
        "data.make.num_val_seen=4", "size.evaluation.num_images=4", "diffusion.num_steps=2", "trainer.batch_size=4",
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "logger.wandb.mode=disabled",
    ]  # fmt: skip


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def pictures(pipeline: StableDiffusionPipeline, noise: torch.Tensor) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, num_inference_steps=3, latents=noise, output_type="pt").images


def test_additions_are_trained_exported_and_opened(tmp_path):
    published = tmp_path / "published"
    save_pipeline(published)
    lora = [*arguments(published), "model/lora=attention", "model.lora.rank=2", "trainer.learning_rate=1.0"]
    plan = succeeded(run("train.py", *lora, "dry_run=true", cwd=tmp_path))
    assert f"start       network        to be imported from {published}" in plan
    assert f"part        autoencoder    to be imported from {published}" in plan
    assert not (tmp_path / "runs" / "components").exists()
    said = succeeded(run("train.py", *lora, cwd=tmp_path))
    assert "was trained with" not in said  # schedule and target are those of the published one
    (folder,) = (tmp_path / "runs" / "latent_unet-shapes").iterdir()
    imported = sorted(p.name.split("-")[0] for p in (tmp_path / "runs/components/published").iterdir() if p.is_dir())
    assert imported == ["autoencoder", "network"]

    succeeded(run("generate.py", f"run={folder}", "export=exported", cwd=tmp_path))
    shutil.move(folder / "component", tmp_path / "component")  # before it has ended, from its checkpoint
    succeeded(run("generate.py", f"run={folder}", "export=early", cwd=tmp_path))
    shutil.move(tmp_path / "component", folder / "component")
    ended, early = (load_file(next((tmp_path / name / "unet").glob("*.safetensors"))) for name in ("exported", "early"))
    assert ended.keys() == early.keys() and all(torch.allclose(ended[key], early[key], atol=1e-6) for key in ended)
    noise = torch.randn(1, 4, 16, 16)
    ours = pictures(StableDiffusionPipeline.from_pretrained(tmp_path / "exported"), noise)
    base = StableDiffusionPipeline.from_pretrained(published)
    base.scheduler = StableDiffusionPipeline.from_pretrained(tmp_path / "exported").scheduler
    base.load_lora_weights(folder / "component" / "adapter")
    assert (pictures(base, noise) - ours).abs().max() < 1e-3
    base.unload_lora_weights()
    assert (pictures(base, noise) - ours).abs().max() > 1e-2

    succeeded(run("train.py", f"resume={folder}", "trainer.max_steps=3", cwd=tmp_path))
    checkpoint = newest_valid(folder / "checkpoints")
    out = succeeded(run("generate.py", f"run={folder}", f"prompt={PROMPT}", f"weak={checkpoint}", cwd=tmp_path))
    assert "4 pictures" in out
    refused = run("generate.py", f"run={folder}", "export=exported", cwd=tmp_path)
    assert refused.returncode != 0 and "export=exported is there already" in refused.stderr


def test_all_weights_are_trained_from_the_published_ones(tmp_path, monkeypatch):
    published = tmp_path / "published"
    save_pipeline(published)
    succeeded(run("train.py", *arguments(published), "trainer.learning_rate=1e-9", cwd=tmp_path))
    (folder,) = (tmp_path / "runs" / "latent_unet-shapes").iterdir()
    order = ["export=exported", f"prompt={PROMPT}", "count=1", "num_steps=7", "out=made"]
    succeeded(run("generate.py", f"run={folder}", *order, cwd=tmp_path))
    ours, theirs = (StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("exported", "published"))
    theirs.scheduler = ours.scheduler
    noise = torch.randn(1, 4, 16, 16)
    assert (pictures(ours, noise) - pictures(theirs, noise)).abs().max() < 1e-3
    monkeypatch.chdir(tmp_path)  # the run names its parts from here
    config, model, modules = load_trained(folder)
    pipeline = build_pipeline(config, modules)(model)
    assert isinstance(pipeline, TextToImage)
    how = {"num_inference_steps": 7, "guidance_scale": 7.5, "latents": start(pipeline, [PROMPT]), "output_type": "pt"}
    png = torch.from_numpy(np.array(Image.open("made/0000.png"))).permute(2, 0, 1) / 255
    assert png.std() > 0.05 and (ours(PROMPT, **how).images[0] - png).abs().max() < 0.5 / 255 + 1e-3


def test_a_run_that_cannot_be_exported_is_told_all_reasons(tmp_path):
    published = tmp_path / "published"
    save_pipeline(published)
    succeeded(
        run(
            "train.py", *(a for a in arguments(published) if "start." not in a), "network.qk_norm=true",
            "conditioner.padding=longest", cwd=tmp_path,
        )
    )  # fmt: skip
    (folder,) = (tmp_path / "runs" / "latent_unet-shapes").iterdir()
    refused = run("generate.py", f"run={folder}", "export=exported", cwd=tmp_path)
    assert refused.returncode != 0 and not (tmp_path / "exported").exists()
    assert "it needs network.qk_norm=false; conditioner.padding=max_length" in refused.stderr
