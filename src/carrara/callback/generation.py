"""Scores of pictures generated for the validation captions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from carrara.callback.score import Setting, prefix
from carrara.classifier.cnn import CNN
from carrara.errors import going_on_without
from carrara.evaluator.clip import CLIP
from carrara.metric.clip_score import CLIPScore
from carrara.metric.extractor import FeatureExtractor, InceptionExtractor, OwnExtractor, distance_names
from carrara.metric.frechet import FrechetDistance
from carrara.metric.kernel_distance import KernelDistance
from carrara.metric.prompt_accuracy import Check, PromptAccuracy
from carrara.metric.r_precision import RPrecision
from carrara.model.base import Model
from carrara.pipeline.base import Pipeline, Watch
from carrara.pipeline.pictures import save_grid, save_strip, to_uint8


@dataclass
class PictureScores:
    """The metrics of one set of generated pictures; features are float32 whatever the autocast.

    Args:
        evaluator: embeds pictures and captions; its own features give `fd_evaluator` and `kd_evaluator`.
        classifier: its features give `fd_cnn` and `kd_cnn`; None to go without.
        inception: features for `fid_inception` and `kd_inception`; None where the user gave no weights.
        check: see `PromptAccuracy`; None where no parser reads the data.
        num_images: how many pictures there will be.
        device: of the metrics.
        captioned: whether the generated pictures have captions; without, only distances are scored.
    """

    evaluator: CLIP | None
    classifier: CNN | None
    inception: FeatureExtractor | None
    check: Check | None
    num_images: int
    device: torch.device
    captioned: bool = True
    metrics: dict[str, Metric] = field(init=False)

    def __post_init__(self) -> None:
        self._extractors: dict[str, FeatureExtractor] = {}
        if self.evaluator is not None:
            self._extractors["evaluator"] = OwnExtractor(self.evaluator.embed_images, self.evaluator.embedding_width)
        if self.classifier is not None:
            self._extractors["cnn"] = OwnExtractor(self.classifier.features, self.classifier.feature_dim)
        if self.inception is not None:
            self._extractors["inception"] = self.inception
        metrics: dict[str, Metric] = {}
        for name, extractor in self._extractors.items():
            frechet, kernel = distance_names(name)
            metrics[frechet] = FrechetDistance(extractor.feature_dim, self.num_images)
            metrics[kernel] = KernelDistance(extractor.feature_dim)
        if self.evaluator is not None and self.captioned:
            metrics["clip_score"] = CLIPScore()
            metrics["r_precision"] = RPrecision(self.evaluator.embedding_width)
        if self.check is not None and self.captioned:
            metrics["prompt_accuracy"] = PromptAccuracy(self.check)
        self.metrics = {name: metric.to(self.device) for name, metric in metrics.items()}

    def add_real(self, images: Tensor, index: Tensor) -> None:
        """Add real pictures, uint8 (B, 3, R, R), with unique indices (B,)."""
        self._add(images, index, real=True)

    def add_generated(self, images: Tensor, captions: list[str], index: Tensor) -> None:
        """Add generated pictures, uint8 (B, 3, R, R), with unique indices (B,)."""
        features = self._add(images, index, real=False)
        m = self.metrics
        if self.evaluator is not None and self.captioned:
            with self._in_float32():
                texts = self.evaluator.embed_texts(captions)
            m["clip_score"].update(features["evaluator"], texts)
            m["r_precision"].update(features["evaluator"], texts, captions, index)
        if "prompt_accuracy" in m:
            m["prompt_accuracy"].update(captions, images)

    def _add(self, images: Tensor, index: Tensor, real: bool) -> dict[str, Tensor]:
        with self._in_float32():
            features = {name: extractor(images) for name, extractor in self._extractors.items()}
        for name, values in features.items():
            frechet, kernel = distance_names(name)
            self.metrics[frechet].update(values, real)
            self.metrics[kernel].update(values, index, real)
        return features

    def _in_float32(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def compute(self) -> dict[str, float]:
        """All scores, over all ranks; no `r_precision` where all captions are the same."""
        scores: dict[str, float] = {}
        for name, metric in self.metrics.items():
            value: Any = metric.compute()
            if isinstance(metric, RPrecision) and metric.num_candidates < 2:
                continue
            if isinstance(value, dict):
                scores |= {f"{name}/{key}": float(share) for key, share in value.items()}
            else:
                scores[name] = float(value)
        return scores


PREVIEWS = 16  # pictures of each split to look at
STRIP_ROWS = 4


class Generation:
    """Logs the scores of `PictureScores` for each split; leaves a grid and the strip from noise to picture.

    Args:
        pipeline: makes one of a model.
        seed: of the pictures.
        num_images: captions of each split; all if there are fewer.
        batch_size: pictures in a chunk.
        num_frames: columns of the strip.
        inception: the path of the weights for `val/fid_inception`; None to go without.
        evaluator, classifier, check: see `PictureScores`.
    """

    def __init__(
        self,
        pipeline: Callable[[Model], Pipeline],
        seed: int,
        num_images: int,
        batch_size: int,
        num_frames: int,
        inception: str | None,
        evaluator: CLIP | None,
        classifier: CNN | None,
        check: Check | None,
    ):
        self.pipeline, self.seed = pipeline, seed
        self.num_images, self.batch_size, self.num_frames = num_images, batch_size, num_frames
        self.evaluator, self.classifier, self.check = evaluator, classifier, check
        self.inception = None if inception is None else InceptionExtractor(inception)

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        pipeline = self.pipeline(model)
        for module in (self.evaluator, self.classifier, self.inception):
            if isinstance(module, nn.Module):
                module.to(setting.device)
        scores: dict[str, float] = {}
        for split, indices in setting.validation.splits.items():
            indices = indices[: self.num_images]
            judge = PictureScores(
                self.evaluator, self.classifier, self.inception, self.check, len(indices), setting.device
            )
            for chunk in setting.chunks(indices, self.batch_size):
                batch = setting.validation.take(chunk)
                first = chunk[0] == indices[0] and setting.samples_dir is not None
                watch = Watch(pipeline, self.num_frames, STRIP_ROWS) if first else None
                with torch.no_grad(), setting.autocast():
                    made = pipeline(batch["captions"], batch["positions"].tolist(), self.seed, watch)
                    pictures = to_uint8(made)
                    real = batch["images"].to(setting.device)
                    judge.add_real(real, batch["positions"])
                    judge.add_generated(pictures, batch["captions"], batch["positions"])
                if first:
                    self._show(setting, split, pictures, batch["captions"], watch)
            scores |= {f"{prefix(split)}{name}": value for name, value in judge.compute().items()}
            scores[f"{prefix(split)}num_images"] = float(len(indices))
        return scores

    def _show(
        self,
        setting: Setting,
        split: str,
        pictures: Tensor,
        captions: list[str],
        watch: Watch | None,
    ) -> None:
        assert setting.samples_dir is not None
        pictures, captions = pictures[:PREVIEWS], captions[:PREVIEWS]
        answers = [{}] * len(captions) if self.check is None else self.check(captions, pictures.cpu())
        tiles = [{"caption": c, "correct": answer.get("all")} for c, answer in zip(captions, answers, strict=True)]
        name = "epoch" if split == "held_out" else split
        with going_on_without(setting.samples_dir):
            save_grid(setting.samples_dir / f"{name}={setting.epoch:04d}.png", pictures, 8, tiles)
            if split == "held_out" and watch is not None and watch.frames:
                frames = torch.stack([to_uint8(frame) for frame in watch.frames])
                save_strip(setting.samples_dir / "strip.png", frames, captions[:STRIP_ROWS], watch.times)
