"""The check of a model's sizes, so that a wrong one is told before torch stumbles over it."""

from __future__ import annotations

from numbers import Integral

from toolkit.errors import ModelError


def check_sizes(*, least: int = 1, **values: object) -> None:
    """Refuse what is no whole number, or too small.

    Arguments
    ---------
    least : smallest number allowed.
    values : by the names that the message uses.

    Raises
    ------
    ModelError : one is not.

    Example
    -------
    >>> check_sizes(dim=16, num_heads=2)
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ModelError(f"{name} is {value!r}, expected a whole number, {least} or more.")
