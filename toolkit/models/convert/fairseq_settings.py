"""fairseq's settings, of either generation and any form, as plain values.

Until 2020 a checkpoint held one flat ``argparse.Namespace``; since then it holds nested groups, for a while as an
object of omegaconf's and later as plain dicts.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.models.convert.unpickle import StandIn

LONGEST_TEXT = 1000
"""Of a setting that is taken apart; Python's parser itself is not made for hostile texts."""

_UNFINISHED = object()


@dataclass(frozen=True)
class Settings:
    """A checkpoint's settings: the model's registered name, the groups, and which generation they are of."""

    name: str | None
    model: dict[str, Any]
    task: dict[str, Any]
    criterion: dict[str, Any]
    generation: str


def plain(value: Any) -> Any:
    """Settings of any form as dicts, lists, numbers and strings.

    Raises
    ------
    CheckpointError : they contain themselves.
    """
    return _plain(value, {})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """What occurs many times is turned once (``done``): else a small file could ask for years of work."""
    if not isinstance(value, argparse.Namespace | Mapping | list | tuple | StandIn):
        return value
    if id(value) not in done:
        done[id(value)] = _UNFINISHED
        try:
            done[id(value)] = _plain_container(value, done)
        except RecursionError as error:
            raise CheckpointError("the settings are nested too deeply; the file is damaged.") from error
    if done[id(value)] is _UNFINISHED:
        raise CheckpointError("the settings contain themselves; the file is damaged.")
    return done[id(value)]


def _plain_container(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value), done)
    if isinstance(value, Mapping):
        return {key: _plain(item, done) for key, item in value.items()}
    if not isinstance(value, StandIn):
        return [_plain(item, done) for item in value]
    state = value.state if isinstance(value.state, Mapping) else {}
    for content in ("_content", "_val"):  # of omegaconf's containers and nodes
        if content in state:
            return _plain(state[content], done)
    if state:
        return _plain(state, done)
    return _plain(value.args[0], done) if len(value.args) == 1 else None  # a choice of a list, by its value


def read_settings(config: Any, path: Path) -> Settings:
    """The settings in ``args`` or ``cfg``.

    Raises
    ------
    CheckpointError : they are no settings.
    """
    try:
        raw = plain(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the checkpoint holds no settings (args or cfg); without them nothing is known.")
    if not isinstance(raw.get("model"), dict):
        return Settings(_name(raw.get("arch")), raw, raw, raw, "args")
    groups = [_resolved(group_of(raw, key), raw) for key in ("model", "task", "criterion")]
    name = _name(groups[0].get("_name")) or _name(groups[0].get("arch"))
    return Settings(name, groups[0], groups[1], groups[2], "cfg")


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def group_of(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A group of settings, empty if there is none."""
    group = raw.get(key)
    return group if isinstance(group, dict) else {}


def _resolved(group: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """References to other settings (``${task.normalize}``) replaced by their values, by None where there is none."""
    resolved = {}
    for key, value in group.items():
        for _ in range(5):  # a reference to a reference; not for ever
            if not isinstance(value, str) or not (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
                break
            value = root
            for part in match[1].split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        resolved[key] = value
    return resolved


def setting(group: Mapping[str, Any], key: str, kind: type, default: Any, path: Path) -> Any:
    """A setting as a number, bool, list or string; older files hold some of them as text.

    Raises
    ------
    CheckpointError : the value is of another type.
    """
    value = group.get(key)
    if value is None:
        return default
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval(value) if len(value) <= LONGEST_TEXT else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if kind is list and isinstance(value, tuple):
        value = list(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    if type(value) is not kind:
        raise CheckpointError(f"{path}: the setting {key} is {short(group[key])}, expected {kind.__name__}.")
    return value


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
