"""SpeechBrain's saved folders (CKPT+..., or save/).

Its own wav2vec 2.0 recipe pretrains another architecture, which cannot be written in this toolkit's terms; its
wrapper around a Hugging Face model can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted, split_unused
from toolkit.models.convert.torchaudio import MASK, read_torchaudio
from toolkit.models.convert.unpickle import read_pickle

OWN_FILES = ("latent_extractor.ckpt", "latent_encoder.ckpt")
"""Of the recipe recipes/LibriSpeech/self-supervised-learning/wav2vec2."""
WRAPPED_FILE = "wav2vec2.ckpt"
"""What recipes call the wrapper around a Hugging Face model."""

WRAPPED_NAMES = (
    (r"^model\.(wav2vec2\.)?", ""),
    (r"^feature_projection\.", "encoder.feature_projection."),
    (r"^encoder\.(?!feature_projection\.)", "encoder.transformer."),
    (r"^masked_spec_embed$", MASK),
)
"""Hugging Face's names differ from torchaudio's by these alone."""
UNUSED = ("quantizer.*", "project_q.*", "project_hid.*")


def is_speechbrain(folder: Path) -> bool:
    """Whether a folder is a checkpoint (CKPT+...) or saved model of SpeechBrain's."""
    return (folder / "CKPT.yaml").is_file() or any(folder.glob("*.ckpt"))


def read_speechbrain(folder: Path) -> Converted:
    """A folder in the toolkit's terms.

    Raises
    ------
    CheckpointError : a model of another architecture, with a sentence on what differs, or no wav2vec 2.0 at all.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in OWN_FILES):
        raise CheckpointError(
            f"{folder}: SpeechBrain's own wav2vec 2.0 cannot be loaded, as it is another architecture: sinusoids of "
            "fixed period mark the positions where the toolkit has a learned convolution, for which the folder holds "
            "no weights, and the transformer's layer norms add 1e-6 to the variance where the toolkit's add 1e-5."
        )
    path = folder / WRAPPED_FILE
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.ckpt"))[:5]) or "no .ckpt file"
        raise CheckpointError(
            f"{folder}: of SpeechBrain's folders the toolkit reads those with {WRAPPED_FILE}, its wrapper around a "
            f"Hugging Face wav2vec 2.0; this one holds {found}."
        )
    contents = read_pickle(path)
    state = {str(name): value for name, value in contents.items()} if isinstance(contents, Mapping) else {}
    if not any(name.startswith("model.") and isinstance(value, Tensor) for name, value in state.items()):
        raise CheckpointError(f"{path}: the file holds no tensors of a wrapped model (model. before their names).")
    names = {_renamed(name): name for name in state}
    converted = read_torchaudio({name: state[full] for name, full in names.items()}, path)
    unused, unexpected = split_unused(converted.unexpected, UNUSED)
    info = replace(
        converted.info,
        source="SpeechBrain, around Hugging Face's wav2vec2",
        unused=tuple(names[name] for name in unused),
    )
    return replace(converted, info=info, unexpected=tuple(names[name] for name in unexpected))


def _renamed(name: str) -> str:
    for pattern, new in WRAPPED_NAMES:
        name = re.sub(pattern, new, name)
    return name
