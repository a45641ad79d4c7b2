import copy

import pytest
import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.network.by_reference import ByReference


class Holder(nn.Module):
    """A trained layer beside a frozen network that has weights, a buffer and dropout."""

    def __init__(self, sha256: str = "a1", value: float = 1.0):
        super().__init__()
        self.trained = nn.Linear(2, 2)
        linear = nn.Linear(2, 2)
        nn.init.constant_(linear.weight, value)
        self.frozen = ByReference(nn.Sequential(linear, nn.BatchNorm1d(2), nn.Dropout(0.5)), "some/model", sha256)

    @property
    def weight(self) -> Tensor:
        return self.frozen.module.get_parameter("0.weight")


def test_the_state_names_the_weights_and_does_not_hold_them():
    state = Holder().state_dict()
    assert set(state) == {"trained.weight", "trained.bias", "frozen._extra_state"}
    assert bytes(state["frozen._extra_state"].tolist()) == b"a1 some/model"
    assert Holder().state_dict(prefix="deep.").keys() == {f"deep.{key}" for key in state}


@pytest.mark.parametrize("assign", [False, True])
def test_a_strict_load_keeps_its_own_weights(assign):
    saved, other = Holder(value=1.0).state_dict(), Holder(value=2.0)
    keys = list(saved)
    other.load_state_dict(saved, strict=True, assign=assign)
    assert torch.equal(other.trained.weight, saved["trained.weight"])
    assert other.weight.eq(2).all() and not other.weight.requires_grad
    assert list(saved) == keys


def test_weights_in_a_state_are_not_taken():
    module = Holder(value=2.0)
    module.load_state_dict({**Holder().state_dict(), "frozen.module.0.weight": torch.zeros(2, 2)}, strict=True)
    assert module.weight.eq(2).all()


def test_a_state_of_other_weights_is_refused():
    with pytest.raises(UserError, match=r"with the weights of some/model \(SHA-256 a1…\), but those .* others \(b2…\)"):
        Holder("b2").load_state_dict(Holder("a1").state_dict())


def test_a_state_without_the_reference_is_incomplete():
    saved = Holder().state_dict()
    del saved["frozen._extra_state"]
    with pytest.raises(RuntimeError, match="Missing key"):
        Holder().load_state_dict(saved)


def test_it_is_frozen_in_every_mode():
    module = Holder().train()
    assert module.training and not any(part.training for part in module.frozen.modules())
    assert not module.frozen(torch.ones(3, 2, requires_grad=True)).requires_grad
    assert all(not p.requires_grad for p in module.frozen.parameters())


def test_a_copy_is_its_own():
    module = Holder()
    other = copy.deepcopy(module)
    other.weight.data.zero_()
    other.load_state_dict(module.state_dict())
    assert not other.weight.any() and module.weight.all()
