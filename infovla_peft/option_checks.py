"""Checks of options that hold for any configuration: their types, their choices, and the lowest value of a number."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints


def check_at_least(config: Any, lowest: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not lowest <= value < math.inf:
            raise ValueError(f"{name} must be at least {lowest}, and finite, got {value}")


def settle_types(config: Any) -> None:
    """What argparse does on the command line, for the fields of configurations that are made in Python.

    A path becomes text, a tuple a list, a whole number an integer; a ValueError names what is of another type.
    """
    hints = get_type_hints(type(config))
    for name in type(config).__annotations__:
        value: Any = getattr(config, name)
        hint = hints[name]
        allowed = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        kinds = {get_origin(kind) or kind for kind in allowed} & set(_KINDS)
        if str in kinds and isinstance(value, Path):
            value = os.fspath(value)
        elif list in kinds and isinstance(value, tuple):
            value = list(value)
        elif int in kinds and type(value) is not bool and isinstance(value, Real) and float(value).is_integer():
            value = int(cast(Any, value))
        fits = any(isinstance(value, _KINDS[kind]) and isinstance(value, bool) <= (kind is bool) for kind in kinds)
        if kinds and not fits and not (value is None and NoneType in allowed):
            wanted = " or ".join("None" if kind is NoneType else getattr(kind, "__name__", kind) for kind in allowed)
            raise ValueError(f"{name} must be of type {wanted}, got {value!r:.80}")
        setattr(config, name, value)


_KINDS: dict[Any, type] = {int: Integral, float: Real, str: str, bool: bool, list: list}


def check_choices(config: Any) -> None:
    """What argparse does on the command line, for configurations that are made in Python."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {getattr(config, name)!r}")
