"""What pictures are compared in: features of our own networks, and of the Inception network of published FID scores."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from carrara.errors import UserError

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# The SHA-256 that k-diffusion's evaluation and other public evaluators pin for this file (95 607 719 bytes).
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class FeatureExtractor(Protocol):
    """uint8 images (B, 3, H, W) -> features (B, feature_dim)."""

    @property
    def feature_dim(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class OwnExtractor:
    """Features of a network of ours, which takes images in [−1, 1]."""

    features: Callable[[Tensor], Tensor]
    feature_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(images.float() / 127.5 - 1)


def distance_names(extractor: str) -> tuple[str, str]:
    """Names of the Fréchet and kernel distance in an extractor's features; FID is Inception's alone."""
    return ("fid_inception" if extractor == "inception" else f"fd_{extractor}"), f"kd_{extractor}"


class InceptionExtractor(nn.Module):
    """Inception-v3 pool features as in StyleGAN's FID. NVIDIA's TorchScript file itself resizes to 299×299.

    path: a local copy of `INCEPTION_URL`; nothing is ever downloaded. sha256: what the file must hash to.
    Raises UserError if the file is missing, is not that file or does not load: there is no fallback network.
    """

    feature_dim = 2048

    def __init__(self, path: str | Path, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__()
        file = Path(path)
        if not file.is_file():
            raise UserError(f"no Inception weights at {file}: download {INCEPTION_URL} and put the file there")
        # Hashed and loaded from the same bytes: what was checked is what runs.
        content = file.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise UserError(
                f"{file} is not the expected file (SHA-256 {found}, not {sha256}): download {INCEPTION_URL}"
            )
        try:
            network = torch.jit.load(io.BytesIO(content), map_location="cpu")
        except RuntimeError as error:
            raise UserError(f"{file} is not a TorchScript network: download {INCEPTION_URL}") from error
        self.network = network.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "InceptionExtractor":
        """Stays in evaluation mode, also inside a module that is put in training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048), in float32 whatever the autocast."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            features = self.network(images, return_features=True)
        if features.shape != (len(images), self.feature_dim):
            raise ValueError(f"expected {self.feature_dim} features per image, got {tuple(features.shape)}")
        return features.float()
