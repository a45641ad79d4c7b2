"""Every system from the command line, on tiny settings: trained with its parts, sampled, scored."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from carrara.component import read_component
from carrara.run_folder import load_config
from tests.commands import TINY, check_scores_again, last, run, trained_part


@pytest.mark.slow
def test_a_weaker_checkpoint_guides(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    checkpoint = min((folder / "checkpoints").glob("*.ckpt"))
    done = run(
        "generate.py", f"run={folder}", "prompt=a red circle", "count=1", f"weak={checkpoint}", f"out={cwd / 'led'}",
        cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hashes = set()
    for k, weak in enumerate(([f"weak={folder}"], [f"weak={checkpoint}"], [])):
        out = cwd / f"weak{k}"
        done = run("evaluate.py", f"run={folder}", "num_images=4", f"out={out}", *weak, cwd=cwd)
        assert done.returncode == 0, done.stderr
        hashes.add(json.loads((out / "scores.json").read_text())["hash"])
    assert len(hashes) == 3


@pytest.mark.slow
def test_two_ranks_learn_the_codebook_of_one(tmp_path: Path) -> None:
    weights = []
    for devices in (1, 2):
        done = run(
            "train.py", *TINY, "model=autoencoder", "autoencoder=vq", "model/optimizer=sgd", "trainer.max_steps=6",
            "trainer.learning_rate=0.01", f"trainer.devices={devices}", f"runs_dir=runs{devices}", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / f"runs{devices}" / "autoencoder-shapes").iterdir()
        assert 0 < last(folder, "val/codebook_use") <= 1 < last(folder, "val/codebook_perplexity")
        weights.append(load_file(folder / "component" / "weights.safetensors"))
    assert weights[0]["codebook.counts"].sum() > 0
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gan", "vae"])
def test_a_generator_makes_pictures_in_one_call(workplace: tuple[Path, Path], tmp_path: Path, model: str) -> None:
    cwd, _ = workplace
    judge = trained_part(cwd, "evaluator")
    small = [f"size.{model}.channels=[16,16]", f"size.{model}.attention=[false,true]", f"size.{model}.noise_width=8"]
    if model == "gan":
        small.append(f"part.autoencoder={trained_part(cwd, 'autoencoder')}")
    done = run(
        "train.py", *TINY, *small, f"model={model}", "trainer.max_steps=2", "trainer.batch_size=8",
        f"part.evaluator={judge}", f"runs_dir={tmp_path}/runs", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / f"{model}-shapes").iterdir()
    assert json.loads((folder / "component" / "card.json").read_text())["kind"] == "generator"
    assert last(folder, "val/fd_evaluator") > 0 and last(folder, "val_seen/num_images") == 8
    assert not (folder / "samples" / "strip.png").exists()  # there is nothing between noise and picture
    out = tmp_path / "pictures"
    done = run("generate.py", f"run={folder}", "prompt=a red circle", "temperature=0.5", f"out={out}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert Image.open(out / "grid.png").size == (128, 32)
    wrong = run("generate.py", f"run={folder}", "prompt=a red circle", "num_steps=5", cwd=cwd)
    assert wrong.returncode == 2 and f"{model} is not sampled with a num_steps" in wrong.stderr
    again = check_scores_again(folder, tmp_path / "again", cwd)
    assert ("val/bits_per_dim" in again) == (model == "vae")  # the bound, whose encoder is exported with the generator


@pytest.mark.slow
@pytest.mark.parametrize("model", ["latent_flow", "pixel_flow"])
def test_a_flow_makes_pictures_by_its_inverse(workplace: tuple[Path, Path], tmp_path: Path, model: str) -> None:
    cwd, _ = workplace
    names = ("evaluator", "autoencoder") if model == "latent_flow" else ("evaluator",)
    parts = [f"part.{name}={trained_part(cwd, name)}" for name in names]
    small = [f"size.{model}.width=16", f"size.{model}.num_blocks=2", f"size.{model}.depth=1", f"size.{model}.heads=2"]
    done = run(
        "train.py", *TINY, *small, f"model={model}", "trainer.max_steps=2", "trainer.batch_size=8",
        *parts, f"runs_dir={tmp_path}/runs", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / f"{model}-shapes").iterdir()
    out = tmp_path / "pictures"
    done = run("generate.py", f"run={folder}", "prompt=a red circle", "guidance_scale=1", f"out={out}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert Image.open(out / "grid.png").size == (128, 32)
    check_scores_again(folder, tmp_path / "again", cwd)


@pytest.mark.slow
def test_two_ranks_train_both_players_as_one_does(tmp_path: Path) -> None:
    """The penalties are differentiated twice, and no rank's samples get lost on the way."""
    weights = []
    for devices in (1, 2):
        done = run(
            "train.py", *TINY, "model=gan", "size.gan.channels=[16,16]", "size.gan.attention=[false,true]",
            "size.gan.noise_width=8", "model/optimizer=sgd", "trainer.learning_rate=0.01", "trainer.max_steps=3",
            "trainer.batch_size=8", "part.evaluator=null", f"trainer.devices={devices}", f"runs_dir=runs{devices}",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / f"runs{devices}" / "gan-shapes").iterdir()
        checkpoint = max((folder / "checkpoints").glob("*.ckpt"))
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert any(name.startswith("discriminator.") for name in weights[0])
    for name, value in weights[0].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_shards_are_examined_encoded_searched_and_trained_on(workplace: tuple[Path, Path], tmp_path: Path) -> None:
    cwd, _ = workplace
    data = [setting for setting in TINY if setting.startswith("data.")]
    part = trained_part(cwd, "autoencoder")
    judge = trained_part(cwd, "evaluator")
    health = tmp_path / "health.json"
    done = run("shards.py", "do=doctor", *data, f"out={health}", cwd=cwd)
    assert done.returncode == 0 and "64 that can be used + skipped: none" in done.stdout, done.stderr
    assert json.loads(health.read_text())["ok"] == 64
    done = run(
        "shards.py",
        "do=search",
        *data,
        "query=a red circle",
        f"part.evaluator={judge}",
        f"out={tmp_path}/found",
        cwd=cwd,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 16, done.stderr
    done = run("shards.py", "do=cache", *data, f"part.autoencoder={part}", f"out={tmp_path}/cached", cwd=cwd)
    assert done.returncode == 0 and "1 of 1 shards made now" in done.stdout, done.stderr
    settings = [*TINY, f"runs_dir={tmp_path}/runs", "trainer.max_steps=2", f"part.evaluator={judge}"]
    cached = [f"part.autoencoder={part}", f"data.urls={tmp_path}/cached/*.tar"]
    done = run("train.py", *settings, *cached, cwd=cwd)
    assert done.returncode == 0 and "training on the latents in the shards" in done.stderr, done.stderr
    done = run("train.py", *settings[:-1], "model=autoencoder", cached[1], cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "training on the pictures in the shards; their latents are left alone" in done.stderr
    done = run("train.py", *settings, *cached, "data.crop=none", cwd=cwd)
    assert done.returncode == 2 and "made with crop=center" in done.stderr
    (cwd / "bad").mkdir()
    content = (cwd / "data" / "shapes" / "train-000000.tar").read_bytes()
    (cwd / "bad" / "0.tar").write_bytes(content.replace(b"\x89PNG", b"\x00PNG", 20))
    done = run("shards.py", "do=doctor", "data.urls=bad/*.tar", *data, cwd=cwd)
    assert done.returncode == 1 and "not_an_image 20" in done.stdout and "max_bad_fraction=0.1" in done.stderr


@pytest.mark.slow
def test_a_classifier_is_trained_on_labels_and_judges(workplace: tuple[Path, Path]) -> None:
    """F5: any labels, the last layer dropped, under its own metric name."""
    cwd, folder = workplace
    small = [a for a in TINY if a.startswith(("trainer.", "data.", "logger."))]
    small += ["model=classifier", "trainer.max_steps=4", "trainer.batch_size=8", "classifier.channels=[8,16]"]
    sentences = run("train.py", *small, "classifier.num_classes=20", cwd=cwd)
    assert sentences.returncode == 2 and "Traceback" not in sentences.stderr
    assert "more than 20 different ones" in sentences.stderr and "data.caption" in sentences.stderr
    done = run("train.py", *small, "data.caption=shape", cwd=cwd)
    assert done.returncode == 0, done.stderr
    classifier = max((cwd / "runs" / "classifier-shapes").iterdir())
    assert 0 <= last(classifier, "val/accuracy") <= 1
    done = run("evaluate.py", f"run={folder}", f"part.classifier={classifier}", f"out={cwd / 'judged'}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    card = json.loads((cwd / "judged" / "scores.json").read_text())
    assert {"val/fd_cnn", "val/kd_cnn", "val/fd_evaluator"} <= card["scores"].keys()
    assert set(card["fingerprint"]["extractors"]) == {"cnn", "evaluator"}
    done = run("evaluate.py", f"run={classifier}", f"part.classifier={classifier}", cwd=cwd)
    assert done.returncode == 2 and "samples nothing" in done.stderr


@pytest.mark.slow
def test_a_restoration_is_trained_on_noisy_pictures_and_cleans_shards(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    small = [a for a in TINY if a.startswith(("trainer.", "data.", "logger.", "size.evaluation"))]
    small += ["model=restoration", "corruption=text", "trainer.max_steps=2", "trainer.batch_size=8"]
    done = run("train.py", *small, "network.channels=[8,16]", cwd=cwd)
    assert done.returncode == 0, done.stderr
    restoration = max((cwd / "runs" / "restoration-shapes").iterdir())
    assert last(restoration, "val/psnr") > 0 and last(restoration, "val/noisy_psnr") > 0
    assert "Denoised" in (restoration / "report.html").read_text()
    card = json.loads((restoration / "scores.json").read_text())
    assert card["fingerprint"]["sampling"]["corruption"]["share"] == 0.25
    order = ["do=restore", f"out={cwd / 'restored'}"]
    done = run("shards.py", *order, f"part.restoration={restoration}", cwd=cwd)
    assert done.returncode == 0 and "1 of 1 shards made now" in done.stdout, done.stderr
    done = run("shards.py", *order, f"part.restoration={folder}", cwd=cwd)
    assert done.returncode == 2 and "of kind noise_predictor, where kind restoration is needed" in done.stderr


@pytest.mark.slow
def test_dalle_learns_tokens_and_is_sampled_in_its_own_way(workplace: tuple[Path, Path]) -> None:
    """A discrete auto-encoder is trained first; the evaluator is there, and ranks the pictures."""
    cwd, _ = workplace
    tiny = ["size.dalle.width=16", "size.dalle.depth=1", "size.dalle.batch_size=8", "size.dalle.max_steps=2"]
    done = run("train.py", "model=dalle", *TINY, *tiny, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training the") == 1 and "training the autoencoder first" in done.stderr
    (folder,) = (cwd / "runs" / "dalle-shapes").iterdir()
    for name in ("image_nll", "text_nll", "bits_per_token/image", "bits_per_token/text_unigram", "clip_score"):
        assert last(folder, f"val/{name}") == last(folder, f"val/{name}")  # there, and not NaN
    assert json.loads((folder / "component" / "card.json").read_text())["kind"] == "network"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["fingerprint"]["sampling"]["pipeline"]["candidates"] == 1
    out = cwd / "tokens"
    done = run(
        "generate.py", f"run={folder}", "prompt=a red circle", "count=2", "candidates=2", "top_k=9", "top_p=0.9",
        "temperature=0.7", "guidance_scale=3", f"out={out}", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(out / "grid.png").size == (64, 32)
    assert len(json.loads((out / "strip.json").read_text())["t"]) == 8  # a row of tokens each


@pytest.mark.slow
def test_dalle2_takes_an_autoregressive_prior(workplace: tuple[Path, Path]) -> None:
    """The components are measured, the prior exported and read again with them; the CLIP of both is found by itself."""
    cwd, _ = workplace
    sizes = {"width": "16", "depth": "1", "num_components": "4", "batch_size": "8", "max_steps": "2"}
    tiny = [f"size.autoregressive_prior.{key}={value}" for key, value in sizes.items()]
    done = run("train.py", "model=autoregressive_prior", *TINY, *tiny, cwd=cwd)
    assert done.returncode == 0 and "training the clip first" in done.stderr, done.stderr
    (prior,) = (cwd / "runs" / "autoregressive_prior-shapes").iterdir()
    assert json.loads((prior / "component" / "card.json").read_text())["kind"] == "generator"
    assert load_file(prior / "component" / "weights.safetensors")["network.tokens.components"].shape == (4, 16)
    assert last(prior, "val/quantised_cosine") > last(prior, "val/prior_cosine") > -1
    tiny = ["size.dalle2.channels=[16]", "size.dalle2.batch_size=8", "size.dalle2.max_steps=2", f"part.prior={prior}"]
    done = run("train.py", "model=dalle2", *TINY, *tiny, cwd=cwd)
    assert done.returncode == 0 and "training the" not in done.stderr, done.stderr
    (folder,) = (cwd / "runs" / "dalle2-shapes").iterdir()
    assert last(folder, "val/clip_score") == last(folder, "val/clip_score")  # there, and not NaN
    out = cwd / "by_autoregression"
    done = run("generate.py", f"run={folder}", "prompt=a red circle", "count=2", f"out={out}", cwd=cwd)
    assert done.returncode == 0 and Image.open(out / "grid.png").size == (64, 32), done.stderr
    done = run("generate.py", f"run={folder}", "strength=0.5", "prompt=a red circle", cwd=cwd)
    assert done.returncode == 2 and "dalle2 varies one picture, or goes from one to another" in done.stderr
    done = run("generate.py", f"run={prior}", "prompt=a red circle", cwd=cwd)
    assert done.returncode == 2 and "makes no pictures" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_a_language_model_is_trained_first_and_reads_the_captions(workplace: tuple[Path, Path], objective: str) -> None:
    cwd, _ = workplace
    small = [
        *TINY, "model=pixel_unet", "conditioner=language_model", f"language_model={objective}", "part.evaluator=null",
        "size.language_model.width=16", "size.language_model.depth=1", "size.language_model.max_steps=3",
        "size.language_model.batch_size=16", "size.pixel_unet.channels=[16,16,16]", "trainer.max_steps=2",
        "trainer.batch_size=4", f"runs_dir={objective}",
    ]  # fmt: skip
    plan = run("train.py", *small, "dry_run=true", cwd=cwd)
    assert plan.returncode == 0, plan.stderr
    assert "part        language_model to be trained first in" in plan.stdout
    for _ in range(2):  # the second finds the part
        done = run("train.py", *small, cwd=cwd)
        assert done.returncode == 0, done.stderr
    (part,) = (cwd / objective / "components").iterdir()
    assert part.name.startswith("language_model-")
    assert 1 < last(part, "val/perplexity") < 1000 and last(part, "val/unigram_perplexity") > 1
    folder = max((cwd / objective / "pixel_unet-shapes").iterdir())
    exported = read_component(folder / "component").config["conditioner"]
    assert exported["model"] == str((part / "component").relative_to(cwd))
    state = load_file(folder / "component" / "weights.safetensors")
    assert [key for key in state if not key.startswith("network.")] == ["conditioner.encoder._extra_state"]
    done = run("generate.py", f"run={folder}", "prompt=a red circle", "num_steps=2", f"out={cwd / 'read'}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert (cwd / "read" / "0000.png").is_file()
    done = run("evaluate.py", f"run={part}", "trainer.accelerator=cpu", "trainer.precision=32-true", cwd=cwd)
    assert done.returncode == 0 and "val/perplexity" in done.stdout, done.stderr


@pytest.mark.slow
def test_imagen_makes_small_pictures_and_enlarges_them(workplace: tuple[Path, Path]) -> None:
    """Both stages read captions alike, the strip shows both, and a stage that does not fit is told before training."""
    cwd, _ = workplace
    tiny = [
        *TINY, "size.language_model.max_steps=2", "size.language_model.batch_size=8", "size.language_model.width=16",
        "size.small_pictures.channels=[8,16]", "size.small_pictures.max_steps=2", "size.small_pictures.batch_size=8",
        "size.imagen.channels=[8,16]", "size.imagen.attention=[false,true]", "size.imagen.max_steps=2",
        "size.imagen.batch_size=8",
    ]  # fmt: skip
    done = run("train.py", "model=imagen", *tiny, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs" / "imagen-shapes").iterdir()
    small = trained_part(cwd, "small_pictures")
    config = load_config(folder)
    assert config["part"]["small_pictures"] == f"runs/components/{small.name}/component"
    assert config["part"]["language_model"] == load_config(small)["part"]["language_model"]
    assert last(folder, "val/fd_evaluator") != last(small, "val/fd_evaluator")  # whose is bicubic enlargement's
    done = run("generate.py", f"run={folder}", "prompt=a red circle", "count=1", "num_frames=4", "out=im", cwd=cwd)
    assert done.returncode == 0, done.stderr
    strip = json.loads((cwd / "im" / "strip.json").read_text())
    assert strip["t"][-1] == 0 and strip["t"].count(0) == 2  # of both stages
    done = run("train.py", "model=imagen", *tiny, f"part.small_pictures={small}", "model.factor=4", cwd=cwd)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: part.small_pictures makes")
    assert len(list((cwd / "runs" / "imagen-shapes").iterdir())) == 1
    done = run("train.py", "model=super_resolution", *tiny, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs" / "super_resolution-shapes").iterdir()
    assert last(folder, "val/psnr_bicubic") > 10
    done = run("generate.py", f"run={folder}", f"image={cwd / 'im' / '0000.png'}", "count=2", "out=large", cwd=cwd)
    assert done.returncode == 0 and Image.open(cwd / "large" / "0001.png").size == (32, 32), done.stderr
    for wrong in (["prompt=a red circle"], ["image=[a,b]"], [f"image={cwd / 'im' / '0000.png'}", "strength=0.5"]):
        done = run("generate.py", f"run={folder}", *wrong, cwd=cwd)
        assert done.returncode == 2 and "super_resolution enlarges one picture: image=FILE, without" in done.stderr
