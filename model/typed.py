"""Arguments of the wrong Python type are refused by name, before they fail somewhere inside. A leaf."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, Union

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", type(None): "None"}


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which first raises ValueError naming an argument whose type is not the one that it is annotated with.

    Only what an annotation says on its surface: a number, string, path, tensor, class or one of several of these; a
    list's elements are not looked at. A bool is no number here, though Python has it as one.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        for name, hint in _hints(function).items():
            if name in given and not _matches(given[name], hint):
                raise ValueError(f"{name}: expected {_described(hint)}, got {_shown(given[name])}")
        return function(*args, **kwargs)

    return checked


def check_ids(name: str, ids: Any) -> None:
    """Raises ValueError naming the argument where it is no tensor of whole numbers. A compiler may read this."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else _shown(ids)
        raise ValueError(f"{name}: expected a tensor of whole numbers, int64 or int32, got {got}")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the arguments that take one value each; those that cannot be resolved are left out."""
    found = {}
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in inspect.signature(function).parameters.values():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, vars(inspect.getmodule(function)))
            except (NameError, AttributeError):  # imported for the type checker alone
                continue
        if annotation is not inspect.Parameter.empty and parameter.kind in plain:
            found[parameter.name] = annotation
    return found


def _options(hint: Any) -> tuple[Any, ...]:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, Union) else (hint,)
    return tuple(type(None) if option is None else option for option in options)


def _matches(value: Any, hint: Any) -> bool:
    return any(_is(value, option) for option in _options(hint))


def _is(value: Any, kind: Any) -> bool:
    kind = typing.get_origin(kind) or kind
    if kind is Any or not isinstance(kind, type):  # Any, a type variable, a string's literal
        return True
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if issubclass(kind, os.PathLike):
        return isinstance(value, os.PathLike)
    if issubclass(kind, nn.Module) and isinstance(value, nn.Module):
        return True  # what wraps a model, a compiled one, stands for it
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(value, kind)


def _described(hint: Any) -> str:
    names = []
    for option in _options(hint):
        kind = typing.get_origin(option) or option
        names.append("a path" if _is_path(kind) else _NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}")
    if "a path" in names and "a string" in names:
        names.remove("a string")
    return " or ".join(names)


def _is_path(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, os.PathLike)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str | bytes | int | float):
        return repr(value)
    return f"a {type(value).__name__}"
