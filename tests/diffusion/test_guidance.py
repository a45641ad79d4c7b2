from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from carrara.diffusion.guidance import Guidance, autoguidance, classifier_free
from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import V
from carrara.diffusion.schedule import Flow
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted

OBJECTIVE = Objective(Flow(), V(), Uniform(), Unweighted())


@dataclass
class Label:
    value: Tensor

    def cat(self, other: "Label") -> "Label":
        return Label(torch.cat([self.value, other.value]))


class Network:
    """x + c_noise + label, and the batch sizes it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, c_noise: Tensor, label: Label) -> Tensor:
        self.batches.append(len(x))
        return x + c_noise[:, None] / 1000 + label.value[:, None]


X, T = torch.randn(3, 50), torch.tensor(0.4, dtype=torch.float64)
TEXT, NOTHING = Label(torch.tensor([10.0, 20.0, 30.0])), Label(torch.zeros(3))


def run(guidance: Guidance, network, t: Tensor = T, text: Label = TEXT, nothing: Label = NOTHING) -> Tensor:
    positive = OBJECTIVE.predict(network, text)
    return guidance.guided(positive, classifier_free(OBJECTIVE, network, text, nothing))(X, t)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_and_doubles_the_batch_not_the_calls(scale: float):
    network = Network()
    output = run(Guidance(scale), network)
    torch.testing.assert_close(output, X + 0.4 + scale * TEXT.value[:, None])
    assert network.batches == [6]


def test_scale_one_is_the_conditional_prediction_alone():
    network = Network()
    output = run(Guidance(1), network)
    assert torch.equal(output, OBJECTIVE.predict(Network(), TEXT)(X, T))
    assert network.batches == [3]


def test_half_precision_outputs_are_combined_in_the_precision_of_x():
    def network(x, c_noise, label):
        return label.value[:, None].expand_as(x).bfloat16()

    text, nothing = Label(torch.full((3,), 1.0078125)), Label(torch.ones(3))  # neighbours in bfloat16
    output = run(Guidance(7.3), network, text=text, nothing=nothing)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.full_like(X, 1 + 7.3 * 0.0078125))


def test_outside_the_interval_there_is_no_guidance_and_no_second_half():
    guidance = Guidance(3.0, interval=(0.25, 0.75))
    for t, size in [(0.1, 3), (0.25, 6), (0.5, 6), (0.75, 6), (0.9, 3)]:
        network, time = Network(), torch.tensor(t, dtype=torch.float64)
        output = run(guidance, network, time)
        scale = 1 if size == 3 else 3
        torch.testing.assert_close(output, X + t + scale * TEXT.value[:, None])
        assert network.batches == [size]


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_is_the_papers(rescale: float):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    def network(x, c_noise, label):
        return x * (1 + label.value[:, None])

    positive, plain = run(Guidance(1), network), run(Guidance(4), network)
    expected = rescale_noise_cfg(plain, positive, rescale)
    torch.testing.assert_close(run(Guidance(4, rescale), network), expected)
    if rescale == 1:
        torch.testing.assert_close(expected.std(1), positive.std(1))


def test_autoguidance_leads_away_from_the_weaker_model():
    def weak(x, c_noise, label):
        return 0.5 * x

    network = Network()
    positive = OBJECTIVE.predict(network, TEXT)
    output = Guidance(2).guided(positive, autoguidance(positive, OBJECTIVE.predict(weak, TEXT)))(X, T)
    expected = 2 * positive(X, T) - 0.5 * X
    torch.testing.assert_close(output, expected)
    assert network.batches == [3, 3]


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="rescale"):
        Guidance(2, rescale=1.5)
    for interval in ((0.5, 0.2), (-0.1, 1), (0, 2), (0.5,), 0.5, ("a", "b")):
        with pytest.raises(ValueError, match="interval"):
            Guidance(2, interval=interval)  # type: ignore[arg-type]
    for scale in (float("nan"), "abc", None):
        with pytest.raises(ValueError, match="scale"):
            Guidance(scale)  # type: ignore[arg-type]


def test_a_network_that_answers_zero_can_be_rescaled():
    output = run(Guidance(4, 0.7), lambda x, c_noise, label: x * 0)
    assert torch.equal(output, torch.zeros_like(X))
