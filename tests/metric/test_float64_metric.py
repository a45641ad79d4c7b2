import pytest
import torch

from carrara.metric.clip_score import CLIPScore
from carrara.metric.float64_metric import Float64Metric, sort_by_index
from carrara.metric.frechet import FrechetDistance
from carrara.metric.kernel_distance import KernelDistance
from carrara.metric.prompt_accuracy import PromptAccuracy
from carrara.metric.psnr import PSNR
from carrara.metric.r_precision import RPrecision
from carrara.metric.recall import Recall

METRICS = [
    lambda: FrechetDistance(4, num_images=100),
    lambda: FrechetDistance(4, num_images=4),
    lambda: KernelDistance(4),
    CLIPScore,
    lambda: RPrecision(4),
    lambda: Recall(4),
    lambda: PromptAccuracy(lambda captions, images: [{"all": caption == "right"} for caption in captions]),
    PSNR,
]


def fill(metric: Float64Metric, start: int = 0) -> None:
    generator = torch.Generator().manual_seed(7)
    index = torch.arange(start, start + 6)
    x, y = torch.randn(2, 6, 4, generator=generator)
    images = torch.randint(0, 256, (2, 6, 3, 4, 4), generator=generator, dtype=torch.uint8)
    captions = [str(int(i)) for i in index]
    match metric:
        case FrechetDistance():
            metric.update(x, real=True)
            metric.update(y, real=False)
        case KernelDistance():
            metric.update(x, index, real=True)
            metric.update(y, index, real=False)
        case CLIPScore():
            metric.update(x, x + y)
        case RPrecision() | Recall():
            metric.update(x, x + y, captions, index)
        case PromptAccuracy():
            metric.update(["right", "wrong"] * 3, images[0])
        case PSNR():
            metric.update(images[0], images[1])


def states(metric: Float64Metric) -> list[torch.Tensor]:
    values = metric.metric_state.values()
    return [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]


def flat(score: torch.Tensor | dict[str, torch.Tensor]) -> list[float]:
    return [float(value) for value in (score.values() if isinstance(score, dict) else [score])]


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.set_dtype(torch.float32),
        lambda m: torch.nn.ModuleList([m]).to(torch.float16)[0],
    ],
)
def test_states_stay_float64_under_every_conversion(make, convert):
    reference = make()
    fill(reference)
    metric = convert(make())
    fill(metric)
    convert(metric)
    assert all(state.dtype in (torch.float64, torch.int64) for state in states(metric))
    assert flat(metric.compute()) == flat(reference.compute())
    metric.reset()
    fill(metric)
    assert flat(metric.compute()) == flat(reference.compute())


@pytest.mark.parametrize("make", METRICS)
def test_a_checkpoint_never_contains_states(make):
    metric = make()
    fill(metric)
    assert states(metric)
    assert metric.state_dict() == {}


@pytest.mark.parametrize("make", METRICS)
def test_a_reset_under_inference_mode_can_be_updated_outside_it(make):
    metric = make()
    fill(metric)
    expected = flat(metric.compute())
    with torch.inference_mode():
        metric.reset()
        fill(metric)
        assert flat(metric.compute()) == expected
        metric.reset()
    fill(metric)
    assert flat(metric.compute()) == expected


@pytest.mark.parametrize("make", METRICS)
def test_states_follow_the_module_to_another_device(make):
    metric = make()
    fill(metric)
    metric.to("meta")
    assert all(state.device.type == "meta" for state in states(metric))
    assert metric.device.type == "meta"


def test_sort_by_index_refuses_a_sample_that_was_counted_twice():
    values = torch.arange(3.0)
    assert sort_by_index(torch.tensor([2, 0, 1]), values)[0].tolist() == [1.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="sample 4 was counted twice"):
        sort_by_index(torch.tensor([4, 0, 4]), values)
