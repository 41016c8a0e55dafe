"""What text classification recipes share: tables, a classifier with its tokens and labels, and its scores."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.labelled_text import (
    LabelledBatch,
    LabelledRows,
    LabelledTexts,
    dictionary_of,
    hold_out_rows,
    read_labelled_rows,
)
from toolkit.data.text_bpe import Gpt2Bpe, Gpt2Tokenizer, check_gpt2_dictionary
from toolkit.data.text_dictionary import DICT_FILE, TextDictionary
from toolkit.errors import CheckpointError, ConfigError
from toolkit.models.convert.common import Converted
from toolkit.models.convert.load import build_converted, build_text_encoder
from toolkit.models.convert.read import read_pretrained
from toolkit.models.model_files import save_model_folder
from toolkit.models.text_classifier import LABELS, TextClassifier
from toolkit.models.text_encoder import TextEncoder
from toolkit.training.experiment import Experiment
from toolkit.training.hparams import construct
from toolkit.training.run_folder import has_checkpoints, holds_model

CLASS_F1 = "f1_"
"""Before a label: the name of its F1 among the metrics."""


@dataclass(frozen=True)
class Tables:
    """The rows of a run: to train on (None: nothing is trained), to validate on (None: no validation), and tests."""

    train: LabelledRows | None
    valid: LabelledRows | None
    tests: dict[str, LabelledRows]


@dataclass(frozen=True)
class Classification:
    """A classifier and what belongs to it.

    Arguments
    ---------
    model : scores classes.
    tokenizer : between texts and tokens.
    labels : of the outputs, in order.
    """

    model: TextClassifier
    tokenizer: Gpt2Tokenizer | DictionaryTokenizer
    labels: tuple[str, ...]

    def dataset(self, rows: LabelledRows) -> LabelledTexts:
        """The rows as the model wants them; raises ManifestError for a label that it does not know."""
        return LabelledTexts(rows, self.tokenizer, self.labels, max_length=self.model.encoder.max_positions)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a ``model/`` folder."""
        save_model_folder(
            folder,
            self.model,
            kind="text_classifier",
            sample_rate=0,
            normalize=False,
            tokenizer=self.tokenizer,
            extra={LABELS: list(self.labels)},
        )

    def compare(
        self, batch: LabelledBatch, logits: Tensor, *, record: Callable[[Mapping[str, Any]], object]
    ) -> dict[str, tuple[float, float]]:
        """Scores as (sum, count) metrics in percent: ``accuracy``, and ``f1_LABEL`` of each label.

        Arguments
        ---------
        batch : with its labels.
        logits : (batch, classes).
        record : gets each text as a row: id, text, label, predicted.
        """
        predicted, expected = logits.argmax(1).tolist(), batch.labels.tolist()
        for name, text, right, found in zip(batch.ids, batch.texts, expected, predicted, strict=True):
            record({"id": name, "text": text, "label": self.labels[right], "predicted": self.labels[found]})
        metrics = accuracy(logits, batch.labels)
        for number, label in enumerate(self.labels):
            both = sum(right == found == number for right, found in zip(expected, predicted, strict=True))
            # 2 TP / (2 TP + FP + FN): a ratio of sums, so that it is exact over batches and ranks.
            metrics[CLASS_F1 + label] = (200.0 * both, expected.count(number) + predicted.count(number))
        return metrics


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, tuple[Any, Any]]:
    """The share of right answers, in percent, as a (sum, count) metric; no wait for the device."""
    return {"accuracy": (100.0 * (logits.argmax(1) == labels).sum(), len(labels))}


def macro_f1(metrics: Mapping[str, float]) -> dict[str, float]:
    """The mean of the labels' F1, ``f1``; labels that neither occur nor are predicted do not count.

    Example
    -------
    >>> macro_f1({"accuracy": 80.0, "f1_ham": 90.0, "f1_spam": 60.0, "f1_never": float("nan")})
    {'f1': 75.0}
    """
    each = [value for name, value in metrics.items() if name.startswith(CLASS_F1) and not math.isnan(value)]
    return {"f1": sum(each) / len(each)} if each else {}


def read_tables(experiment: Experiment, *, trains: bool) -> Tables:
    """The tables that the YAML names, and a validation part held out of the training's where it names none.

    Arguments
    ---------
    experiment : its hparams hold train_splits, valid_splits, test_splits (file names in data_folder, or whole paths),
        data_folder, text_column, label_column, valid_share, seed.
    trains : False reads the test tables alone, for the training's may be elsewhere.

    Raises
    ------
    ConfigError : nothing to train on, to hold out, or (with ``test_only``) to test on.
    ManifestError : a table cannot be used.
    """
    hparams = experiment.hparams
    folder = Path(hparams["data_folder"]).expanduser()

    def read(names: Sequence[Any]) -> LabelledRows | None:
        if not names:
            return None
        paths = [folder / Path(str(name)).expanduser() for name in dict.fromkeys(names)]
        return read_labelled_rows(paths, text_column=hparams["text_column"], label_column=hparams["label_column"])

    if experiment.options.test_only and not hparams["test_splits"]:
        raise ConfigError("test_splits is empty, so there is nothing to evaluate on; name at least one CSV file.")
    tests = {str(name): read([name]) for name in hparams["test_splits"]}
    train = valid = None
    if trains:
        train, valid = read(hparams["train_splits"]), read(hparams["valid_splits"])
        if train is None:
            raise ConfigError("train_splits is empty; name at least one CSV file to train on.")
        train.classes()
        if valid is None and hparams["valid_share"]:
            train, valid = hold_out_rows(train, hparams["valid_share"], seed=hparams["seed"])
            experiment.say(
                f"validation: {len(valid):,} texts held out of the training's, {len(train):,} left; a share "
                f"{hparams['valid_share']:g} of each label, by seed {hparams['seed']}"
            )
    return Tables(train, valid, {name: rows for name, rows in tests.items() if rows is not None})


def trained_classifier(experiment: Experiment) -> Classification | None:
    """The classifier to evaluate with ``test_only``, whole with tokens and labels: training data is not needed for it.

    It is the ``model/`` of the run in the output folder, whose checkpoints fit it. Where the output folder holds no
    run, it is ``pretrained``.

    Returns
    -------
    None in training, and where the run has checkpoints but no ``model/`` yet: then `make_classifier` makes it again.

    Raises
    ------
    CheckpointError : the folder cannot be used, or holds a model that is no classifier of text.
    """
    output = experiment.output_folder
    if not experiment.options.test_only or (has_checkpoints(output) and not holds_model(output)):
        return None
    folder = experiment.model_source()
    if folder is None:
        return None
    contents = read_pretrained(folder)
    if contents.config.kind != "text_classifier":
        raise CheckpointError(
            f"{folder}: this is a model of kind {contents.config.kind!r}, which has no classes to evaluate; give the "
            "model/ folder of a classification run (kind 'text_classifier'), or train one without --test_only."
        )
    model = build_converted(contents, folder)
    labels, outputs = contents.info.labels, contents.config.architecture["num_classes"]
    if labels is None or len(labels) != outputs:
        raise CheckpointError(
            f"{folder}: nothing says which labels the model's {outputs} outputs are; copy the folder again from the "
            "run that wrote it."
        )
    if not _encodes(contents.tokenizer):
        raise CheckpointError(f"{folder}: the model's tokens are missing; copy the folder again, dict.txt included.")
    assert isinstance(model, TextClassifier) and isinstance(contents.tokenizer, Gpt2Tokenizer | DictionaryTokenizer)
    _check_size(contents.tokenizer, model.encoder.vocab_size, f"the dictionary in {folder}", folder)
    experiment.say(f"model, tokens and labels: {folder} ({contents.info.source})")
    return Classification(model, contents.tokenizer, labels)


def make_classifier(experiment: Experiment, train: LabelledRows) -> Classification:
    """The classifier that a run's settings ask for.

    From scratch, ``encoder_sizes`` gives the encoder, and its dictionary is ``dict``, or made of the training texts.
    With ``pretrained`` (a ``model/`` folder, or a file or folder of another program, see
    :mod:`toolkit.models.convert`) that gives sizes, weights and, if it carries them, tokens; only the head is fresh.

    Arguments
    ---------
    experiment : its hparams hold pretrained, bpe_folder, dict, encoder_sizes, encoder_training, head_dropout.
    train : texts to train on, whose labels are the classes.

    Raises
    ------
    CheckpointError, ModelError, TokenError, ConfigError : what is wrong with the folder, the sizes, the token files.
    """
    hparams = experiment.hparams
    folder, training = hparams["pretrained"], hparams["encoder_training"]
    contents = None if folder is None else read_pretrained(folder)
    labels = train.classes()
    if contents is None:
        tokenizer = _given_tokens(experiment, train)
        make = partial(TextEncoder, vocab_size=tokenizer.vocab_size)
        encoder = construct(make, types=TextEncoder, encoder_sizes=hparams["encoder_sizes"], encoder_training=training)
    else:
        filled = partial(build_text_encoder, contents, folder)
        encoder = construct(filled, types=TextEncoder, encoder_training=training)
        tokenizer = _pretrained_tokens(experiment, contents, folder)
        source = f"the dictionary in {folder}" if contents.tokenizer is not None else str(hparams["dict"])
        _check_size(tokenizer, encoder.vocab_size, source, folder)
        experiment.say(f"encoder: all {len(encoder.state_dict())} tensors from {folder}")
    model = TextClassifier(encoder, len(labels), dropout=hparams["head_dropout"])
    experiment.say(f"{tokenizer.vocab_size:,} tokens, {len(labels)} labels")
    return Classification(model, tokenizer, labels)


def _encodes(tokenizer: object) -> bool:
    """Whether a model's tokenizer makes tokens of raw text."""
    return isinstance(tokenizer, Gpt2Tokenizer) or (isinstance(tokenizer, DictionaryTokenizer) and tokenizer.words)


def _pretrained_tokens(
    experiment: Experiment, contents: Converted, folder: str
) -> Gpt2Tokenizer | DictionaryTokenizer:
    """Those of the pretrained folder, what it lacks and no more from the settings."""
    hparams, kept = experiment.hparams, contents.tokenizer
    if isinstance(kept, Gpt2Tokenizer | DictionaryTokenizer):
        if hparams["dict"] is not None:
            given = TextDictionary.from_file(Path(hparams["dict"]).expanduser())
            if difference := kept.dictionary.difference(given):
                raise CheckpointError(
                    f"{hparams['dict']} is another dictionary than that in {folder}: {difference}; leave out --dict, "
                    "for the model carries its own."
                )
        if _encodes(kept):
            ignored = " (bpe_folder does not count)" if hparams["bpe_folder"] else ""
            experiment.say(f"tokens: those of {folder}{ignored}")
            return kept
        if hparams["bpe_folder"] is None:
            raise ConfigError(
                f"{folder} carries its dict.txt, and nothing says how text becomes its symbols; give the folder of "
                "GPT-2's encoder.json and vocab.bpe (--bpe_folder)."
            )
        experiment.say(f"tokens: GPT-2's pieces through the dict.txt of {folder}")
        check_gpt2_dictionary(kept.dictionary, Path(folder) / DICT_FILE)
        return Gpt2Tokenizer(Gpt2Bpe.from_folder(Path(hparams["bpe_folder"]).expanduser()), kept.dictionary)
    if hparams["dict"] is None:
        raise ConfigError(
            f"{folder} does not carry its tokens; give the dict.txt that it was pretrained with (--dict), and the "
            "folder of GPT-2's encoder.json and vocab.bpe (--bpe_folder)."
        )
    return _given_tokens(experiment, None)


def _given_tokens(experiment: Experiment, train: LabelledRows | None) -> Gpt2Tokenizer:
    """GPT-2's pieces through ``dict``; without it, through a dictionary made of the texts to train on."""
    hparams = experiment.hparams
    if hparams["bpe_folder"] is None:
        raise ConfigError("bpe_folder is missing; give the folder of GPT-2's encoder.json and vocab.bpe.")
    bpe = Gpt2Bpe.from_folder(Path(hparams["bpe_folder"]).expanduser())
    if hparams["dict"] is not None:
        dictionary = TextDictionary.from_file(Path(hparams["dict"]).expanduser())
        check_gpt2_dictionary(dictionary, hparams["dict"])
        return Gpt2Tokenizer(bpe, dictionary)
    assert train is not None
    experiment.say("dictionary: made of the training texts")
    return Gpt2Tokenizer(bpe, dictionary_of(train, bpe))


def _check_size(tokenizer: Gpt2Tokenizer | DictionaryTokenizer, wanted: int, source: str, folder: str | Path) -> None:
    if tokenizer.vocab_size != wanted:
        raise CheckpointError(
            f"{source} holds {tokenizer.vocab_size:,} tokens (the mask's included), but the model in {folder} has "
            f"{wanted:,}; give the dict.txt that it was pretrained with."
        )
