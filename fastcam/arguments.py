"""Checks of arguments that several public functions share, and keywords under their former names."""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from .errors import ArgumentError

_LONGEST = 200

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def shown(value: object) -> str:
    """Return the repr of a value for an error message: short, and whatever the value's own repr does."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the value is the caller's, and so is its repr
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_path(name: str, value: object, wanted: str = "a path") -> Path:
    """Return a path given as str or os.PathLike; raises ArgumentError for anything else, and for an empty string."""
    try:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
    except Exception:  # noqa: BLE001 - the value is the caller's
        text = None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(f"{name}={shown(value)}: give {wanted}")
    return Path(text)


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return a whole number, NumPy's included; raises ArgumentError if it is none or lies outside of the bounds."""
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    try:
        # Numbers only: a Path has no __index__, and a bool is not meant as a number.
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - the value is the caller's
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise ArgumentError(f"{name}={shown(value)}: give a whole number, {bounds}")
    return number


def check_number(name: str, value: object, allowed: Callable[[float], bool], wanted: str) -> float:
    """Return a finite number, NumPy's included; raises ArgumentError if it is none or not allowed."""
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - the value is the caller's
        number = math.nan
    if not math.isfinite(number) or not allowed(number):
        raise ArgumentError(f"{name}={shown(value)}: give {wanted}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return one of the choices; raises ArgumentError for anything else."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}={shown(value)}: choose one of {', '.join(choices)}")
    return str(value)


def check_flag(name: str, value: object) -> bool:
    """Return True or False, NumPy's included; raises ArgumentError for anything else."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ArgumentError(f"{name}={shown(value)}: give True or False")
    return bool(value)


def check_callable(name: str, value: object) -> None:
    """Raise ArgumentError unless the value is None or can be called."""
    if value is not None and not callable(value):
        raise ArgumentError(f"{name}={shown(value)}: give a function")


def renamed(**names: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Let a function take keywords under their former names, with a DeprecationWarning, for one release.

    Examples
    --------
    >>> @renamed(batch="batch_size")
    ... def train(*, batch_size=32): ...
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise ArgumentError(f"{old} is the former name of {new}: give only {new}")
                    warnings.warn(f"the keyword {old} is deprecated: use {new}", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
