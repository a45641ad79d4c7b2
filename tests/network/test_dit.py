from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from carrara.model.optimizer import parameter_groups
from carrara.network import dit as dit_module
from carrara.network.conditioning import Conditioning
from carrara.network.dit import CrossBlock, DiT, JointBlock, sinusoidal_positions
from tests.tiny import awake, dit

SIZES = Path(__file__).parents[2] / "conf" / "size"
DIT_XL_2 = 675_129_632  # parameters of the published network, told of classes instead of text
TEXTS = ["cross", "joint"]


def conditioning(batch: int = 2, length: int = 3) -> Conditioning:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Conditioning(torch.randn(batch, length, 8), mask, torch.randn(batch, 8))


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.linspace(10, 900, batch)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_base_size_is_a_dit_xl_and_what_attends_to_the_text():
    size = yaml.safe_load((SIZES / "base.yaml").read_text())
    width = size["conditioner"]["width"]
    keys = ("patch", "width", "depth", "heads", "expansion")
    network = {key: size["latent_dit"][key] for key in keys}
    with torch.device("meta"):
        model = DiT(in_channels=4, context_width=width, pooled_width=width, text="cross", **network)
    assert count(model) == 798_347_536
    blocks = [block for block in model.blocks if isinstance(block, CrossBlock)]
    assert len(blocks) == 28
    without_text = count(model) - sum(count(block.cross_attention) + count(block.norm2) for block in blocks)
    assert without_text == pytest.approx(DIT_XL_2, rel=0.002)


@pytest.mark.parametrize("text", TEXTS)
def test_every_block_begins_as_the_identity(text):
    model = dit(text=text)
    (x, time), said = inputs(), conditioning()
    kept: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, made: kept.append((given[0], made[0])))
    model(x, time, said)
    assert len(kept) == 2
    for before, after in kept:
        assert torch.equal(before, after) and before.any()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_it_gives_the_shape_of_its_input(text, patch):
    model = awake(dit(text=text, patch=patch))
    time = torch.tensor([1.0, 2.0])
    for height, width in ((8, 8), (16, 8), (4, 12)):
        x = torch.randn(2, 3, height, width)
        assert model(x, time, conditioning()).shape == x.shape


def test_a_patch_comes_back_to_its_place():
    """With a bare network between them, what is made of one patch is where the patch was."""
    model = awake(dit(depth=0))
    (x, time), said = inputs(), conditioning()
    other = x.clone()
    other[0, :, 2:4, 6:8] += 1
    changed = (model(other, time, said) - model(x, time, said)).abs().amax(1) > 1e-6
    wanted = torch.zeros(2, 8, 8, dtype=torch.bool)
    wanted[0, 2:4, 6:8] = True
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize("text", TEXTS)
def test_patches_know_their_places(text):
    """Those of a picture of one colour are told apart, also with a text of a single word, which all attend to alike."""
    model = awake(dit(text=text))
    answer = model(torch.ones(1, 3, 8, 8), torch.tensor([500.0]), conditioning(1, length=1))
    patches = answer.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(16, -1)
    assert (torch.cdist(patches, patches) + torch.eye(16)).min() > 1e-3


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("axis", [2, 3])
def test_attention_has_rotary_positions(text, axis, monkeypatch):
    """Without the added positions and without angles a mirrored picture gives the mirrored answer; with angles not."""
    monkeypatch.setattr(dit_module, "sinusoidal_positions", lambda *_: torch.zeros(()))
    model = awake(dit(text=text, patch=1))
    (x, time), said = inputs(), conditioning()

    def error() -> float:
        with torch.no_grad():
            return float((model(x.flip(axis), time, said).flip(axis) - model(x, time, said)).abs().max())

    with_angles = error()
    monkeypatch.setattr(dit_module, "axial_angles", lambda h, w, features, _: torch.zeros(h * w, features // 2))
    assert error() < 1e-5 < 1e-3 < with_angles


def test_added_positions_tell_rows_from_columns():
    positions = sinusoidal_positions(3, 5, 8)
    assert positions.shape == (15, 8)
    grid = positions.unflatten(0, (3, 5))
    assert torch.equal(grid[:, 0, :4], grid[:, 4, :4]) and torch.equal(grid[0, :, 4:], grid[2, :, 4:])
    assert (torch.cdist(positions, positions) + torch.eye(15)).min() > 0.1


@pytest.mark.parametrize("text", TEXTS)
def test_checkpointing_recomputes_and_gives_the_same_answer_and_gradients(text):
    (x, time), said = inputs(), conditioning()
    calls, answers, gradients = [], [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = dit(text=text, checkpointing=checkpointing).train()
        awake(model)
        counted: list[int] = []
        for block in model.blocks:
            assert isinstance(block, CrossBlock | JointBlock)
            norm = block.norm1 if isinstance(block, CrossBlock) else block.image.norm1
            norm.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        answer = model(x, time, said)
        answer.square().sum().backward()
        calls.append(len(counted))
        answers.append(answer.detach())
        gradients.append([p.grad for p in model.parameters()])
    assert calls == [2, 4]
    assert torch.equal(*answers)
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_every_parameter_is_trained(text, depth):
    """Also those of the text in the last joint block: DDP waits for the gradient of each."""
    model = awake(dit(text=text, depth=depth))
    (x, time), said = inputs(), conditioning()
    model(x, time, said).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_promoted_to_float32_under_autocast(text):
    """Tokens stay bfloat16 between and inside the blocks; a sum with one float32 tensor would change all after it."""
    model = dit(text=text)
    awake(model)
    seen: list[tuple[str, torch.dtype]] = []
    for name, module in model.blocks.named_modules():
        module.register_forward_hook(
            lambda _, given, made, name=name: seen.extend(
                (name, t.dtype) for t in (*given, *made) if isinstance(t, Tensor) and t.ndim == 3
            )
        )
    (x, time), said = inputs(), conditioning()
    with torch.autocast("cpu", torch.bfloat16):
        said = Conditioning(said.tokens.bfloat16(), said.mask, said.pooled.bfloat16())
        assert model(x, time, said).dtype == torch.bfloat16
    assert seen and not [name for name, dtype in seen if dtype != torch.bfloat16]


def test_the_projections_from_and_to_pixels_are_not_hidden():
    model = dit()
    muon, other = ({id(p) for p in group["params"]} for group in parameter_groups(model))
    assert {id(model.project_in.weight), id(model.project_out.weight)} <= other
    assert id(model.norm_out.modulation.weight) in muon


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "a width of 16 is not 3 heads of 4, 8, 12 … features"),
        ({"width": 12}, "a width of 12 is not 2 heads of 4"),
        ({"text": "none"}, "network.text is 'none', not cross or joint"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dit(**changes)


def test_a_picture_that_the_patch_does_not_divide_is_refused():
    for height, width in ((9, 8), (8, 9)):
        with pytest.raises(ValueError, match="a patch of 2 does not divide"):
            dit()(torch.randn(2, 3, height, width), torch.ones(2), conditioning())
