"""The network that restores pictures: against a transposed convolution, counts in closed form, and what it is shown."""

import pytest
import torch
import torch.nn.functional as F

from carrara.model.optimizer import parameter_groups
from carrara.network.drunet import DRUNet
from tests.tiny import awake, drunet


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (4, 9)])
@torch.no_grad()
def test_it_gives_the_shape_of_its_input_whatever_that_is(size):
    network = awake(drunet(channels=[8, 12, 16]))
    assert network(torch.randn(2, 3, *size)).shape == (2, 3, *size)


@torch.no_grad()
def test_a_padded_picture_is_answered_as_if_its_edge_went_on():
    network, x = awake(drunet(channels=[8, 12, 16])), torch.randn(1, 3, 14, 11)
    wider = torch.cat([x, x[..., -1:]], dim=3)
    whole = torch.cat([wider, wider[..., -1:, :], wider[..., -1:, :]], dim=2)
    torch.testing.assert_close(network(x), network(whole)[..., :14, :11])


@torch.no_grad()
def test_it_begins_as_the_picture_or_as_grey():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(drunet()(x), x)
    assert not drunet(residual=False)(x).any()


@torch.no_grad()
def test_a_residual_is_added_to_what_is_given():
    network, x = awake(drunet(residual=False)), torch.randn(2, 3, 8, 8)
    residual = drunet()
    residual.load_state_dict(network.state_dict())
    torch.testing.assert_close(residual(x), x + network(x))


@torch.no_grad()
def test_a_large_picture_is_restored_as_its_parts_are():
    """Away from what a part's edges reach: nothing of a picture is shared by all its pixels."""
    network, x = awake(drunet()), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network(x)[..., 24:40, 24:40], network(x[..., 8:56, 8:56])[..., 16:32, 16:32])


@torch.no_grad()
def test_levels_are_reached_by_a_transposed_convolution():
    upsample = drunet(channels=[8, 16]).upsample[0]
    state = upsample.state_dict()
    kernel = state["0.weight"].reshape(8, 2, 2, 16).permute(3, 0, 1, 2)
    x = torch.randn(2, 16, 5, 6)
    expected = F.conv_transpose2d(x, kernel, stride=2) + state["0.bias"].reshape(8, 2, 2).repeat(1, 5, 6)
    torch.testing.assert_close(upsample(x), expected)


def test_its_size_is_that_of_the_papers():
    """32.6 million without biases: 7 levels of 4 blocks, and what leads from one to another."""
    with torch.device("meta"):
        network = DRUNet([64, 128, 256, 512], 4, True)
    widths = (64, 128, 256)
    blocks = 4 * 2 * 9 * (2 * sum(width**2 for width in widths) + 512**2)
    steps = 2 * sum(4 * width * 2 * width for width in widths)
    kernels = blocks + steps + 2 * 9 * 3 * 64
    assert sum(p.numel() for p in network.parameters() if p.ndim > 1) == kernels
    assert kernels == pytest.approx(32.6e6, rel=0.01)


def test_all_but_the_first_and_the_last_layer_take_muons_step():
    network = drunet()
    muon, other = (group["params"] for group in parameter_groups(network))
    ends = {id(network.conv_in.weight), id(network.conv_out.weight)}
    assert {id(p) for p in other if p.ndim > 1} == ends
    assert len(muon) == len([p for p in network.parameters() if p.ndim > 1]) - 2


@pytest.mark.parametrize("settings", [{"channels": []}, {"num_blocks": 0}])
def test_without_levels_or_blocks_it_says_so(settings):
    with pytest.raises(ValueError, match=r"network\.channels=.* and network\.num_blocks=.*needs a level"):
        drunet(**settings)
