"""The two halves of a conditional variational auto-encoder: q(z | picture, caption) and p(picture | z, caption)."""

import torch
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.generator import Generator
from carrara.network.layers import zero_
from carrara.network.pyramid import Pyramid, Tower


class Variational(nn.Module):
    """noise (B, noise_width), conditioning -> mean of p(picture | z, caption), (B, 3, R, R), about [−1, 1].

    The prior p(z | caption) is a diagonal Gaussian that a small network reads off the pooled vector (Sohn et al. 2015,
    "Learning structured output representation using deep conditional generative models", section 4.1); it starts as
    N(0, I). z is called by the noise that makes it: z = mean + std · noise.

    Args:
        pyramid: the levels of the encoder and of the generator.
        noise_width: values of z.
        pooled_width: features of the conditioning's pooled vector.

    Attributes:
        generator: z, conditioning -> mean of the picture.
        log_std: of the pixels around that mean, one number for all (Rybkin et al. 2021, "Simple and effective VAE
            training with calibrated decoders", section 3).
    """

    def __init__(self, pyramid: Pyramid, noise_width: int, pooled_width: int):
        super().__init__()
        self.generator = Generator(pyramid, noise_width, pooled_width)
        self.noise_shape = self.generator.noise_shape
        self.encoder = Tower(pyramid)
        self.encoder_out = nn.Linear(pyramid.features, 2 * noise_width)
        hidden = 2 * pooled_width
        self.prior_net = nn.Sequential(
            nn.Linear(pooled_width, hidden), nn.SiLU(), zero_(nn.Linear(hidden, 2 * noise_width))
        )
        self.log_std = nn.Parameter(torch.tensor(-1.5))

    def posterior(self, images: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, noise_width) of q(z | picture, caption), float32."""
        mean, logvar = self.encoder_out(self.encoder(images, conditioning)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-20.0, 10.0)

    def prior(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, noise_width) of p(z | caption), float32."""
        mean, logvar = self.prior_net(conditioning.pooled).float().chunk(2, dim=1)
        return mean, logvar.clamp(-20.0, 10.0)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        mean, logvar = self.prior(conditioning)
        return self.generator(mean + (0.5 * logvar).exp() * noise, conditioning)
