"""Argument checks that several public functions share, and keywords under their former names."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .errors import ArgumentError

_LONGEST = 200

# Takes an argument's name and value, and returns the value to use; raises ArgumentError.
Check = Callable[[str, Any], Any]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def shown(value: object) -> str:
    """Return the repr of a value for an error message: short, and safe whatever the value's own repr does."""
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
    if not isinstance(text, str) or not is_path(text):
        raise ArgumentError(f"{name}={shown(value)}: give {wanted}")
    return Path(text)


def is_path(text: str) -> bool:
    """Return whether a file could have this name: it is not empty and contains no forbidden characters."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an integer, including NumPy's; raise ArgumentError if it is not one or is outside the bounds."""
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    try:
        # Only numbers: a Path has no __index__, and a bool is not meant as a number.
        number = None if isinstance(value, bool) else operator.index(value)
    except Exception:  # noqa: BLE001 - the value is the caller's
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise ArgumentError(f"{name}={shown(value)}: give a whole number, {bounds}")
    return number


def check_count(name: str, value: object) -> int:
    """Return a whole number of at least 1; raises ArgumentError for anything else."""
    return check_integer(name, value, 1)


def check_number(name: str, value: Any, allowed: Callable[[float], bool], wanted: str) -> float:
    """Return a finite number, including NumPy's; raise ArgumentError if it is not one or is not allowed."""
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except Exception:  # noqa: BLE001 - the value is the caller's
        number = math.nan
    if not math.isfinite(number) or not allowed(number):
        raise ArgumentError(f"{name}={shown(value)}: give {wanted}")
    return number


def check_fraction(name: str, value: object) -> float:
    """Return a number from 0 to 1; raises ArgumentError for anything else."""
    return check_number(name, value, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return one of the choices; raises ArgumentError for anything else."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}={shown(value)}: choose one of {', '.join(choices)}")
    return str(value)


def check_flag(name: str, value: object) -> bool:
    """Return True or False, including NumPy's; raise ArgumentError for anything else."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ArgumentError(f"{name}={shown(value)}: give True or False")
    return bool(value)


def check_mapping(name: str, value: object) -> dict[str, Any]:
    """Return a mapping whose keys are strings; raises ArgumentError for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentError(f"{name}={shown(value)}: give a mapping of names to values")
    return dict(value)


def check_callable(name: str, value: object) -> object:
    """Return a function; raises ArgumentError for anything else."""
    if not callable(value):
        raise ArgumentError(f"{name}={shown(value)}: give a function")
    return value


def check_text(name: str, value: object) -> str:
    """Return a string; raises ArgumentError for anything else."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name}={shown(value)}: give a string")
    return value


def check_names(name: str, value: object) -> str | list[str]:
    """Return a string, or a list of strings; raises ArgumentError for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ArgumentError(f"{name}={shown(value)}: give a name or a list of names")
    return list(value)


def check_classes(name: str, value: Any) -> object:
    """Return a path, a mapping, or a list of strings; raises ArgumentError for anything else."""
    if isinstance(value, str | os.PathLike):
        return check_path(name, value)
    if isinstance(value, Mapping):
        return value
    try:
        items = list(value)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
        raise ArgumentError(f"{name}={shown(value)}: give a list of names, or the path of a text file") from None
    for item in items:
        if not isinstance(item, str):
            raise ArgumentError(f"{name} must be names, got {shown(item)} ({type(item).__name__})")
    return items


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """Return two integers, at least 1, from a list, tuple or array; raise ArgumentError for anything else."""
    try:
        height, width = (check_integer(name, side, 1) for side in value)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
        raise ArgumentError(f"{name}={shown(value)}: give (height, width), whole numbers, 1 or more") from None
    return height, width


def check_lengths(name: str, value: Any) -> tuple[int, ...]:
    """Return one to three whole numbers, at least 1; raise ArgumentError for anything else."""
    try:
        lengths = tuple(check_integer(name, side, 1) for side in value)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
        lengths = ()
    if not 1 <= len(lengths) <= 3:
        raise ArgumentError(
            f"{name}={shown(value)}: give (height, width), (time,) or (depth, height, width), whole numbers, 1 or more"
        )
    return lengths


def check_shard(name: str, value: object) -> tuple[int, int]:
    """Return (i, n) with i from 1 to n; raises ArgumentError for anything else."""
    number, count = check_pair(name, value)
    if number > count:
        raise ArgumentError(f"{name}={shown(value)}: give (i, n), the i-th of n shares, i from 1 to n")
    return number, count


def check_text_or_pair(name: str, value: object) -> str | tuple[int, int]:
    """Return a string or two whole numbers; raises ArgumentError for anything else."""
    return value if isinstance(value, str) else check_pair(name, value)


def optional(check: Check) -> Check:
    """Return a check that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


def checked(**checks: Check) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Check the types of a public function's arguments before it runs, one check for each name.

    What a check returns is passed to the function.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        positions = {name: number for number, name in enumerate(inspect.signature(function).parameters)}
        by_position = {positions[name]: (name, check) for name, check in checks.items()}

        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            for name in kwargs.keys() & checks.keys():
                kwargs[name] = checks[name](name, kwargs[name])
            positional: Any = [
                by_position[number][1](by_position[number][0], value) if number in by_position else value
                for number, value in enumerate(args)
            ]
            return function(*positional, **kwargs)

        return call

    return decorate


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
