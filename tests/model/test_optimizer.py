import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara.model import optimizer as optimizer_module
from carrara.model.optimizer import Muon, adamw, orthogonalize, parameter_groups, sgd, warmup_cooldown
from tests.tiny import diffusion_model, evaluator_model

SETTINGS: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "betas": (0.9, 0.99), "weight_decay": 0.1}


def polar(matrix: Tensor) -> Tensor:
    """The exact nearest semi-orthogonal matrix."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def conditioned(m: int, n: int, smallest: float = 0.05) -> Tensor:
    """A matrix whose singular values lie between `smallest` and 1."""
    u, _, v = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    return u * torch.linspace(1, smallest, min(m, n)) @ v


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 96), (48, 48), (40, 64), (1, 40), (8, 27)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_become_one_roughly(shape, scale, dtype):
    matrices = torch.stack([scale * conditioned(*shape) for _ in range(3)])  # of several at once, each is its own
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype=dtype).float())
    assert values.min() > (0.6 if dtype == torch.float32 else 0.5)
    assert values.max() < (1.3 if dtype == torch.float32 else 1.6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 96), (48, 48), (40, 64)])
def test_the_direction_is_the_polar_factor(shape, dtype):
    matrix = conditioned(*shape)
    assert cosine(orthogonalize(matrix[None], dtype=dtype)[0].float(), polar(matrix)) > 0.98
    assert cosine(matrix, polar(matrix)) < 0.95  # it was not, before


@pytest.mark.parametrize("shape", [(16, 40), (16, 20)])  # by the small square side, and by X itself
@pytest.mark.parametrize("steps", [1, 4])
def test_the_iteration_is_the_published_one(shape, steps):
    matrix = torch.randn(shape)
    x = matrix / matrix.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrix[None], steps)[0], x, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (64, 576)])
def test_a_gradient_of_low_rank_does_not_blow_up(shape, dtype):
    """Rounding turns its zero singular values into noise, which must not grow beyond the others."""
    for seed in range(5):
        torch.manual_seed(seed)
        matrix = torch.randn(shape[0], 1) @ torch.randn(1, shape[1]) + 1e-3 * torch.randn(shape)
        largest = torch.linalg.svdvals(orthogonalize(matrix[None], dtype=dtype)[0].float()).max()
        assert largest < 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (3, 7)])
def test_a_gradient_of_zeros_moves_nothing(shape, dtype):
    assert not orthogonalize(torch.zeros(1, *shape), dtype=dtype).any()


@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (32, 32)])
def test_it_takes_the_steps_of_torch_muon(monkeypatch, shape):
    """torch's makes one step more of the iteration and refuses kernels; otherwise it is the same."""
    monkeypatch.setattr(optimizer_module, "orthogonalize", partial(orthogonalize, steps=5))
    monkeypatch.setattr(optimizer_module, "_matmul_dtype", lambda device: torch.float32)
    ours = nn.Linear(shape[1], shape[0], bias=False)
    theirs = copy.deepcopy(ours)
    mine = Muon([{"params": [ours.weight], "muon": True}], **SETTINGS)
    reference = torch.optim.Muon(
        [theirs.weight], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        before = ours.weight.detach().clone(), theirs.weight.detach().clone()
        gradient = conditioned(*shape)
        for layer, optimizer in ((ours, mine), (theirs, reference)):
            layer.weight.grad = gradient.clone()
            optimizer.step()
        a, b = ours.weight.detach() - before[0], theirs.weight.detach() - before[1]
        assert cosine(a, b) > 0.999
        assert (a.norm() / b.norm()).item() == pytest.approx(1, abs=0.02)


def test_matrices_of_one_shape_do_not_share_their_steps():
    """They are multiplied together, in one batch."""
    layers = [nn.Linear(6, 4, bias=False) for _ in range(3)]
    alone = copy.deepcopy(layers)
    gradients = [torch.randn(4, 6) for _ in range(3)]
    for several, group in ((layers, [layers]), (alone, [[layer] for layer in alone])):
        for layer, gradient in zip(several, gradients, strict=True):
            layer.weight.grad = gradient.clone()
        for members in group:
            Muon([{"params": [layer.weight for layer in members], "muon": True}], **SETTINGS).step()
    for a, b in zip(layers, alone, strict=True):
        torch.testing.assert_close(a.weight, b.weight, atol=1e-6, rtol=1e-5)


def test_a_step_without_a_gradient_is_none():
    still, moved = nn.Linear(4, 4), nn.Linear(4, 4)
    before = copy.deepcopy(still.weight.detach())
    moved.weight.grad = torch.randn(4, 4)
    Muon(parameter_groups(nn.ModuleList([still, moved])), **SETTINGS).step()
    assert torch.equal(still.weight, before)


def test_kernels_are_trained_as_matrices():
    torch.manual_seed(0)
    kernel, matrix = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(27, 8, bias=False)
    gradient, start = torch.randn(8, 3, 3, 3), kernel.weight.detach().clone()
    with torch.no_grad():
        matrix.weight.copy_(kernel.weight.flatten(1))
    for layer in (kernel, matrix):
        layer.weight.grad = gradient.clone().view_as(layer.weight)
        Muon(parameter_groups(layer), **SETTINGS).step()
    torch.testing.assert_close(kernel.weight.flatten(1), matrix.weight)
    assert cosine(kernel.weight.detach() - start, -gradient) > 0.5


@pytest.mark.parametrize("shape", [(48, 24), (24, 96)])
def test_an_update_has_the_size_of_adamws(shape):
    """0.2 √max(m, n): a root mean square of about 0.2 lr, whatever the shape (Liu et al. 2025, eq. 4)."""
    p = nn.Parameter(torch.zeros(shape))
    p.grad = conditioned(*shape)
    Muon([{"params": [p], "muon": True}], **SETTINGS).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2 * SETTINGS["lr"], rel=0.25)


def test_everything_else_is_torch_adamw_bit_for_bit():
    ours = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(4, 3))]
    theirs = copy.deepcopy(ours)
    hidden = nn.Parameter(torch.randn(5, 5))
    groups = [
        {"params": [hidden], "muon": True},
        {"params": ours, "muon": False, "weight_decay": 0.0},
    ]
    mine = Muon(groups, **SETTINGS)
    reference = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        hidden.grad = torch.randn(5, 5)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_hidden_matrices_alone_take_muons_step():
    model = diffusion_model()
    named = {id(p): name for name, p in model.named_parameters()}
    groups = {group["muon"]: {named[id(p)] for p in group["params"]} for group in parameter_groups(model)}
    assert groups[True] | groups[False] == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not groups[True] & groups[False]
    for name in groups[True]:
        assert name.endswith(".weight") and model.get_parameter(name).ndim >= 2
    for name in (
        "predictor.network.conv_in.bias",
        "predictor.network.norm_out.weight",
        "predictor.network.middle.transformer.positions",
        "predictor.conditioner.transformer.tokens.weight",  # an embedding is a table, not a map
        "predictor.conditioner.transformer.blocks.0.attention.query_norm.weight",
    ):
        assert name in groups[False]
    assert "predictor.network.middle.residual.conv1.weight" in groups[True]
    assert "predictor.conditioner.transformer.blocks.0.attention.query.weight" in groups[True]
    assert next(g for g in parameter_groups(model) if not g["muon"])["weight_decay"] == 0


def test_what_a_module_names_is_not_hidden():
    class Net(nn.Module):
        not_hidden = ("out",)

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    net = Net()
    hidden, other = (group["params"] for group in parameter_groups(net))
    assert [id(p) for p in hidden] == [id(net.inner.weight)]
    assert {id(p) for p in other} == {id(net.inner.bias), id(net.out.weight), id(net.out.bias)}


def test_a_table_that_two_layers_share_is_the_embeddings_and_in_one_group():
    net = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4), "body": nn.Linear(4, 4)})
    net["head"].weight = net["table"].weight
    hidden, other = (group["params"] for group in parameter_groups(net))
    assert [id(p) for p in hidden] == [id(net["body"].weight)]
    assert sorted(map(id, other)) == sorted(map(id, (net["table"].weight, net["body"].bias)))


def test_what_is_frozen_is_in_no_group():
    model = evaluator_model()
    model.evaluator.text_tower.requires_grad_(False)
    there = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert there == {id(p) for p in model.parameters() if p.requires_grad}


def make(name: str, net: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(net)
    if name == "muon":
        return Muon(groups, **SETTINGS)
    return adamw(groups, 0.02, (0.9, 0.99), 0.1) if name == "adamw" else sgd(groups, 0.02)


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_a_saved_optimizer_goes_on_bit_for_bit(name, tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.Flatten(), nn.Linear(16, 3))
    gradients = [[torch.randn_like(p) for p in net.parameters()] for _ in range(6)]

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for k in steps:
            for p, g in zip(net.parameters(), gradients[k], strict=True):
                p.grad = g.clone()
            optimizer.step()

    whole = copy.deepcopy(net)
    train(whole, make(name, whole), range(6))
    optimizer = make(name, net)
    train(net, optimizer, range(3))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(saved["net"])
    again = make(name, fresh)
    again.load_state_dict(saved["optimizer"])
    train(fresh, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_a_closure_is_evaluated_with_gradients():
    layer = nn.Linear(3, 2)
    optimizer = Muon(parameter_groups(layer), **SETTINGS)
    before = layer.weight.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(layer.bias.sum().item(), abs=10)
    assert not torch.equal(layer.weight, before)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    factor = warmup_cooldown(warmup_steps=9, max_steps=100, cooldown=0.2)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert set(values[9:81]) == {1.0}
    assert values[80:] == pytest.approx([(100 - k) / 20 for k in range(80, 101)])
    assert values[99] > 0 and values[100] == 0


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0.0), (0, 1.0), (50, 1.0)])
def test_the_learning_rate_is_never_zero_before_the_end(warmup, cooldown):
    factor = warmup_cooldown(warmup, 20, cooldown)
    values = [factor(step) for step in range(20)]
    assert all(0 < value <= 1 for value in values)
    assert factor(20) == 0 and factor(10**6) == 0
    if (warmup, cooldown) == (0, 0.0):
        assert set(values) == {1.0}
    assert all(math.isfinite(value) for value in values)
