"""Small arithmetic recorded from the original: schedules, temperature, frames, negatives, waveforms, order, batches,
blocks and the teacher's decay."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.test_compare import FIXTURES
from toolkit.data.audio import normalize_waveform
from toolkit.data.batch import collate_speech
from toolkit.data.text_blocks import locate, make_blocks
from toolkit.data.text_order import fairseq_batches, fairseq_order
from toolkit.errors import CheckpointError
from toolkit.models.convert.fairseq_config import check_represented
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.nn.contrastive import sample_cross_negatives, sample_negatives
from toolkit.nn.ema import DecayRamp
from toolkit.nn.feature_extractor import FeatureExtractor
from toolkit.nn.quantizer import GumbelQuantizer
from toolkit.training.schedules import Cosine, Polynomial, TriStage

RECORDED = json.loads((FIXTURES / "extras" / "arithmetic.json").read_text())


def ours(schedule, settings):
    """Our schedule by the original's settings, and the total number of updates."""
    peak = settings["lr"][0]
    if schedule == "polynomial_decay":
        end = settings["end_learning_rate"] / peak
        made = Polynomial(warmup=settings["warmup_updates"], power=settings["power"], end_factor=end)
        return made, settings["total_num_update"]
    if schedule == "cosine":
        return Cosine(warmup=settings["warmup_updates"], end_factor=settings["min_lr"] / peak), settings["max_update"]
    lengths = settings["phase_ratio"] or [settings[f"{stage}_steps"] for stage in ("warmup", "hold", "decay")]
    made = TriStage(
        warmup=lengths[0],
        hold=lengths[1],
        decay=lengths[2],
        init_factor=settings["init_lr_scale"],
        final_factor=settings["final_lr_scale"],
    )
    return made, settings["max_update"]


@pytest.mark.parametrize("case", RECORDED["lr_schedules"], ids=lambda case: case["name"])
def test_learning_rates(case):
    settings, peak = case["settings"], case["settings"]["lr"][0]
    name = case["name"].split()[0]
    schedule, total = ours(name, settings)
    compared = 0
    for update, expected in case["lr_after_step_update"].items():
        if name == "cosine" and int(update) >= total:
            # Past its end the original begins a second, lower cosine; a run is over by then.
            assert schedule(int(update), total) == settings["min_lr"]
            continue
        assert peak * schedule(int(update), total) == pytest.approx(expected, rel=1e-12, abs=1e-14 * peak), update
        compared += 1
    assert compared >= 20
    # Before its trainer calls step_update(0) the original's object has this rate, by which no update is made: the
    # polynomial's is that of the second update, the others' that of the first.
    first = 1 if name == "polynomial_decay" else 0
    assert peak * schedule(first, total) == pytest.approx(case["lr_at_construction"], rel=1e-12, abs=1e-14 * peak)


def test_the_quantizers_temperature():
    recorded = RECORDED["gumbel_temperature"]
    quantizer = GumbelQuantizer(input_dim=4, output_dim=4, num_codes=2, temperature=recorded["latent_temp"])
    for update, expected in recorded["temperature_at_num_updates"].items():
        assert quantizer.temperature_at(int(update)) == pytest.approx(expected, rel=1e-12), update


def test_frame_counts():
    extractor = FeatureExtractor(norm="layer")
    encoder = Wav2Vec2Encoder(dim=16, num_layers=0, num_heads=1, ffn_dim=1, pos_kernel=2, pos_groups=1)
    lengths = torch.tensor([int(samples) for samples in RECORDED["frame_counts"]])
    expected = list(RECORDED["frame_counts"].values())
    assert extractor.frame_lengths(lengths).tolist() == encoder.frame_lengths(lengths).tolist() == expected


class Given:
    """Randomness that gives the recorded integers, stream by stream and utterance by utterance."""

    def __init__(self, **streams):
        self.streams = streams

    def numpy(self, stream, utterance):
        self.row = self.streams[stream.replace(" ", "_")][utterance]
        return self

    def integers(self, low, high, size):
        drawn = np.array(self.row)
        assert low <= drawn.min() and drawn.max() < high and drawn.size == size[0] * size[1]
        return drawn.reshape(size)


NEGATIVES = RECORDED["negative_sampling"]["cases"]


@pytest.mark.parametrize("case", [case for case in NEGATIVES if case["num"] == case["rows_per_sample"]])
def test_negatives(case):
    """Of the frame's own utterance, then of the whole batch, as one list for each frame.

    From the whole batch the original leaves out the row that has the frame's place within its utterance, so that from
    the second utterance on a frame can be its own negative; only in the first is that the frame itself, as it is here.
    """
    count, batch = case["num"], case["batch"]
    own, cross = case["n_negatives"], case["cross_sample_negatives"]
    draws = iter(case["draws_in_order"])
    expected = np.array(case["neg_idxs"]).reshape(batch, -1)
    found = []
    if own:
        recorded = next(draws)
        assert recorded["high_exclusive"] == count - 1
        negatives = sample_negatives([count] * batch, own, Given(negatives=recorded["values"]))
        found.append(negatives.reshape(batch, count, own) + count * np.arange(batch)[:, None, None])
    if cross:
        recorded = next(draws)
        assert recorded["high_exclusive"] == batch * count - 1
        drawn = np.array(recorded["values"]).reshape(batch, count, cross)
        negatives = sample_cross_negatives([count] * batch, cross, Given(cross_negatives=recorded["values"]))
        negatives = negatives.reshape(batch, count, cross)
        place = np.arange(count)[:, None]
        theirs = drawn + (drawn >= place)
        assert np.array_equal(negatives[0], theirs[0])
        for row in range(1, batch):
            # what lies between the place within the utterance and the frame itself is one row apart
            between = (drawn[row] >= place) & (drawn[row] < place + row * count)
            assert between.any() and np.array_equal(theirs[row] - negatives[row], between)
        found.append(theirs)
    every = np.concatenate([part.reshape(batch, -1) for part in found], axis=1)
    assert np.array_equal(every, expected)
    # as the logits take them: [negative][batch][position] -> row; each half of the list is one frame after the other
    gathered = expected.reshape(batch, count, own + cross).transpose(2, 0, 1)
    assert gathered.tolist() == case["gathered_first_feature"]


def test_negatives_from_everywhere_and_of_the_codebook_are_refused():
    """The fourth case, and what the model has no option for: a checkpoint with them is named, not misread."""
    (case,) = (case for case in NEGATIVES if case["num"] != case["rows_per_sample"])
    assert case["rows_per_sample"] > case["num"]
    for name, value in (("negatives_from_everywhere", True), ("codebook_negatives", 5)):
        with pytest.raises(CheckpointError, match=name):
            check_represented({name: value}, "pretraining", Path("x.pt"))


def test_normalized_waveforms():
    recorded = RECORDED["waveforms"]["normalize"]
    mono = np.array(recorded["input"], dtype=np.float32)
    np.testing.assert_allclose(normalize_waveform(mono), recorded["output"], rtol=0, atol=2e-6)
    stereo = np.array(recorded["stereo_input"], dtype=np.float32).mean(axis=1, dtype=np.float32)
    np.testing.assert_allclose(normalize_waveform(stereo), recorded["stereo_output"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("pad", [False, True])
def test_cropped_and_padded_waveforms(pad):
    """Crops begin where the original's generator says; behind a short utterance there are zeros and a mask."""
    (case,) = (case for case in RECORDED["waveforms"]["collated"] if case["pad"] == pad)
    inputs = [np.array(values, dtype=np.float32) for values in RECORDED["waveforms"]["inputs"]]
    most = RECORDED["waveforms"]["max_sample_size"]
    longest = min(max(map(len, inputs)), most) if pad else min(min(map(len, inputs)), most)
    state = np.random.RandomState(case["numpy_seed"])
    items = []
    for number, waveform in enumerate(inputs):
        if len(waveform) > longest:
            start = state.randint(0, len(waveform) - longest + 1)
            waveform = waveform[start : start + longest]
        items.append({"id": str(number), "waveform": waveform})
    batch = collate_speech(items)
    torch.testing.assert_close(batch.waveforms, torch.tensor(case["source"]), rtol=0, atol=0)
    padding = torch.arange(longest) >= batch.lengths[:, None]
    assert padding.tolist() == (case["padding_mask"] or [[False] * longest] * len(inputs))


@pytest.mark.parametrize("case", RECORDED["ordering"]["orders"], ids=lambda case: f"seed {case['numpy_seed']}")
def test_the_order_of_utterances(case):
    """Longest first by the capped size, ties in random order; the function of text goes the other way."""
    sizes = np.minimum(RECORDED["ordering"]["sizes"], RECORDED["ordering"]["max_sample_size"])
    assert fairseq_order(sizes, case["numpy_seed"])[::-1].tolist() == case["order"]


@pytest.mark.parametrize("case", RECORDED["batch_by_size"])
def test_batches_by_size(case):
    batches = fairseq_batches(
        case["indices"],
        np.array(case["sizes"]),
        max_tokens=case["max_tokens"],
        max_sentences=case["max_sentences"],
        multiple=case["required_batch_size_multiple"],
    )
    assert batches == case["batches"]


def test_the_decay_of_the_teacher():
    recorded = RECORDED["ema_decay"]
    ramp = DecayRamp(recorded["start"], recorded["end"], recorded["end_step"])
    for update, decay in recorded["decay_at_num_updates"].items():
        assert ramp.at(int(update)) == pytest.approx(decay, rel=1e-12)


@pytest.mark.parametrize("case", RECORDED["token_blocks"]["cases"], ids=lambda case: case["break_mode"])
def test_blocks_of_tokens(case):
    sizes = np.array([len(sentence) for sentence in case["sentences"]])
    made = make_blocks(sizes, case["block_size"], break_mode=case["break_mode"], cut_long=False)
    tokens = [token for sentence in case["sentences"] for token in sentence]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    blocks = []
    for (first, offset), size in zip(locate(sizes, made)[:, :2].tolist(), made.sizes.tolist(), strict=True):
        begin = int(starts[first]) + offset
        blocks.append(tokens[begin : begin + size])
    assert blocks == case["blocks"]
