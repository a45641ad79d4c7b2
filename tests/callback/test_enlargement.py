import json

import pytest
import torch

from carrara.callback.enlargement import Enlargement
from carrara.diffusion.parameterization import X0
from carrara.diffusion.sampler import Euler
from carrara.metric.psnr import psnr
from carrara.network.resize import enlarge, shrink
from carrara.pipeline.pictures import to_uint8
from carrara.pipeline.super_resolution import SuperResolution
from tests.model.test_super_resolution import model
from tests.pipeline.test_cascade import Believes
from tests.tiny import batch, clip, objective, sampling, setting


def test_who_believes_the_small_picture_scores_as_bicubic_does(tmp_path):
    made = model(network=Believes(), objective=objective(parameterization=X0())).eval()
    how = sampling(Euler(), 1.0, 2)
    score = Enlargement(lambda model: SuperResolution(made, 8, how, 0.0), 0, 6, 4, 3, clip().eval(), None)
    scores = score(made, setting(16, samples_dir=tmp_path))
    images = batch(range(0, 12, 2))["images"]
    bicubic = to_uint8(enlarge(shrink(images.float() / 127.5 - 1, 2), 2).clamp(-1, 1))
    assert scores["val/psnr_bicubic"] == pytest.approx(psnr(bicubic, images).mean().item(), rel=1e-6)
    for name in ("psnr", "fd_evaluator", "clip_score"):
        assert scores[f"val/{name}"] == pytest.approx(scores[f"val/{name}_bicubic"], rel=1e-3)
    assert scores["val/fd_evaluator"] > 0 and scores["val/num_images"] == 6
    assert json.loads((tmp_path / "enlarged=0001.json").read_text())["tile"] == 8


@torch.no_grad()
def test_noise_on_the_small_picture_is_seen_in_the_score():
    made = model(network=Believes(), objective=objective(parameterization=X0())).eval()
    how = sampling(Euler(), 1.0, 2)
    noised = Enlargement(lambda model: SuperResolution(made, 8, how, 0.5), 0, 6, 6, 3, None, None)
    scores = noised(made, setting(16))
    assert scores["val/psnr"] < scores["val/psnr_bicubic"] - 1
