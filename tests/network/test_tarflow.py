import math

import pytest
import torch
from torch import Tensor, nn

from carrara.model.optimizer import parameter_groups
from carrara.network import tarflow as tarflow_module
from carrara.network.conditioning import Conditioning
from carrara.network.tarflow import CausalBlock, FlowBlock, TarFlow
from tests.tiny import awake, tarflow


def conditioning(batch: int = 2, length: int = 3, dtype: torch.dtype = torch.float32) -> Conditioning:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, length - 1] = length == 1
    return Conditioning(torch.randn(batch, length, 8, dtype=dtype), mask, torch.randn(batch, 8, dtype=dtype))


def flow(dtype: torch.dtype = torch.float32, **changes: object) -> TarFlow:
    """One that is far from the identity."""
    torch.manual_seed(0)
    return awake(tarflow(**changes)).to(dtype)  # type: ignore[return-value]


def plane(**changes: object) -> TarFlow:
    """A flow of points in the plane, as pictures (B, 1, 1, 2)."""
    return flow(torch.float64, in_channels=1, patch=1, **changes)


def test_it_begins_as_the_identity():
    x = torch.randn(2, 3, 8, 8)
    z, logdet = tarflow()(x, conditioning())
    assert torch.equal(z, x) and not logdet.any()


def test_layers_are_recomputed_where_asked_for_and_in_evaluation():
    """With the same answer and gradients."""
    x, said = torch.randn(2, 3, 8, 8), conditioning()
    calls, found = [], []
    for checkpointing, training in ((False, True), (True, True), (False, False)):
        model = flow(checkpointing=checkpointing).train(training)
        counted: list[int] = []
        for block in model.blocks:
            assert isinstance(block, FlowBlock)
            for layer in block.layers:
                assert isinstance(layer, CausalBlock)
                layer.norm1.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        start = x.clone().requires_grad_()
        z, logdet = model(start, said)
        (z.square().sum() - logdet.sum()).backward()
        calls.append(len(counted))
        found.append([z.detach(), logdet.detach(), start.grad, *(p.grad for p in model.parameters())])
    assert calls[1] == calls[2] == 2 * calls[0] > 0
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 2), (4, 12, 4), (2, 4, 1)])
@torch.no_grad()
def test_the_inverse_gives_the_picture_back(dtype, most, num_blocks, height, width, patch):
    """It goes patch by patch with caches, forward all at once without: both are the same function."""
    model, said = flow(dtype, num_blocks=num_blocks, patch=patch), conditioning(dtype=dtype)
    x = torch.randn(2, 3, height, width, dtype=dtype)
    z, _ = model(x, said)
    assert (z - x).abs().mean() > 0.1
    assert (model.inverse(z, said) - x).abs().max() < most
    assert (model(model.inverse(x, said), said)[0] - x).abs().max() < most


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_log_determinant_is_that_of_the_jacobian(num_blocks):
    model, said = flow(torch.float64, num_blocks=num_blocks), conditioning(dtype=torch.float64)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    _, logdet = model(x, said)
    for k in range(2):
        one = Conditioning(said.tokens[k : k + 1], said.mask[k : k + 1], said.pooled[k : k + 1])
        jacobian = torch.autograd.functional.jacobian(lambda x, one=one: model(x[None], one)[0][0], x[k])
        sign, wanted = torch.linalg.slogdet(jacobian.reshape(48, 48))
        assert sign == 1 and wanted.abs() > 0.1
        assert logdet[k].item() == pytest.approx(wanted.item(), abs=1e-9)


@torch.no_grad()
def test_the_density_integrates_to_one():
    model = plane(num_blocks=3)
    axis = torch.linspace(-9, 9, 121, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, None, None]
    said = conditioning(1, dtype=torch.float64)
    every = Conditioning(*(t.expand(len(points), *t.shape[1:]) for t in (said.tokens, said.mask, said.pooled)))
    z, logdet = model(points, every)
    density = (logdet - 0.5 * z.square().sum((1, 2, 3))).exp() / (2 * math.pi)
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-3)
    assert (density - (-0.5 * points.square().sum((1, 2, 3))).exp() / (2 * math.pi)).abs().max() > 0.05


def dependence(block: nn.Module, tokens: int = 5) -> Tensor:
    """(tokens, tokens) bool: whether z_i depends on x_j."""
    assert isinstance(block, FlowBlock)
    features = block.project_in.in_features
    positions, angles = torch.randn(tokens, 16, dtype=torch.float64), torch.randn(tokens, 4, dtype=torch.float64)
    said, x = conditioning(1, dtype=torch.float64), torch.randn(tokens, features, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x[None], positions, angles, said)[0][0], x)
    return jacobian.abs().amax((1, 3)) > 0


def test_no_patch_sees_those_after_it_and_directions_alternate():
    forwards, backwards, again = flow(torch.float64, num_blocks=3).blocks
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(dependence(forwards), past)
    assert torch.equal(dependence(backwards), past.T)
    assert torch.equal(dependence(again), past)


def test_shift_and_scale_of_a_patch_are_made_without_it():
    """On the Jacobian's diagonal blocks are scales only: a diagonal matrix, the same wherever the patch is moved."""
    model, said = flow(torch.float64, num_blocks=1), conditioning(1, dtype=torch.float64)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    moved = x.clone()
    moved[..., 2:, 2:] += 1  # the last patch
    (a, of_a), (b, of_b) = model(x, said), model(moved, said)
    torch.testing.assert_close(of_a, of_b)
    same = torch.ones(4, 4, dtype=torch.bool)
    same[2:, 2:] = False
    assert torch.equal(a[..., same], b[..., same])
    assert (a - b)[..., 2:, 2:].abs().min() > 0


def test_sampling_makes_each_patch_once():
    model, said = flow(num_blocks=2, depth=2), conditioning()
    patches: list[int] = []
    words: list[int] = []
    for block in model.blocks:
        assert isinstance(block, FlowBlock)
        block.project_in.register_forward_hook(lambda _, given, out: patches.append(given[0].shape[1]))
        for layer in block.layers:
            assert isinstance(layer, CausalBlock)
            layer.cross_attention.key.register_forward_hook(lambda _, given, out: words.append(given[0].shape[1]))
    with torch.no_grad():
        model.inverse(torch.randn(2, 3, 8, 8), said)
    assert patches == [1] * 2 * 16
    assert words == [3] * 2 * 2


def test_the_caption_is_heard_and_its_padding_is_not():
    model, x = flow(), torch.randn(2, 3, 8, 8)
    said = conditioning()
    z, _ = model(x, said)
    tokens, pooled = said.tokens.clone(), said.pooled.clone()
    tokens[:, 0] += 1
    pooled[:, 0] += 1
    assert (model(x, Conditioning(tokens, said.mask, said.pooled))[0] - z).abs().max() > 1e-3
    assert (model(x, Conditioning(said.tokens, said.mask, pooled))[0] - z).abs().max() > 1e-3
    padded = said.tokens.clone()
    padded[0, 2] = 100
    torch.testing.assert_close(model(x, Conditioning(padded, said.mask, said.pooled))[0], z)


def test_patches_know_their_places():
    """Without attention, those of a picture of one colour are told apart by their places alone."""
    z, _ = flow(num_blocks=1, depth=0)(torch.ones(1, 3, 8, 8), conditioning(1, length=1))
    patches = z.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(16, -1)[1:]  # the first sees nothing
    assert (torch.cdist(patches, patches) + torch.eye(15)).min() > 1e-3


def test_attention_has_rotary_positions(monkeypatch):
    """Without the added positions and without angles the order of earlier patches is not seen; with angles it is."""
    monkeypatch.setattr(tarflow_module, "sinusoidal_positions", lambda *_: torch.zeros(()))
    model, said, x = flow(num_blocks=1), conditioning(1), torch.randn(1, 3, 4, 4)
    swapped = torch.cat([x[..., :2, :].roll(2, dims=3), x[..., 2:, :]], dim=2)

    def difference() -> float:
        with torch.no_grad():
            return float((model(x, said)[0] - model(swapped, said)[0])[..., 2:, 2:].abs().max())

    with_angles = difference()
    monkeypatch.setattr(tarflow_module, "axial_angles", lambda h, w, features, _: torch.zeros(h * w, features // 2))
    assert difference() < 1e-6 < 1e-3 < with_angles


@torch.no_grad()
def test_a_guide_combines_what_the_conditionings_say_of_each_patch():
    model, a, b = flow(num_blocks=2), conditioning(), conditioning()
    z = torch.randn(2, 3, 4, 4)
    *_, guided = model.inverse_steps(z, a.cat(b), lambda parameters: parameters.chunk(2)[1])
    torch.testing.assert_close(guided, model.inverse(z, b), atol=1e-5, rtol=0)
    assert not torch.allclose(guided, model.inverse(z, a), atol=0.01)


@pytest.mark.parametrize("depth", [1, 2])
def test_every_parameter_is_trained(depth):
    model = flow(depth=depth)
    z, logdet = model(torch.randn(2, 3, 8, 8), conditioning())
    (z.square().sum() - logdet.sum()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_under_autocast_only_the_layers_inside_are_rounded():
    model, said, x = flow(), conditioning(), torch.randn(2, 3, 8, 8)
    dtypes: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, given, out, name=name: dtypes.update({name: out.dtype} if isinstance(out, Tensor) else {})
        )
    wanted, _ = model(x, said)
    with torch.autocast("cpu", torch.bfloat16):
        words = Conditioning(said.tokens.bfloat16(), said.mask, said.pooled.bfloat16())
        z, logdet = model(x, words)
    assert (z.dtype, logdet.dtype, dtypes["blocks.0.project_out"]) == (torch.float32,) * 3
    assert all(dtypes[f"blocks.0.layers.0{part}"] == torch.bfloat16 for part in ("", ".norm1", ".feed_forward"))
    torch.testing.assert_close(z, wanted, atol=0.1, rtol=0.1)


def test_the_projections_from_and_to_pixels_are_not_hidden():
    model = tarflow()
    _, other = ({id(p) for p in group["params"]} for group in parameter_groups(model))
    assert {id(p) for block in model.blocks for p in (block.project_in.weight, block.project_out.weight)} <= other  # type: ignore[union-attr]


@pytest.mark.parametrize("changes", [{"heads": 3}, {"width": 12}])
def test_heads_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="heads of 4, 8, 12"):
        tarflow(**changes)


def test_a_picture_that_the_patch_does_not_divide_is_refused():
    for height, width in ((9, 8), (8, 9)):
        with pytest.raises(ValueError, match="a patch of 2 does not divide"):
            tarflow()(torch.randn(2, 3, height, width), conditioning())
