"""What speech recognition recipes share: a model with its tokens, and from its output to transcripts and errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.data.batch import SpeechBatch
from toolkit.data.dataset import DynamicItemDataset, speech_items, text_items
from toolkit.data.fairseq_folder import tokenizer_of
from toolkit.data.manifest import Manifest
from toolkit.data.tokens import Tokenizer
from toolkit.decoding.ctc import describe_impossible, greedy_decode
from toolkit.decoding.scoring import WordErrors
from toolkit.errors import CheckpointError
from toolkit.models.convert.load import build_converted, build_encoder, norms_without_padding
from toolkit.models.convert.read import read_pretrained
from toolkit.models.ctc import CTCModel, CTCOutput
from toolkit.models.model_files import save_model_folder
from toolkit.models.pretrainer import describe_hearing
from toolkit.models.wav2vec2 import Wav2Vec2Encoder
from toolkit.training.experiment import Experiment
from toolkit.training.hparams import construct
from toolkit.training.run_folder import has_checkpoints, holds_model


@dataclass(frozen=True)
class SpeechRecognizer:
    """A CTC model and what belongs to it.

    Arguments
    ---------
    model : scores tokens.
    tokenizer : between transcripts and tokens.
    sample_rate : Hz that the model hears.
    normalize : whether it hears waveforms of zero mean and unit variance.
    """

    model: CTCModel
    tokenizer: Tokenizer
    sample_rate: int
    normalize: bool

    def dataset(self, manifest: Manifest) -> DynamicItemDataset:
        """The utterances of ``manifest`` as the model wants them: id, waveform, tokens, text.

        Raises ManifestError where it has no column wrd: now, and not when its first batch comes.
        """
        manifest.column("wrd")
        items = [*speech_items(self.sample_rate, self.normalize), *text_items(self.tokenizer)]
        return DynamicItemDataset(manifest, items, ["id", "waveform", "tokens", "text"])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a ``model/`` folder."""
        save_model_folder(
            folder,
            self.model,
            kind="ctc",
            sample_rate=self.sample_rate,
            normalize=self.normalize,
            tokenizer=self.tokenizer,
        )


def trained_recognizer(experiment: Experiment) -> SpeechRecognizer | None:
    """The recognizer to evaluate with ``test_only``, whole with its tokens: training data is not needed for it.

    It is the ``model/`` of the run in the output folder, whose checkpoints fit it. Where the output folder holds no
    run, it is ``pretrained``.

    Returns
    -------
    None in training, and where the run has checkpoints but no ``model/`` yet: then `make_recognizer` makes it again.

    Raises
    ------
    CheckpointError : the folder cannot be used, or holds a model that does not score tokens.
    """
    output = experiment.output_folder
    if not experiment.options.test_only or (has_checkpoints(output) and not holds_model(output)):
        return None
    folder = experiment.model_source()
    if folder is None:
        return None
    contents = norms_without_padding(read_pretrained(folder))
    config = contents.config
    if config.kind != "ctc":
        raise CheckpointError(
            f"{folder}: this is a model of kind {config.kind!r}, which has no output layer to evaluate; give the "
            "model/ folder of a fine-tuning run (kind 'ctc'), or train one without --test_only."
        )
    if contents.tokenizer is None:
        raise CheckpointError(
            f"{folder}: nothing says which letters the model's {config.architecture.get('vocab_size')} outputs are; "
            "put its dictionary beside it (dict.ltr.txt of fairseq's, or vocab.json in a Hugging Face folder)."
        )
    experiment.say(f"model and tokens: {folder} ({contents.info.source})")
    return SpeechRecognizer(
        build_converted(contents, folder), contents.tokenizer, config.sample_rate, config.normalize
    )


def make_recognizer(experiment: Experiment, train: Manifest, *, dictionary: Path | None = None) -> SpeechRecognizer:
    """The recognizer that a run's settings ask for, and a word in its log where transcripts do not fit their audio.

    From scratch, ``encoder_sizes`` gives the encoder. With ``pretrained`` (a ``model/`` folder, or a file or folder of
    another program, see :mod:`toolkit.models.convert`) that gives sizes, weights, sample rate and normalization, and
    only the head is fresh, and the last ``reset_layers`` layers. ``encoder_training`` (dropouts, masks, ...) counts
    either way.

    Arguments
    ---------
    experiment : its hparams hold pretrained, tokenizer (transcripts -> Tokenizer), encoder_sizes, encoder_training,
        final_dropout, freeze_updates, reset_layers, sample_rate, normalize.
    train : training utterances, from whose transcripts (column wrd) the tokens are made.
    dictionary : a ``dict.ltr.txt`` to take where the tokens are letters, instead of making them.

    Raises
    ------
    CheckpointError, ModelError, TokenError : what is wrong with the folder, the sizes, the transcripts.
    """
    hparams = experiment.hparams
    folder, sample_rate, normalize = hparams["pretrained"], hparams["sample_rate"], hparams["normalize"]
    contents = None if folder is None else norms_without_padding(read_pretrained(folder))
    config = None if contents is None else contents.config
    if config is not None:
        experiment.say(describe_hearing(config, folder, sample_rate=sample_rate, normalize=normalize))
        sample_rate, normalize = config.sample_rate, config.normalize
    tokenizer = tokenizer_of(hparams["tokenizer"], train, dictionary, experiment.say)
    training = hparams["encoder_training"]
    if contents is None:
        encoder = construct(Wav2Vec2Encoder, encoder_sizes=hparams["encoder_sizes"], encoder_training=training)
    else:
        filled = partial(build_encoder, contents, folder)
        encoder = construct(filled, types=Wav2Vec2Encoder, encoder_training=training)
        encoder.transformer.reset_layers(hparams["reset_layers"])
        fresh = f"; its last {hparams['reset_layers']} layers start anew" if hparams["reset_layers"] else ""
        experiment.say(f"encoder: all {len(encoder.state_dict())} tensors from {folder}{fresh}")
    model = CTCModel(
        encoder,
        tokenizer.vocab_size,
        final_dropout=hparams["final_dropout"],
        freeze_updates=hparams["freeze_updates"],
    )
    experiment.say(f"{tokenizer.vocab_size} tokens")
    if sentence := describe_impossible(train, tokenizer, encoder.frame_lengths, sample_rate):
        experiment.say(f"warning: {sentence}")
    return SpeechRecognizer(model, tokenizer, sample_rate, normalize)


def transcribe(output: CTCOutput, tokenizer: Tokenizer) -> list[str]:
    """The transcript of each utterance, by greedy decoding."""
    decoded = greedy_decode(output.log_probs, output.frame_lengths, tokenizer.blank_id)
    return [tokenizer.decode(tokens) for tokens in decoded]


def compare(
    batch: SpeechBatch, hypotheses: Sequence[str], *, record: Callable[[Mapping[str, Any]], object]
) -> dict[str, tuple[float, float]]:
    """Word and character errors as (sum, count) metrics ``wer`` and ``cer``, in percent.

    Arguments
    ---------
    batch : with its texts.
    hypotheses : a transcript for each utterance.
    record : gets each pair as a row: id, reference, hypothesis.
    """
    assert batch.texts is not None
    for name, reference, hypothesis in zip(batch.ids, batch.texts, hypotheses, strict=True):
        record({"id": name, "reference": reference, "hypothesis": hypothesis})
    errors = WordErrors()
    errors.extend(batch.ids, batch.texts, hypotheses)
    return errors.metrics()
