"""A frozen network whose weights lie elsewhere."""

from typing import Any

import torch
from torch import Tensor, nn

from carrara.errors import UserError


class ByReference(nn.Module):
    """Keeps a pretrained network out of the state dict, which holds its name and the SHA-256 of its weights instead.

    Such weights lie on a hub or in a folder already, and are too large to copy into every checkpoint and component
    (T5-XXL's encoder has 20 GB). A state that was saved with other weights is refused.

    Args:
        module: is frozen and stays in evaluation mode.
        name: where its weights come from.
        sha256: of its weights, in hexadecimal.
    """

    def __init__(self, module: nn.Module, name: str, sha256: str):
        super().__init__()
        self.module = module.requires_grad_(False)
        self.name = name
        self.sha256 = sha256
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_fill_in)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network answers; nothing of it is kept for a backward pass."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "ByReference":
        return super().train(False)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(f"{self.sha256} {self.name}".encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compares.

        Raises:
            UserError: the state was saved with other weights.
        """
        sha256, _, name = bytes(state.tolist()).decode().partition(" ")
        if sha256 != self.sha256:
            raise UserError(
                f"it was trained with the weights of {name} (SHA-256 {sha256[:12]}…), but those of {self.name} are "
                f"others ({self.sha256[:12]}…): put them back, or name in its config where they are"
            )


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}module.")]:
        del state[key]


def _fill_in(module: nn.Module, state: dict[str, Any], prefix: str, *args: object) -> None:
    """So that a strict load finds the keys; a tensor copied onto itself costs nothing."""
    assert isinstance(module, ByReference)
    state.update(module.module.state_dict(prefix=f"{prefix}module.", keep_vars=True))
