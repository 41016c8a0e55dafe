"""The training, validation and test part of a corpus, from its manifests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from toolkit.data.fairseq_folder import check_fairseq_manifest
from toolkit.data.manifest import Manifest, describe_empty_texts, read_manifests
from toolkit.errors import ConfigError
from toolkit.seeds import Randomness


def read_parts(
    hparams: Mapping[str, Any], *, say: Callable[[str], object], texts: bool, trains: bool = True
) -> tuple[Manifest | None, Manifest | None, Manifest | None]:
    """The manifests for training, validation and test.

    Without a manifest for validation a share of the training utterances is held out, chosen by the seed. The limits of
    duration count for training only.

    Arguments
    ---------
    hparams : settings of a template: train_splits, valid_splits, test_splits (lists of paths; None among them counts
        as absent), valid_share, data_folder, audio_folder, min_duration and max_duration (seconds), seed.
    say : takes the report, and warnings.
    texts : whether the transcripts matter; empty ones are then named.
    trains : False reads the test part alone; the other two are None.

    Raises
    ------
    ConfigError : there is nothing to train on, or nothing to hold out.
    ManifestError : a manifest cannot be read.
    """
    replacements = {"data_root": hparams["data_folder"]} if hparams["data_folder"] else None

    def read(part: str) -> Manifest | None:
        paths = [path for path in hparams[f"{part}_splits"] if path is not None]
        for path in paths:
            check_fairseq_manifest(path, texts=texts, audio_folder=hparams["audio_folder"])
        return read_manifests(paths, replacements=replacements, root=hparams["audio_folder"]) if paths else None

    train, valid, test = (read(part) if trains or part == "test" else None for part in ("train", "valid", "test"))
    if trains and train is None:
        raise ConfigError("train_splits is empty; name at least one manifest to train on.")
    for part in (train, valid, test):
        if texts and part is not None and (sentence := describe_empty_texts(part)):
            say(f"warning: {sentence}")
    if train is None:
        return None, None, test
    if valid is None:
        train, valid = hold_out(train, hparams["valid_share"], seed=hparams["seed"])
    train, report = train.filter(min_duration=hparams["min_duration"], max_duration=hparams["max_duration"])
    say(f"training: {report}; validation: {len(valid):,} utterances")
    return train, valid, test


def hold_out(manifest: Manifest, share: float, *, seed: int) -> tuple[Manifest, Manifest]:
    """Two parts of ``manifest``: what is left, and about ``share`` of its utterances, at least one in each.

    Raises
    ------
    ConfigError : the share is not between 0 and 1, or there are fewer than two utterances.
    """
    if not 0 < share < 1:
        raise ConfigError(f"valid_share is {share}; expected a share above 0 and below 1.")
    if len(manifest) < 2:
        raise ConfigError(f"{manifest.source} has one utterance, too few to hold some out; give --valid_manifest.")
    order = Randomness(seed).numpy("valid share").permutation(len(manifest))
    held = min(max(1, round(share * len(manifest))), len(manifest) - 1)
    return manifest.select(np.sort(order[held:])), manifest.select(np.sort(order[:held]))
