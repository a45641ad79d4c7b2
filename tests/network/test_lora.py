import pytest
import torch
from torch import nn

from carrara.network.conditioning import Conditioning
from carrara.network.lora import add_lora, additions, load_base, merged
from tests.tiny import awake, dit, equal, unet, weights

ALL = ["query", "key", "value", "out"]


def answer(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, 8, generator=generator)
    conditioning = Conditioning(tokens, torch.ones(2, 3, dtype=torch.bool), tokens[:, 0])
    x = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        return network(x, torch.tensor([10.0, 500.0]), conditioning)


def stirred(network: nn.Module) -> nn.Module:
    """As if its additions had been trained."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("build", [unet, dit])
def test_it_begins_as_the_network_it_is_added_to(build):
    network = awake(build())
    expected = answer(network)
    add_lora(network, rank=2, alpha=4, targets=ALL)
    assert torch.allclose(answer(network), expected, atol=1e-6)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not torch.allclose(answer(stirred(network)), expected, atol=1e-3)


@pytest.mark.parametrize("build", [unet, dit])
def test_merged_is_w_plus_alpha_over_rank_b_a(build):
    network = awake(build())
    before = weights(network)
    add_lora(network, rank=2, alpha=6, targets=["query", "out"])
    stirred(network)
    with_additions, found = answer(network), additions(network)
    whole = merged(network)
    assert torch.allclose(answer(whole), with_additions, atol=1e-5)
    assert torch.equal(answer(network), with_additions)  # itself is as it was
    state = whole.state_dict()
    assert state.keys() == before.keys()
    parts = {name: p for name, p in network.named_parameters() if ".lora_" in name}
    for key, value in before.items():
        layer = key.removesuffix(".weight")
        if layer in found:
            a, b = (parts[f"{layer}.lora_{x}.default.weight"] for x in "AB")
            assert torch.allclose(state[key], value + 6 / 2 * b @ a, atol=1e-5)
            assert torch.allclose(found[layer][1] @ found[layer][0], 6 / 2 * b @ a, atol=1e-5)
        else:
            assert torch.equal(state[key], value)
    assert {name.rpartition(".")[2] for name in found} == {"query", "out"}


def test_the_base_is_filled_below_the_additions():
    other = awake(unet())
    network = unet()
    add_lora(network, rank=2, alpha=2, targets=ALL)
    load_base(network, other.state_dict())
    assert torch.allclose(answer(network), answer(other), atol=1e-6)
    stirred(network)
    held = weights(network)
    load_base(network, unet().state_dict())
    names = [name for name in held if ".lora_" in name]
    assert names and equal(held, weights(network), names)
    plain = unet()
    load_base(plain, other.state_dict())  # and without any it is the network itself
    assert torch.equal(answer(plain), answer(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["query", "up"]}, r"model\.lora\.targets=\['query', 'up'\]: some of query, key, value, out"),
        ({"targets": []}, r"model\.lora\.targets"),
        ({"rank": 0}, r"model\.lora\.rank=0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(unet(), **{"rank": 2, "alpha": 2, "targets": ALL} | settings)


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention"):
        add_lora(nn.Linear(2, 2), 2, 2, ALL)
