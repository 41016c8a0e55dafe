"""The loader: what arrives is a function of the plan alone, bad audio is counted, and dead workers are told."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import soundfile
import torch

from toolkit.data.audio import read_audio
from toolkit.data.dataset import DynamicItemDataset, provides, speech_items, takes, text_items
from toolkit.data.loader import Loader, SpeechBatch, collate_speech
from toolkit.data.manifest import Manifest
from toolkit.data.sampler import BucketSampler, EvaluationSampler
from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import AudioError, ConfigError, TokenError, TrainingError


def dataset_of(table: Manifest, **options) -> DynamicItemDataset:
    items = speech_items(16000, **options) + text_items(LetterTokenizer.from_texts(["AB CD"]))
    return DynamicItemDataset(table, items, ["id", "waveform", "tokens", "text", "duration"])


def contents(micro) -> tuple:
    """Everything in a micro-batch, comparable."""
    place = (micro.epoch, micro.update, micro.micro, micro.last, micro.bad, micro.weight)
    if micro.batch is None:
        return (*place, None)
    batch = micro.batch
    tensors = (batch.waveforms, batch.lengths, batch.tokens, batch.token_lengths)
    return (*place, batch.ids, batch.texts, batch.extras, *[(t.dtype, t.tolist()) for t in tensors])


def loader_of(table: Manifest, *, mode="pad", seed=0, world=1, rank=0, workers=0, **options) -> Loader:
    sampler = BucketSampler(
        table.durations, batch_seconds=1.5, effective_batch=5.9, mode=mode, seed=seed, world_size=world, num_buckets=2
    )
    assert sampler.micros_per_update == 4
    return Loader(dataset_of(table), sampler, num_workers=workers, seed=seed, world_size=world, rank=rank, **options)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_batches_hold_what_the_plan_says(make_corpus, mode):
    table = make_corpus(40)
    loader = loader_of(table, mode=mode, seed=5)
    plan = loader.sampler.plan(1)
    micros = list(loader.epoch(1))
    assert [micro.update for micro in micros] == np.repeat(
        np.arange(plan.num_updates), np.diff(plan.update_offsets)
    ).tolist()
    assert [micro.last for micro in micros] == [
        micro + 1 == size for size in np.diff(plan.update_offsets) for micro in range(size)
    ]
    for index, micro in enumerate(micros):
        rows, batch = plan.batch_rows(index), micro.batch
        assert batch.ids == [table.ids[row] for row in rows]
        assert micro.weight == len(batch) == len(rows)
        assert batch.waveforms.dtype == torch.float32
        assert tuple(batch.waveforms.shape) == (len(rows), plan.batch_samples[index])
        for place, row in enumerate(rows):
            full = read_audio(table.row(row)["wav"])
            length = int(batch.lengths[place])
            got = batch.waveforms[place].numpy()
            if mode == "pad":
                assert length == len(full)
                assert np.array_equal(got[:length], full) and not got[length:].any()
            else:
                assert length == plan.batch_samples[index]
                crop = loader.dataset.load(row, epoch=1, crop_samples=length, seed=5)["waveform"]
                assert np.array_equal(got, crop)
    assert len({micro.batch.waveforms.shape[1] for micro in micros}) == 2


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_workers_change_nothing(make_corpus, mode):
    table = make_corpus(40)
    alone = loader_of(table, mode=mode)
    wanted = [[contents(micro) for micro in alone.epoch(epoch)] for epoch in (0, 1)]
    assert wanted[0] != wanted[1]
    for workers in (1, 2):
        loader = loader_of(table, mode=mode, workers=workers)
        # Epoch after epoch, from the same workers; then one that they did not expect.
        assert [[contents(micro) for micro in loader.epoch(epoch)] for epoch in (0, 1)] == wanted
        assert [contents(micro) for micro in loader.epoch(0)] == wanted[0]
        loader.close()
    assert [contents(micro) for micro in loader_of(table, mode=mode, seed=1).epoch(0)] != wanted[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_equals_the_tail(make_corpus, workers):
    table = make_corpus(40)
    whole = [contents(micro) for micro in loader_of(table, mode="crop").epoch(2)]
    loader = loader_of(table, mode="crop", workers=workers)
    for first in range(loader.updates_per_epoch + 1):
        resumed = [contents(micro) for micro in loader.epoch(2, first_update=first)]
        assert resumed == [micro for micro in whole if micro[1] >= first]
    loader.close()
    # After a resume the next epoch follows as always.
    assert [contents(m) for m in loader.epoch(3)] == [contents(m) for m in loader_of(table, mode="crop").epoch(3)]
    loader.close()
    with pytest.raises(ConfigError) as caught:
        next(loader.epoch(0, first_update=99))
    assert str(caught.value) == (
        f"update 99 is not in an epoch of {loader.updates_per_epoch} updates; "
        "the manifest or the batch size has changed since."
    )


def test_resume_loads_nothing_before(make_corpus):
    table = make_corpus(40)
    loaded = []

    @takes("id")
    @provides("noted")
    def noted(identity):
        loaded.append(identity)
        return identity

    loader = loader_of(table)
    loader.dataset.add_dynamic_item(noted)
    loader.dataset.set_output_keys(["id", "waveform", "noted"])
    last = loader.updates_per_epoch - 1
    micros = list(loader.epoch(0, first_update=last))
    assert loaded == [identity for micro in micros for identity in micro.batch.ids]
    assert 0 < len(loaded) < 40


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_plan(make_corpus, world):
    table = make_corpus(43)
    single = {(micro.update, micro.micro): contents(micro)[5:] for micro in loader_of(table, mode="crop").epoch(0)}
    shared = {}
    counts = []
    for rank in range(world):
        micros = list(loader_of(table, mode="crop", world=world, rank=rank).epoch(0))
        counts.append([micro.update for micro in micros])
        for update in range(len(set(counts[0]))):
            mine = [micro for micro in micros if micro.update == update]
            assert [micro.last for micro in mine] == [False] * (len(mine) - 1) + [True]
        assert all(micro.micro % world == rank for micro in micros)
        shared |= {(micro.update, micro.micro): contents(micro)[5:] for micro in micros if micro.batch is not None}
        idle = [micro for micro in micros if micro.batch is None]
        assert all(micro.update == micros[-1].update and micro.weight == 0 for micro in idle)
    assert shared == single
    # Every rank takes equally many turns in each update, so that none waits for another.
    assert all(count == counts[0] for count in counts)


def test_a_rank_without_work_still_takes_its_turn(make_corpus):
    table = make_corpus(3)
    sampler = EvaluationSampler(table.durations, batch_seconds=100, world_size=2)
    for rank, filled in ((0, True), (1, False)):
        micros = list(Loader(dataset_of(table), sampler, rank=rank, world_size=2).epoch(0))
        assert len(micros) == 1 and micros[0].last
        assert (micros[0].batch is not None) == filled


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_can_be_repeated(make_corpus, workers):
    table = make_corpus(20)
    sampler = EvaluationSampler(table.durations, batch_seconds=2)
    loader = Loader(dataset_of(table), sampler, num_workers=workers)
    first = [contents(micro) for micro in loader.epoch(0)]
    assert [contents(micro) for micro in loader.epoch(0)] == first
    ids = [identity for micro in loader.epoch(0) for identity in micro.batch.ids]
    assert sorted(ids) == sorted(table.ids)
    for micro in loader.epoch(0):
        assert micro.batch.waveforms.shape[1] == micro.batch.lengths.max()


def spoil(table: Manifest, *rows: int) -> None:
    """Break the audio files of ``rows``: no file, an empty one, one cut short, in turn."""
    for index, row in enumerate(rows):
        path = table.row(row)["wav"]
        data = open(path, "rb").read()
        os.remove(path)
        if index % 3 == 1:
            open(path, "wb").close()
        elif index % 3 == 2:
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_audio_is_named_counted_and_skipped(make_corpus, workers):
    table = make_corpus(40)
    good = {micro[6][0]: micro for micro in (contents(m) for m in loader_of(table).epoch(0))}
    assert good
    spoil(table, 3, 7, 11)
    loader = loader_of(table, workers=workers, max_bad_share=3 / 40)
    micros = list(loader.epoch(0))
    bad = dict(pair for micro in micros for pair in micro.bad)
    wav = [table.row(row)["wav"] for row in (3, 7, 11)]
    assert bad == {
        "utt003": f"utterance utt003: {wav[0]} does not exist; check the paths in the manifest and the data folder.",
        "utt007": f"utterance utt007: {wav[1]} is empty (0 bytes); copy or download the file again.",
        "utt011": bad["utt011"],
    }
    assert bad["utt011"].startswith(f"utterance utt011: {wav[2]} is truncated or corrupt: ")
    assert loader.bad == bad
    ids = [identity for micro in micros for identity in (micro.batch.ids if micro.batch else [])]
    assert sorted([*ids, *bad]) == sorted(table.ids)
    assert sum(micro.weight for micro in micros) == 37
    # The same three in the next epoch are still three.
    list(loader.epoch(1))
    assert len(loader.bad) == 3
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_bad_audio_ends_the_run(make_corpus, workers):
    table = make_corpus(40)
    spoil(table, *range(0, 40, 3))
    loader = loader_of(table, workers=workers, max_bad_share=0.1)
    with pytest.raises(AudioError) as caught:
        list(loader.epoch(0))
    message = str(caught.value)
    assert message.startswith(
        f"{len(loader.bad)} of 40 utterances have bad audio, more than max_bad_share 0.1 allows; mend the files or "
        "raise max_bad_share to go on, or remove them from the manifest and take another output_folder. utterance utt0"
    )
    assert 5 <= len(loader.bad) <= 8
    assert sum(f"utterance {identity}: " in message for identity in loader.bad) == 5
    assert message.endswith(f" (and {len(loader.bad) - 5} more)") == (len(loader.bad) > 5)


def test_no_bad_audio_at_all_when_asked(make_corpus):
    table = make_corpus(40)
    spoil(table, 5)
    with pytest.raises(AudioError, match=r"^1 of 40 utterances have bad audio, more than max_bad_share 0 allows; "):
        list(loader_of(table, max_bad_share=0).epoch(0))


def test_batch_of_only_bad_audio(make_corpus):
    table = make_corpus(2)
    spoil(table, 0, 1)
    sampler = EvaluationSampler(table.durations, batch_seconds=100)
    micros = list(Loader(dataset_of(table), sampler, max_bad_share=1).epoch(0))
    assert len(micros) == 1 and micros[0].batch is None and micros[0].last
    assert [identity for identity, _ in micros[0].bad] == [table.ids[row] for row in sampler.plan(0).rows]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_in_a_worker_stays_one_sentence(make_corpus, workers):
    table = make_corpus(8)
    dataset = DynamicItemDataset(table, speech_items(16000) + text_items(LetterTokenizer(["|", "A"])), ["id", "tokens"])
    loader = Loader(dataset, EvaluationSampler(table.durations, batch_seconds=1), num_workers=workers)
    with pytest.raises(
        TokenError, match=r"^utterance utt0\d\d: the transcript '[^\n]* or set unknown to 'drop' or 'unk'\.$"
    ):
        list(loader.epoch(0))


def test_a_killed_worker_is_told(make_corpus):
    table = make_corpus(8)

    @takes("id")
    @provides("dies")
    def dies(identity):
        os.kill(os.getpid(), signal.SIGKILL)

    dataset = DynamicItemDataset(table, [dies], ["id", "dies"])
    loader = Loader(dataset, EvaluationSampler(table.durations, batch_seconds=1), num_workers=1)
    with pytest.raises(TrainingError) as caught:
        list(loader.epoch(0))
    assert str(caught.value) == (
        "a loader worker was killed, most likely because memory (or shared memory, /dev/shm) ran out; lower "
        "num_workers or the batch (batch_seconds, batch_tokens), and run the same command again to resume."
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_keeps_its_traceback(make_corpus, workers):
    table = make_corpus(4)

    @takes("id")
    @provides("broken")
    def broken(identity):
        return identity.no_such_attribute

    dataset = DynamicItemDataset(table, [broken], ["id", "broken"])
    loader = Loader(dataset, EvaluationSampler(table.durations, batch_seconds=1), num_workers=workers)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        list(loader.epoch(0))


def test_leaving_early_and_starting_again(make_corpus):
    table = make_corpus(40)
    loader = loader_of(table, workers=1)
    wanted = [contents(micro) for micro in loader_of(table).epoch(0)]
    for micro in loader.epoch(0):
        assert contents(micro) == wanted[0]
        break
    assert [contents(micro) for micro in loader.epoch(0)] == wanted
    following = [contents(micro) for micro in loader_of(table).epoch(1)]
    next(loader.epoch(1))
    assert [contents(micro) for micro in loader.epoch(1)] == following
    stale = loader.epoch(5)
    next(stale)
    assert [contents(micro) for micro in loader.epoch(0)] == wanted
    with pytest.raises(TrainingError, match=r"^the loader was started again while an earlier pass "):
        next(stale)
    loader.close()


def test_constructor_errors(make_corpus):
    table = make_corpus(4)
    dataset = dataset_of(table)
    sampler = EvaluationSampler(table.durations, batch_seconds=1, world_size=2)
    worlds = (
        "the loader is rank {} of {} and its sampler plans for 2 ranks; "
        "give both the same world_size, and a rank below it."
    )
    cases = {
        worlds.format(0, 1): {},
        worlds.format(2, 2): {"world_size": 2, "rank": 2},
        "max_bad_share is 1.5, expected a share from 0 to 1 (0.01 = 1 %).": {"world_size": 2, "max_bad_share": 1.5},
        "num_workers is -1, expected 0 or more.": {"world_size": 2, "num_workers": -1},
    }
    for sentence, options in cases.items():
        with pytest.raises(ConfigError) as caught:
            Loader(dataset, sampler, **options)
        assert str(caught.value) == sentence
    with pytest.raises(ConfigError) as caught:
        Loader(dataset, EvaluationSampler([1.0], batch_seconds=1))
    assert str(caught.value) == (
        "the sampler plans 1 utterances and the dataset has 4; give the sampler the durations of this dataset."
    )


def test_collation():
    items = [
        {"id": "a", "waveform": np.ones(3, np.float32), "tokens": np.array([5, 6]), "text": "x", "spk": "1"},
        {"id": "b", "waveform": np.ones(5, np.float32), "tokens": np.array([7]), "text": "y", "spk": "2"},
    ]
    batch = collate_speech(items, samples=6)
    assert batch.waveforms.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch.lengths.tolist() == [3, 5] and batch.lengths.dtype == torch.int64
    assert batch.tokens.tolist() == [[5, 6], [7, 1]] and batch.tokens.dtype == torch.int64
    assert batch.token_lengths.tolist() == [2, 1]
    assert (batch.ids, batch.texts, batch.extras) == (["a", "b"], ["x", "y"], {"spk": ["1", "2"]})
    assert batch.seconds(4) == 2.0
    assert batch.relative_lengths.tolist() == [0.5, pytest.approx(5 / 6)]
    # Nothing is ever cut off: a longer utterance makes the batch longer.
    assert collate_speech(items, samples=4).waveforms.shape == (2, 5)
    assert collate_speech(items).waveforms.shape == (2, 5)
    plain = collate_speech([{"id": "a", "waveform": np.ones(3, np.float32)}])
    assert plain.tokens is plain.token_lengths is plain.texts is None
    empty = collate_speech([items[0] | {"tokens": np.array([], dtype=np.int64)}])
    assert tuple(empty.tokens.shape) == (1, 0)
    with pytest.raises(ConfigError) as caught:
        collate_speech([{"id": "a"}])
    assert str(caught.value) == (
        "a batch of speech needs 'waveform' of each utterance; add it to the dataset's output keys."
    )


def test_batches_move_whole():
    batch = collate_speech([{"id": "a", "waveform": np.ones(3, np.float32), "tokens": np.array([1, 2])}])
    moved = batch.to("meta")
    assert isinstance(moved, SpeechBatch) and moved.ids == ["a"]
    assert moved.waveforms.device.type == moved.tokens.device.type == "meta"
    # Lengths stay on the host, where frame counts and CTC ask for them.
    assert moved.lengths.tolist() == [3] and moved.token_lengths.tolist() == [2]
    assert moved.lengths.dtype == moved.token_lengths.dtype == torch.int64


def test_audio_slightly_longer_than_its_manifest_keeps_the_shape(tmp_path):
    """MP3 files decode to some 30 samples more than the manifest was made with."""
    rows = []
    for index, count in enumerate((16000, 24000, 32000)):
        soundfile.write(tmp_path / f"{index}.wav", np.full(count + 30, 0.5, dtype=np.float32), 16000)
        rows.append({"ID": str(index), "duration": count / 16000, "wav": str(tmp_path / f"{index}.wav")})
    table = Manifest.from_rows(rows)
    dataset = DynamicItemDataset(table, speech_items(16000), ["id", "waveform"])
    sampler = BucketSampler(table.durations, batch_seconds=2.1, num_buckets=3)
    for micro in Loader(dataset, sampler).epoch(0):
        assert micro.batch.waveforms.shape[1] in sampler.samples
        assert micro.batch.lengths[0] == table.durations[int(micro.batch.ids[0])] * 16000 + 30
