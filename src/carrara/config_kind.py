"""Whether a setting's value is of the kind that the constructor which reads it says."""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union

_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list",
    dict: "a group of settings", NoneType: "null",
}  # fmt: skip


def mismatch(reader: Callable[..., Any], key: str, value: object) -> str | None:
    """What a value of YAML should be instead, `a number or a list`, `clean or noisy`; None if it may be what it is.

    Args:
        reader: the class or function that has a parameter `key`.
    """
    allowed = _kinds(_annotations(reader).get(key, Any))
    if allowed is None or type(value) in allowed or (isinstance(value, str) and value in allowed):
        return None
    choices = sorted(one for one in allowed if isinstance(one, str))
    words = choices + [
        word for kind, word in _WORDS.items() if kind in allowed and not (kind is int and float in allowed)
    ]
    return " or ".join(words)


def _annotations(reader: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.getattr_static(reader, "__init__") if isinstance(reader, type) else reader)
    except NameError:  # of a name that is imported for type checkers alone
        return {}


def _kinds(annotation: Any) -> frozenset[type | str] | None:
    """The types of plain data that fit an annotation, and the words of a `Literal`; None where it does not say."""
    plain = typing.get_origin(annotation) or annotation
    if plain in (Union, UnionType):
        found = [_kinds(one) for one in typing.get_args(annotation)]
        return None if None in found else frozenset[type | str]().union(*(one for one in found if one is not None))
    if plain is Literal:
        return frozenset(typing.get_args(annotation))
    if plain is float:
        return frozenset((float, int))
    if plain in (bool, int, str, NoneType):
        return frozenset((plain,))
    if isinstance(plain, type) and issubclass(plain, Mapping):
        return frozenset((dict,))
    return frozenset((list,)) if isinstance(plain, type) and issubclass(plain, Sequence) else None
