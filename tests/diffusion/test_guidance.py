from dataclasses import dataclass

import pytest
import torch

from carrara.diffusion.guidance import ClassifierFree


@dataclass
class Label:
    value: torch.Tensor

    def cat(self, other: "Label") -> "Label":
        return Label(torch.cat([self.value, other.value]))


class Network:
    """x + time + label, and the batch sizes it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: torch.Tensor, time: torch.Tensor, label: Label) -> torch.Tensor:
        self.batches.append(len(x))
        return x + time[:, None] + label.value[:, None]


X, TIME = torch.randn(3, 5), torch.tensor([1.0, 2.0, 3.0])
TEXT, NOTHING = Label(torch.tensor([10.0, 20.0, 30.0])), Label(torch.zeros(3))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_and_doubles_the_batch_not_the_calls(scale: float):
    network = Network()
    output = ClassifierFree(scale).guided(network, TEXT, NOTHING)(X, TIME)
    torch.testing.assert_close(output, X + TIME[:, None] + scale * TEXT.value[:, None])
    assert network.batches == [6]


def test_scale_one_is_the_conditional_prediction_alone():
    network = Network()
    output = ClassifierFree(1).guided(network, TEXT, NOTHING)(X, TIME)
    assert torch.equal(output, Network()(X, TIME, TEXT))
    assert network.batches == [3]


def test_half_precision_outputs_are_combined_in_the_precision_of_x():
    def network(x, time, label):
        return label.value[:, None].expand_as(x).bfloat16()

    text, nothing = Label(torch.full((3,), 1.0078125)), Label(torch.ones(3))  # neighbours in bfloat16
    output = ClassifierFree(7.3).guided(network, text, nothing)(X, TIME)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.full_like(X, 1 + 7.3 * 0.0078125))
