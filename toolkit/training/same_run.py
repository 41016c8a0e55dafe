"""Whether a checkpoint belongs to the run that wants to go on from it: the same data, the same settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.training.checkpoint_format import some_names

_ABSENT = object()


def require_same_data(
    path: Path, saved: Mapping[str, str], now: Mapping[str, str], *, describe: Mapping[str, Callable[[], str]]
) -> None:
    """CheckpointError where a data set is not the one of the checkpoint ``path``; nothing is compared with none.

    Arguments
    ---------
    saved, now : fingerprints by name.
    describe : by name, what says in words how the rows differ.
    """
    names = saved.keys() | now.keys()
    changed = [name for name in names if saved.get(name) != now.get(name)]
    if saved and now and changed:
        how = [(name, describe.get(name, str)()) for name in sorted(changed)]
        told = [f"{name} ({words})" if words else name for name, words in how]
        raise CheckpointError(
            f"the data changed since the checkpoint {path}: {some_names(told)}; its place in the epoch means other "
            "data now. Restore the former data to go on with this run, or give another --output_folder to begin one "
            "on the new data."
        )


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings differ, in words; empty where none does, or nothing is known of one side.

    Example
    -------
    >>> changed_settings({"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1, "dropout": 0.1})
    'dropout (not set) -> 0.1, lr 0.1 -> 0.2'
    """
    if not saved or not now:
        return ""
    changed = [
        f"{name} {_shown(saved, name)} -> {_shown(now, name)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]
    return some_names(changed, limit=8) if changed else ""


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "(not set)"
