"""Pretrain data2vec on text: WikiText, any plain text, or a folder that fairseq prepared.

    python train.py hparams/data2vec_tiny.yaml --data_folder /corpora/wikitext-103-raw --bpe_folder /corpora/gpt2_bpe
    torchrun --nproc_per_node=8 train.py hparams/data2vec_base.yaml --data_folder /corpora/prepared
    python train.py hparams/data2vec_tiny.yaml --help

The same command again continues the run. ``--preset performance`` times a fixed number of updates, ``--preset eval``
measures the loss of what the output folder holds. See README.md.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the script runs from a clone, installed or not

from recipes.WikiText.wikitext_prepare import prepare_text
from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.text import TextBatch, TextBlocks, open_text
from toolkit.data.text_bpe import Gpt2Bpe, Gpt2Tokenizer
from toolkit.data.text_dictionary import TextDictionary
from toolkit.data.text_masks import TextMasking
from toolkit.data.units import TOKENS
from toolkit.errors import ConfigError, run_main
from toolkit.models.data2vec_targets import Data2VecOutput
from toolkit.models.model_files import save_model_folder
from toolkit.models.pretrainer import load_whole_model
from toolkit.pretraining import MaskedPrediction
from toolkit.training.brain import Stage
from toolkit.training.experiment import Experiment, start
from toolkit.training.health import data2vec_health
from toolkit.training.text_loaders import text_eval_loader, text_train_loader


class TextPretraining(MaskedPrediction):
    """Predict a teacher's features of the hidden tokens."""

    def compute_forward(self, batch: TextBatch, stage: Stage) -> Data2VecOutput:
        """Dropout differs in every update; a validation has the same masks each time, and no dropout."""
        return self.modules.model(batch.source, batch.tokens, chosen=batch.chosen, rng=self.rng, update=self.update)


def read_parts(experiment: Experiment) -> tuple[TextDictionary, TextBlocks | None, dict[str, TextBlocks]]:
    """The dictionary, the blocks to train on (None with test_only), and those of the other parts by name."""
    hparams = experiment.hparams
    train, valid, tests = (hparams[f"{part}_splits"] for part in ("train", "valid", "test"))
    if len(train) != 1 or len(valid) > 1:
        raise ConfigError(
            f"train_splits is {train} and valid_splits {valid}; name one part to train on, and one or none to validate."
        )
    if experiment.options.test_only:  # the training text may be elsewhere
        train, valid = [], []
    folder = experiment.prepare(
        prepare_text,
        hparams["data_folder"],
        hparams["prepared_folder"],
        bpe_folder=hparams["bpe_folder"],
        words=hparams["words"],
        dictionary=hparams["dict"],
        say=experiment.say,
    )
    parts = list(dict.fromkeys([*train, *valid, *tests]))
    dictionary, texts = open_text(folder, parts, joined=train, dictionary=hparams["dict"])
    masking = TextMasking(
        mask_id=dictionary.mask_id,
        vocab_size=dictionary.vocab_size,
        mask_prob=hparams["mask_prob"],
        mask_length=hparams["mask_length"],
    )

    def blocks(part: str) -> TextBlocks:
        return TextBlocks(
            texts[part],
            dictionary,
            tokens_per_sample=hparams["tokens_per_sample"],
            break_mode=hparams["break_mode"],
            masking=masking,
        )

    return dictionary, blocks(train[0]) if train else None, {part: blocks(part) for part in (*valid, *tests)}


def make_tokenizer(hparams: Mapping[str, Any], dictionary: TextDictionary) -> Gpt2Tokenizer | DictionaryTokenizer:
    """What stays beside the model: the dictionary in any case, and how text becomes its symbols where that is known."""
    if hparams["bpe_folder"] is None:
        return DictionaryTokenizer(dictionary, words=hparams["words"])
    return Gpt2Tokenizer(Gpt2Bpe.from_folder(Path(hparams["bpe_folder"]).expanduser()), dictionary)


def main(argv: Sequence[str]) -> None:
    """Prepare, train, evaluate, write model/ and summary.json."""
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
        dictionary, train, others = read_parts(experiment)
        tokenizer = make_tokenizer(hparams, dictionary)
        encoder = hparams["encoder"](vocab_size=dictionary.vocab_size, max_positions=hparams["tokens_per_sample"])
        model = hparams["model"](encoder, mask_id=dictionary.mask_id)
        load_whole_model(
            model,
            experiment.model_source(),
            kind="data2vec_text",
            sample_rate=0,
            normalize=False,
            say=experiment.say,
            tokenizer=tokenizer,
        )
        brain = experiment.brain(
            TextPretraining,
            modules={"model": model},
            opt_class=hparams["opt_class"],
            schedule=hparams["schedule"],
            health=data2vec_health(),
            best_metric="loss",
            unit=TOKENS,
        )
        batch_tokens = hparams["batch_tokens"]
        loaders = {part: text_eval_loader(experiment, text, batch_tokens=batch_tokens) for part, text in others.items()}
        if train is not None:
            train_loader = text_train_loader(
                experiment,
                train,
                batch_tokens=batch_tokens,
                effective_batch=hparams["effective_batch"],
                num_buckets=hparams["num_buckets"],
            )
            brain.fit(train_loader, next((loaders[part] for part in hparams["valid_splits"]), None))
        experiment.finish(
            brain,
            tests={part: loaders[part] for part in hparams["test_splits"]},
            save_model=lambda folder: save_model_folder(
                folder, model, kind="data2vec_text", sample_rate=0, normalize=False, tokenizer=tokenizer
            ),
            evaluate="last",  # the lowest loss is no sign of the best features: the target moves
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
