"""Pretrainer: brings weights from models of any known kind of file into named parts of an experiment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from toolkit.data.tokens import Tokenizer, dictionary_difference
from toolkit.errors import CheckpointError, ConfigError
from toolkit.models.convert.common import Converted
from toolkit.models.convert.load import check_difference
from toolkit.models.convert.read import read_pretrained
from toolkit.models.model_files import TEXT_KINDS, ModelConfig, load_tensors


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
    paths : a ``model/`` folder, or a file or folder of another program (see :mod:`toolkit.models.convert`), for each;
        None leaves the part as it is.
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
        return load_part(
            name,
            self.loadables[name],
            read_pretrained(path),
            path,
            allow_missing=self.allow_missing,
            allow_unexpected=self.allow_unexpected,
        )


def load_part(
    name: str,
    module: nn.Module,
    contents: Converted,
    path: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> LoadedPart:
    """Load one part, see :class:`Pretrainer`, out of what was read from ``path``."""
    # What is missing is judged by the part, below.
    check_difference(contents, path, allow_missing=["*"], allow_unexpected=allow_unexpected)
    own, theirs = module.state_dict().keys(), contents.part(name)
    # The encoder's own names never start with its part's name, so only whole encoders fall back to all tensors.
    missing = tuple(sorted(own - theirs.keys()))
    unexpected = tuple(sorted(theirs.keys() - own))
    fresh = {other.removeprefix(f"{name}.") for other in contents.info.fresh}
    allowed = _matching(missing, allow_missing) | _matching(unexpected, allow_unexpected) | fresh
    load_tensors(module, theirs, source=path, allowed=frozenset(allowed))
    if len(missing) == len(own):
        raise CheckpointError(f"{path}: none of the {len(own)} tensors of {name!r} is in the folder; give another.")
    return LoadedPart(name, os.fspath(path), contents.config, len(own), missing, unexpected)


def load_whole_model(
    model: nn.Module,
    folder: str | os.PathLike[str] | None,
    *,
    kind: str,
    sample_rate: int,
    normalize: bool,
    say: Callable[[str], object],
    tokenizer: Tokenizer | None = None,
) -> tuple[int, bool]:
    """Load a model of a known kind from its folder, and what audio it hears.

    Arguments
    ---------
    model : takes all tensors of the folder.
    folder : of any kind that the Pretrainer takes; None leaves the model as it is.
    kind : what the folder has to be of.
    sample_rate, normalize : Hz and normalization of the settings, for a model without a folder; 0 and False of text.
    say : takes the report.
    tokenizer : of the data; its dictionary must be the folder's, where that has one.

    Returns
    -------
    Sample rate (Hz) and normalization: those of the folder, where there is one.

    Raises
    ------
    CheckpointError : the folder cannot be used, is of another kind or dictionary, or does not fit the model.

    Example
    -------
    >>> load_whole_model(nn.Linear(2, 2), None, kind="ctc", sample_rate=8000, normalize=True, say=print)
    (8000, True)
    """
    if folder is None:
        return sample_rate, normalize
    contents = read_pretrained(folder)
    config = contents.config
    if config.kind != kind:
        raise CheckpointError(
            f"{folder}: this is a model of kind {config.kind!r}, expected {kind!r}; give the model/ folder of a run of "
            "that kind."
        )
    if difference := dictionary_difference(contents.tokenizer, tokenizer):
        raise CheckpointError(
            f"{folder}: the model's dict.txt is another than that of the text: {difference}; prepare the text with the "
            "model's dict.txt (--dict), or leave the model out."
        )
    say(str(load_part("model", model, contents, folder)))
    if kind in TEXT_KINDS:
        return 0, False
    say(describe_hearing(config, folder, sample_rate=sample_rate, normalize=normalize))
    return config.sample_rate, config.normalize


def describe_hearing(config: ModelConfig, folder: str | os.PathLike[str], *, sample_rate: int, normalize: bool) -> str:
    """A sentence on what audio the model of ``folder`` hears, and on the settings that do not count beside it.

    Example
    -------
    >>> config = ModelConfig("ctc", {}, 8000, False, tokens=None, extra={})
    >>> describe_hearing(config, "old/model", sample_rate=16000, normalize=False)
    'audio: 8000 Hz, normalize False, as in old/model (the settings sample_rate 16000, normalize False do not count)'
    """
    words = f"audio: {config.sample_rate} Hz, normalize {config.normalize}, as in {folder}"
    if (config.sample_rate, config.normalize) == (sample_rate, normalize):
        return words
    return f"{words} (the settings sample_rate {sample_rate}, normalize {normalize} do not count)"


def _matching(names: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
