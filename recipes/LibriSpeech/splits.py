"""What every LibriSpeech recipe does first: its splits, prepared if need be, as manifests in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.LibriSpeech.librispeech_prepare import librispeech_manifests
from toolkit.data.manifest import Manifest, describe_empty_texts, read_manifests
from toolkit.errors import ConfigError
from toolkit.training.experiment import Experiment


@dataclass(frozen=True)
class Splits:
    """The utterances of a run.

    train : within the duration limits; None where nothing is trained.
    valid : None where there is none.
    tests : by the name of the split.
    train_files : the manifests that ``train`` comes from.
    """

    train: Manifest | None
    valid: Manifest | None
    tests: dict[str, Manifest]
    train_files: tuple[Path, ...]


def read_splits(experiment: Experiment, *, trains: bool, texts: bool = False) -> Splits:
    """The splits that the YAML names, prepared on the main process where they are not yet.

    Arguments
    ---------
    experiment : its hparams hold train_splits, valid_splits, test_splits, data_folder, audio_folder, manifest_folder,
        subset_lists, seed, min_duration, max_duration.
    trains : False reads the test splits alone, for the training corpus may be elsewhere.
    texts : whether transcripts are needed.

    Raises
    ------
    ConfigError : training without a train split.
    ManifestError : a split or a manifest cannot be used.
    """
    hparams = experiment.hparams
    train, valid, tests = (hparams[f"{part}_splits"] for part in ("train", "valid", "test"))
    train, valid = (train, valid) if trains else ([], [])
    files = experiment.prepare(
        librispeech_manifests,
        [*train, *valid, *tests],
        data_folder=hparams["data_folder"],
        manifest_folder=hparams["manifest_folder"],
        audio_folder=hparams["audio_folder"],
        texts=texts,
        subset_lists=hparams["subset_lists"],
        seed=hparams["seed"],
        say=experiment.say,
    )
    if trains and not train:
        raise ConfigError("train_splits is empty; name at least one split or manifest to train on.")
    manifest = _read(experiment, train, files, texts=texts)
    if manifest is not None:
        manifest, report = manifest.filter(min_duration=hparams["min_duration"], max_duration=hparams["max_duration"])
        experiment.say(f"training: {report}")
    return Splits(
        train=manifest,
        valid=_read(experiment, valid, files, texts=texts),
        tests={split: _read(experiment, [split], files, texts=texts) for split in tests},
        train_files=tuple(files[split] for split in train),
    )


def _read(
    experiment: Experiment, splits: Sequence[str], files: Mapping[str, Path], *, texts: bool
) -> Manifest | None:
    if not splits:
        return None
    manifest = read_manifests(
        dict.fromkeys(files[split] for split in splits),
        replacements={"data_root": experiment.hparams["data_folder"]},
        root=experiment.hparams["audio_folder"],
    )
    if texts and (sentence := describe_empty_texts(manifest)):
        experiment.say(f"warning: {sentence}")
    return manifest
