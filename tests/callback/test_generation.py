import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carrara.callback.generation import Generation, PictureScores
from carrara.diffusion.sampler import Euler
from carrara.metric.extractor import OwnExtractor
from carrara.metric.float64_metric import Float64Metric
from carrara.pipeline.denoising import Sampling
from carrara.pipeline.text_to_image import TextToImage
from tests.tiny import CAPTIONS, awake, classifier_model, clip, diffusion_model, sampling, setting


def generation(how: Sampling | None = None, **changes) -> Generation:
    settings: dict[str, Any] = {
        "pipeline": lambda model: TextToImage(model, 8, how or sampling(num_steps=3)),
        "seed": 0,
        "num_images": 6,
        "batch_size": 4,
        "num_frames": 2,
        "inception": None,
        "evaluator": clip().eval(),
        "classifier": None,
        "check": None,
    }
    return Generation(**settings | changes)


def all_red(captions, images):
    assert images.dtype == torch.uint8 and len(captions) == len(images)
    return [{"all": "red" in caption, "color": "red" in caption} for caption in captions]


def model():
    torch.manual_seed(0)
    made = diffusion_model().eval()
    awake(made.predictor)
    return made


def test_every_score_has_its_name():
    scores = generation(check=all_red)(model(), setting(16))
    names = {"fd_evaluator", "kd_evaluator", "clip_score", "r_precision", "num_images"}
    names |= {"prompt_accuracy/all", "prompt_accuracy/color"}
    assert scores.keys() == {f"{prefix}{name}" for prefix in ("val/", "val_seen/") for name in names}
    assert scores["val/num_images"] == 6 and scores["val/fd_evaluator"] > 0


def test_each_extractor_has_its_own_names():
    classifier = classifier_model(["disc", "cube"]).classifier.eval()
    own = generation(classifier=classifier, evaluator=None)(model(), setting(16))
    assert own.keys() == {f"val{p}/{name}" for p in ("", "_seen") for name in ("fd_cnn", "kd_cnn", "num_images")}
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    inception = OwnExtractor(lambda x: x.mean((2, 3)), 3)
    judge = PictureScores(None, None, inception, None, 4, torch.device("cpu"))
    judge.add_real(images, torch.arange(4))
    judge.add_generated(255 - images, ["a"] * 4, torch.arange(4))
    scores = judge.compute()
    assert scores.keys() == {"fid_inception", "kd_inception"} and scores["fid_inception"] > 0


def test_without_evaluator_and_parser_there_is_nothing_to_score():
    scores = generation(evaluator=None)(model(), setting(16))
    assert scores.keys() == {"val/num_images", "val_seen/num_images"}


def test_scores_are_the_same_every_time():
    torch.manual_seed(0)
    score, one = generation(), model()
    first = score(one, setting(16))
    torch.manual_seed(77)
    assert score(one, setting(16)) == first
    other = generation(seed=1, evaluator=score.evaluator)(one, setting(16))
    assert other["val/clip_score"] != first["val/clip_score"]


def test_ranks_make_their_own_chunks_and_together_all(monkeypatch):
    """What the ranks' metrics hold, added up, is what one rank holds."""
    score, one = generation(num_images=8, batch_size=3), model()
    held: list[dict[str, dict[str, torch.Tensor]]] = []

    def compute(self: PictureScores) -> dict[str, float]:
        states = {}
        for name, metric in self.metrics.items():
            assert isinstance(metric, Float64Metric)
            values = {k: getattr(metric, k) for k in metric._defaults}
            states[name] = {k: torch.cat(v) if isinstance(v, list) and v else v for k, v in values.items()}
        held.append(states)
        return {}

    monkeypatch.setattr(PictureScores, "compute", compute)
    score(one, setting(16))
    whole = held[0]["clip_score"]
    held.clear()
    for rank in range(2):
        score(one, setting(16, rank, 2))
    parts = [states["clip_score"] for states in held[::2]]
    assert sum(float(part["count"]) for part in parts) == float(whole["count"]) == 8
    assert [float(part["count"]) for part in parts] == [5, 3]
    assert sum(float(part["score_sum"]) for part in parts) == float(whole["score_sum"])


def test_rank_zero_leaves_a_grid_and_the_strip(tmp_path):
    generation(check=all_red)(model(), setting(16, samples_dir=tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "epoch=0001.png", "epoch=0001.json", "seen=0001.png", "seen=0001.json", "strip.png", "strip.json",
    }  # fmt: skip
    facts = json.loads((tmp_path / "epoch=0001.json").read_text())
    assert facts["tile"] == 8 and len(facts["captions"]) == 4
    assert facts["captions"][0] == {"caption": "a big red disc", "correct": True}
    assert Image.open(tmp_path / "epoch=0001.png").size == (4 * 8, 8)
    strip = json.loads((tmp_path / "strip.json").read_text())
    assert len(strip["t"]) == 2 and strip["t"][-1] == 0
    assert Image.open(tmp_path / "strip.png").size == (2 * 8, 4 * 8)


def test_scores_are_there_without_previews(tmp_path, monkeypatch):
    """The disk is full; a training does not end of a picture to look at."""

    def save_grid(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("carrara.callback.generation.save_grid", save_grid)
    assert generation(check=all_red)(model(), setting(16, samples_dir=tmp_path))


def test_other_ranks_leave_nothing(tmp_path):
    generation()(model(), setting(16))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_pictures_of_one_caption_have_no_r_precision():
    judge = PictureScores(clip(), None, None, None, 4, torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    judge.add_real(images, torch.arange(4))
    judge.add_generated(images, CAPTIONS[:1] * 4, torch.arange(4))
    assert judge.compute().keys() == {"fd_evaluator", "kd_evaluator", "clip_score"}


def test_pictures_without_captions_get_distances_only():
    judge = PictureScores(clip(), None, None, all_red, 4, torch.device("cpu"), captioned=False)
    assert set(judge.metrics) == {"fd_evaluator", "kd_evaluator"}
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        judge.add_real(images, torch.arange(4))
        judge.add_generated(images, [], torch.arange(4))
    assert judge.compute()["fd_evaluator"] == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_scores_do_not_depend_on_the_autocast():
    evaluator, images = clip(), torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        judge = PictureScores(evaluator, None, None, None, 4, torch.device("cpu"))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            judge.add_real(images[:4], torch.arange(4))
            judge.add_generated(images[4:], CAPTIONS[:4], torch.arange(4))
        scores.append(judge.compute())
    assert scores[0] == scores[1]


def test_the_sampler_and_its_steps_are_the_ones_asked_for():
    steps = []

    class Counting(Euler):
        def steps(self, denoise, x, schedule, levels, noise):
            steps.append(len(levels) - 1)
            yield from super().steps(denoise, x, schedule, levels, noise)

    generation(sampling(Counting(), num_steps=5), evaluator=None)(model(), setting(8))
    assert set(steps) == {5}
