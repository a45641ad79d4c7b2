"""Other names for the tensors of a state."""

from collections.abc import Iterable, Mapping

from torch import Tensor


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with other names for its layers; what is in no table keeps its own, for `check_fit` to find."""
    result = {}
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        result[f"{names[layer]}.{parameter}" if layer in names else key] = value
    return result


def inverse(modules: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The table from ours to theirs, of pairs (theirs, ours)."""
    return {ours: theirs for theirs, ours in modules}
