"""A model, read from any known kind of file, written in another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import ENCODER_KINDS, Converted, encoder_alone
from toolkit.models.convert.fairseq import write_fairseq
from toolkit.models.convert.huggingface import write_huggingface
from toolkit.models.convert.load import build_converted
from toolkit.models.model_files import save_model_folder


def write_toolkit(converted: Converted, folder: Path) -> None:
    """Write a ``model/`` folder of the toolkit's own."""
    save_model_folder(
        folder,
        build_converted(converted, folder),
        kind=converted.config.kind,
        sample_rate=converted.config.sample_rate,
        normalize=converted.config.normalize,
        tokenizer=converted.tokenizer,
        extra=converted.config.extra,
    )


WRITERS: dict[str, Callable[[Converted, Path], None]] = {
    "toolkit": write_toolkit,
    "huggingface": write_huggingface,
    "fairseq": write_fairseq,
}
"""What a model can be written as, by name."""


def write_pretrained(converted: Converted, path: str | os.PathLike[str], *, to: str) -> tuple[str, ...]:
    """Write a model that was read.

    Arguments
    ---------
    converted : see :func:`toolkit.models.convert.read.read_pretrained`.
    path : a new folder, or a new ``.pt`` file for fairseq.
    to : one of WRITERS.

    Returns
    -------
    A line for each thing that the form cannot hold and that was left out.

    Raises
    ------
    CheckpointError : the form is unknown or cannot hold the model, or the path is taken.
    OSError : the path cannot be written.
    """
    if to not in WRITERS:
        raise CheckpointError(f"a model cannot be written as {to!r}; the forms are {', '.join(WRITERS)}.")
    path = Path(path)
    if path.exists() and (to == "fairseq" or not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already; name a new path, nothing is overwritten.")
    WRITERS[to](converted, path)
    if to != "huggingface" or converted.config.kind not in ENCODER_KINDS:
        return ()
    left = len(converted.tensors) - len(encoder_alone(converted).tensors)
    return (f"left out: the teacher and the head of data2vec ({left} tensors), for transformers has its encoder alone",)
