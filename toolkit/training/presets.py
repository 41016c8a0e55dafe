"""YAML files that say only what they change: ``based_on`` and ``--preset``.

A recipe's YAML may be a short list of plain values on top of another file::

    based_on: ctc_base.yaml     # path relative to this file
    max_updates: 13000

It means exactly: run ``ctc_base.yaml`` with these values typed on the command line; so unknown keys and wrong types
are refused alike, and the real command line wins over both. ``--preset NAME`` puts the values of ``presets/NAME.yaml``
(beside the YAML or in a folder above it, nearest first) on top in the same way. There is no merging of tags, lists or
files beyond that: one chain, read from the base upward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from toolkit.errors import ConfigError

BASED_ON = "based_on"
PRESET = "preset"
NO_PRESET = "full"
"""The preset that changes nothing: the YAML as it stands trains to quality."""


def follow_presets(path: Path | str, overrides: Mapping[str, Any] | None = None) -> tuple[Path, dict[str, Any]]:
    """Resolve ``based_on`` and ``preset`` to one full YAML file and the overrides to apply to it.

    Arguments
    ---------
    path : the YAML that the user named.
    overrides : the command line's overrides, dotted keys or nested dicts; ``preset`` may be among them.

    Returns
    -------
    The file at the bottom of the chain, and one dict of dotted overrides: base first, then the files that stand on
    it, then the preset, then ``overrides`` (later wins). A path without either comes back as it is.

    Raises
    ------
    ConfigError : a file is missing, holds more than plain values, or the chain runs in a circle.
    """
    given = flatten(overrides or {})
    path = Path(path)
    layers = []
    preset = given.pop(PRESET, NO_PRESET)
    if preset != NO_PRESET:
        layers.append(plain_values(find_preset(path, str(preset))))
    seen = [path.resolve()]
    while (base := base_of(path)) is not None:
        values = plain_values(path)
        values.pop(BASED_ON)
        layers.append(values)
        path = base
        if path.resolve() in seen:
            raise ConfigError(f"{path}: based_on leads back to this file; let one file of the circle stand alone.")
        seen.append(path.resolve())
    merged: dict[str, Any] = {}
    for layer in (*reversed(layers), given):
        for key in layer:  # `model: {...}` replaces what was said about `model.x` before it, and the other way round
            for old in [old for old in merged if old.startswith(f"{key}.")]:
                del merged[old]
        merged.update(layer)
    return path, merged


def chain_of(path: Path | str) -> list[Path]:
    """The YAML and the files under it, topmost first."""
    files = [Path(path)]
    while (base := base_of(files[-1])) is not None and base not in files:
        files.append(base)
    return files


def base_of(path: Path) -> Path | None:
    """The file that ``path`` stands on, or None."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return None  # the reader of the YAML itself has the better sentence
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if key == BASED_ON and colon:
            name = value.split(" #")[0].strip().strip("'\"")
            base = path.parent / name
            if not base.is_file():
                raise ConfigError(f"{path}: based_on names {name!r}, which is not in {path.parent}; correct the name.")
            return base
    return None


def find_preset(path: Path, name: str) -> Path:
    """``presets/NAME.yaml`` beside the YAML or in the nearest folder above it (three levels are looked at)."""
    folders = [folder / "presets" for folder in path.resolve().parents[:4]]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({NO_PRESET, *(file.stem for folder in folders for file in folder.glob("*.yaml"))})
    raise ConfigError(f"preset {name!r} is not known for {path}; take one of {', '.join(known)}.")


def plain_values(path: Path) -> dict[str, Any]:
    """The values of a short YAML, flat; tags have no place in it."""
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: {getattr(error, 'problem', None) or 'not YAML'}; a file with based_on, like a preset, "
            "holds plain values only (no !new:, !ref and the like)."
        ) from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected `key: value` lines; see the files beside it.")
    return flatten(values)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings to dotted keys; an empty mapping stays a value.

    Example
    -------
    >>> flatten({"encoder": {"num_layers": 4}, "lr": 0.1, "lists": {}})
    {'encoder.num_layers': 4, 'lr': 0.1, 'lists': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}.{inner}": content for inner, content in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat
