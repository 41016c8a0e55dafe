"""Text through the Brain: tokens are the unit of the log, and a run goes on exactly where it stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from toolkit.data.text import TextBlocks, open_text
from toolkit.data.text_masks import TextMasking
from toolkit.data.units import TOKENS
from toolkit.errors import CheckpointError
from toolkit.models.data2vec import Data2VecText
from toolkit.models.text_encoder import TextEncoder
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import start
from toolkit.training.text_loaders import text_eval_loader, text_train_loader

TEXT = Path(__file__).resolve().parents[2] / "fixtures" / "fairseq_text" / "bin_own"

YAML = """
output_folder: {folder}
seed: 3
device: cpu
precision: fp32
max_updates: 6
log_interval: 2
valid_interval_updates: 3
ckpt_interval_updates: 2
ckpt_interval_minutes: null
effective_batch: 4096
fast_allocator: False
fast_products: False
noprogressbar: True
opt_class: !name:torch.optim.AdamW
    lr: 0.001
"""


class Pretraining(Brain):
    def compute_forward(self, batch, stage):
        rng = self.rng if stage is Stage.TRAIN else None
        return self.modules.model(batch.source, batch.tokens, chosen=batch.chosen, rng=rng, update=self.update)

    def compute_objectives(self, predictions, batch, stage):
        return Objective(predictions.loss_sum, predictions.num_masked, predictions.metrics())


def train(folder, **keys):
    """A short pretraining; returns the weights."""
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(YAML.format(folder=folder / "run"))
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    with start([str(folder / "small.yaml"), *words]) as experiment:
        dictionary, texts = open_text(TEXT, ["train", "valid"])
        masking = TextMasking(mask_id=dictionary.mask_id, vocab_size=dictionary.vocab_size)
        blocks = {
            part: TextBlocks(text, dictionary, tokens_per_sample=64, masking=masking) for part, text in texts.items()
        }
        encoder = TextEncoder(
            vocab_size=dictionary.vocab_size, dim=16, num_layers=2, ffn_dim=32, num_heads=2, max_positions=64
        )
        model = Data2VecText(encoder, mask_id=dictionary.mask_id, top_layers=2)
        brain = experiment.brain(
            Pretraining, modules={"model": model}, opt_class=experiment.hparams["opt_class"], unit=TOKENS
        )
        brain.fit(
            text_train_loader(experiment, blocks["train"], batch_tokens=1024, effective_batch=4096),
            text_eval_loader(experiment, blocks["valid"], batch_tokens=1024),
        )
        experiment.finish(brain, evaluate="last")
        return {name: value.clone() for name, value in brain.modules.state_dict().items()}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_log_counts_tokens_and_the_run_resumes_exactly(tmp_path):
    whole = train(tmp_path / "whole")
    rows = [row for row in rows_of(tmp_path / "whole") if row["stage"] == "train"]
    assert [row["update"] for row in rows] == [2, 4, 6] and "audio_seconds" not in rows[-1]
    assert rows[0]["text_tokens"] == pytest.approx(2 * 4096, rel=0.3)
    assert rows[-1]["text_tokens"] == pytest.approx(6 * 4096, rel=0.3)
    assert rows[0]["padding_share"] < 0.05
    summary = json.loads((tmp_path / "whole" / "run" / "summary.json").read_text())
    assert summary["throughput"]["unit"] == "tokens per second" and summary["throughput"]["value"] > 0
    assert summary["text_tokens"] == rows[-1]["text_tokens"]
    log = (tmp_path / "whole" / "run" / "log.txt").read_text()
    assert "tokens/s" in log and "audio" not in log
    assert "train: 316 lines, 23,671 tokens -> " in log and "% of what the model sees" in log

    train(tmp_path / "parts", max_updates=4)
    resumed = train(tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    clock = {"throughput", "loader_wait_share", "elapsed_seconds"}
    first, second = (
        [{name: value for name, value in row.items() if name not in clock} for row in rows_of(tmp_path / name)
         if row["update"] in (5, 6)]
        for name in ("whole", "parts")
    )  # fmt: skip
    assert first == second


def test_a_checkpoint_of_another_text_is_noticed(tmp_path, monkeypatch):
    train(tmp_path / "run", max_updates=2)
    other = Path(shutil.copytree(TEXT, tmp_path / "other"))
    for end in (".bin", ".idx"):
        shutil.copy(other / f"valid{end}", other / f"train{end}")
    monkeypatch.setattr(f"{__name__}.TEXT", other)
    with pytest.raises(CheckpointError, match=r"^the data changed since the checkpoint .*: train; "):
        train(tmp_path / "run", max_updates=3)


def test_a_changed_dictionary_is_refused_and_a_changed_validation_set_told(tmp_path, monkeypatch):
    train(tmp_path / "run", max_updates=2)
    other = Path(shutil.copytree(TEXT, tmp_path / "other"))
    lines = (other / "dict.txt").read_text().splitlines(keepends=True)
    (other / "dict.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))
    monkeypatch.setattr(f"{__name__}.TEXT", other)
    with pytest.raises(CheckpointError, match=r": train; its place in the epoch means other data now\."):
        train(tmp_path / "run", max_updates=3)
    (other / "dict.txt").write_text("".join(lines))
    for end in (".bin", ".idx"):
        shutil.copy(other / f"test{end}", other / f"valid{end}")
    sentence = (
        "The validation set has changed since the checkpoint step_00000002: the best so far was found on other data, "
        "and later validations do not compare with it."
    )
    train(tmp_path / "run", max_updates=3)
    log = (tmp_path / "run" / "run" / "log.txt").read_text()
    assert log.count(sentence) == 1 and "resumed at update 2" in log
    train(tmp_path / "run", max_updates=4)
    assert (tmp_path / "run" / "run" / "log.txt").read_text().count(sentence) == 1
