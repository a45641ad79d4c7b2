"""A small classifier trained on any labels; without its last layer it is an extractor (`fd_cnn`)."""

import hashlib
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from carrara.errors import UserError


class SmallCNN(nn.Module):
    """Four convolutions, each but the first halving the picture; features are means over the picture."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.num_classes, self.width, self.feature_dim = num_classes, width, 8 * width
        channels = [3, width, 2 * width, 4 * width, 8 * width]
        stages = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=1 if before == 3 else 2, padding=1, bias=False),
                nn.GroupNorm(4, after),
                nn.SiLU(),
            )
            for before, after in pairwise(channels)
        ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> (B, feature_dim) float32."""
        return self.stages(images.float() / 127.5 - 1).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> class logits (B, num_classes)."""
        return self.head(self.features(images))


def train_classifier(
    images: Tensor, labels: Tensor, steps: int, batch_size: int = 64, width: int = 16, seed: int = 0
) -> SmallCNN:
    """Train a `SmallCNN` on uint8 images (N, 3, H, W) and int64 labels (N,) in 0…K−1, where the images lie.

    Adam at 2e-3, decayed to 0 along a cosine, on batches drawn with replacement by `seed`. The global random
    state is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = SmallCNN(int(labels.max()) + 1, width)
    network.to(images.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network.eval()


class CNNExtractor(nn.Module):
    """A trained `SmallCNN` without its last layer. `hash` is of its weights, in memory as in a file."""

    name = "cnn"

    def __init__(self, network: SmallCNN) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.feature_dim = network.feature_dim
        self.hash = _hash(network)

    def train(self, mode: bool = True) -> "CNNExtractor":
        """Stays in evaluation mode, also inside a module that is put in training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, feature_dim), in float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network.features(images)

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, with their shape and hash in its metadata."""
        shape = {"num_classes": str(self.network.num_classes), "width": str(self.network.width)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, path, metadata={**shape, "sha256": self.hash})

    @classmethod
    def load(cls, path: str | Path) -> "CNNExtractor":
        """Read what `save` wrote. Raises UserError if the file is missing, another's or damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                with torch.device("meta"):  # drawing weights to throw away would move the global random state
                    network = SmallCNN(int(metadata["num_classes"]), int(metadata["width"]))
                network.load_state_dict(tensors, assign=True)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} was not written by CNNExtractor.save: train it again") from error
        extractor = cls(network)
        if extractor.hash != metadata["sha256"]:
            raise UserError(f"{path} is damaged (its weights hash to {extractor.hash}): train it again")
        return extractor


def _hash(network: SmallCNN) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
