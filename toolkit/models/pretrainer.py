"""Pretrainer: brings weights from model folders into named parts of an experiment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from toolkit.errors import CheckpointError, ConfigError
from toolkit.models.model_files import ModelConfig, load_tensors, read_model_folder


@dataclass(frozen=True)
class LoadedPart:
    """What happened to one part: how many tensors it has, which were not in the folder, which were too many there."""

    name: str
    folder: str
    config: ModelConfig
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def loaded(self) -> int:
        """Tensors that were loaded."""
        return self.total - len(self.missing)

    def __str__(self) -> str:
        words = f"{self.name}: {self.loaded} of {self.total} tensors from {self.folder} (kind {self.config.kind})"
        if self.missing:
            words += f"; fresh: {', '.join(self.missing)}"
        if self.unexpected:
            words += f"; left out: {', '.join(self.unexpected)}"
        return words


class Pretrainer:
    """Loads parts of models by name, strictly.

    A part takes the tensors under its own name in the folder (``encoder`` those under ``encoder.``), or all of them
    where there are none under it. So the encoder of a pretraining or CTC folder and a whole model load alike.

    Arguments
    ---------
    loadables : modules by name.
    paths : a model folder for each; None leaves the part as it is.
    allow_missing, allow_unexpected : patterns (``head.*``) of tensors that may be missing in a folder, or too many.

    Raises
    ------
    ConfigError : names in ``paths`` that are not in ``loadables``.

    Example
    -------
    >>> Pretrainer(loadables={"encoder": nn.Linear(2, 2)}, paths={"encoder": None}).load()
    []
    """

    def __init__(
        self,
        loadables: Mapping[str, nn.Module],
        paths: Mapping[str, str | os.PathLike[str] | None],
        *,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
    ) -> None:
        if unknown := sorted(paths.keys() - loadables.keys()):
            raise ConfigError(
                f"the pretrainer has a folder for {unknown[0]!r}, but its parts are {', '.join(sorted(loadables))}."
            )
        self.loadables, self.paths = dict(loadables), dict(paths)
        self.allow_missing, self.allow_unexpected = tuple(allow_missing), tuple(allow_unexpected)

    def load(self) -> list[LoadedPart]:
        """Load every part that has a folder.

        Returns
        -------
        A report on each; ``str()`` of it is a line for the log.

        Raises
        ------
        CheckpointError : a folder cannot be used, or tensors are missing, too many or of other shapes.
        """
        return [self._load(name, path) for name, path in self.paths.items() if path is not None]

    def _load(self, name: str, path: str | os.PathLike[str]) -> LoadedPart:
        contents = read_model_folder(path)
        module = self.loadables[name]
        own, theirs = module.state_dict().keys(), contents.part(name)
        # The encoder's own names never start with its part's name, so only whole encoders fall back to all tensors.
        missing = tuple(sorted(own - theirs.keys()))
        unexpected = tuple(sorted(theirs.keys() - own))
        allowed = _matching(missing, self.allow_missing) | _matching(unexpected, self.allow_unexpected)
        load_tensors(module, theirs, source=path, allowed=allowed)
        if len(missing) == len(own):
            raise CheckpointError(f"{path}: none of the {len(own)} tensors of {name!r} is in the folder; give another.")
        return LoadedPart(name, os.fspath(path), contents.config, len(own), missing, unexpected)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
