"""What pictures of a caption look like on average."""

import torch
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.unet import TransformerBlock


class CaptionMean(nn.Module):
    """Conditioning -> E[x0 | caption] on a coarse grid (B, C, grid, grid).

    That is what the noise predictor has to know at t = 1, where x_t is all noise, but asked without the noise and for
    little (a tenth of the demo's step, next to nothing of a large network's). Trained along, its error is the shortest
    way for a gradient to reach the text: which words belong to the thing on the left. It is not needed afterwards and
    is not exported.

    Args:
        channels: of x0.
        context_width: features of the conditioning's tokens.
        grid: height and width of the answer.
        width: features of a grid cell.
        depth: transformer blocks.
        heads: attention heads.
    """

    not_hidden = ("out",)

    def __init__(
        self, channels: int, context_width: int, grid: int = 4, width: int = 128, depth: int = 2, heads: int = 4
    ):
        super().__init__()
        self.grid = grid
        self.cells = nn.Parameter(0.5 * torch.randn(grid * grid, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_width, expansion=2, qk_norm=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, channels)

    def forward(self, conditioning: Conditioning) -> Tensor:
        x = self.cells.expand(len(conditioning.tokens), -1, -1)
        for block in self.blocks:
            x = block(x, conditioning.tokens, conditioning.mask)
        return self.out(self.norm(x)).transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def squared_error(self, conditioning: Conditioning, x0: Tensor) -> Tensor:
        """Mean squared error (B,) of the answer against clean latents x0 (B, C, H, W), averaged over each cell."""
        target = nn.functional.adaptive_avg_pool2d(x0, self.grid)
        return (self(conditioning).float() - target).square().mean((1, 2, 3))

    def beside(self, loss: Tensor, weight: float, conditioning: Conditioning, x0: Tensor) -> dict[str, Tensor]:
        """`loss` with `weight` times this error's gradient, but not its value, and the error: "loss", "caption_mean".

        So a loss means the same with and without it, in training and validation.
        """
        error = self.squared_error(conditioning, x0).mean()
        return {"loss": loss + weight * (error - error.detach()), "caption_mean": error}
