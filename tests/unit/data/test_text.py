"""Blocks of text as a dataset, batches of them, and the plan of an epoch in tokens."""

from __future__ import annotations

import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.indexed_text import IndexedText, IndexedTextWriter, JoinedText
from toolkit.data.loader import Loader
from toolkit.data.sampler import BucketSampler
from toolkit.data.text import TextBlocks, collate_text, open_text
from toolkit.data.text_blocks import make_blocks
from toolkit.data.text_dictionary import TextDictionary
from toolkit.data.text_masks import TextMasking, fairseq_generator
from toolkit.data.text_sampler import TokenBucketSampler, TokenEvaluationSampler, TokenSampler
from toolkit.errors import ConfigError, ManifestError, TokenError

TEXT = Path(__file__).resolve().parents[2] / "fixtures" / "fairseq_text"


def blocks_of(part: str = "train", *, masked: bool = True, folder: Path = TEXT / "bin_own", **options) -> TextBlocks:
    dictionary, texts = open_text(folder, [part])
    masking = TextMasking(mask_id=dictionary.mask_id, vocab_size=dictionary.vocab_size) if masked else None
    return TextBlocks(texts[part], dictionary, masking=masking, **{"tokens_per_sample": 128, **options})


# ---- dataset and batch -----------------------------------------------------------------------------------------------


def test_blocks_hold_the_text_behind_a_begin_symbol():
    blocks = blocks_of(masked=False, break_mode="complete")
    tokens = [blocks.tokens(row) for row in range(len(blocks))]
    assert [len(row) for row in tokens] == blocks.lengths.tolist()
    assert max(len(row) for row in tokens) == 128 and all(row[0] == 0 for row in tokens)
    joined = np.concatenate([row[1:] for row in tokens])
    assert np.array_equal(joined, blocks.text.tokens(0, blocks.text.num_tokens))
    assert blocks.report().startswith("train: 316 lines, 23,671 tokens -> ")


def test_ids_say_where_a_block_begins():
    blocks = blocks_of(break_mode="complete")
    for row in range(len(blocks)):
        line, _, offset = blocks.block_id(row).removeprefix("train:").partition("+")
        own = blocks.text[int(line) - 1][int(offset or 0) :]
        begin = blocks.tokens(row)[1:]
        length = min(len(own), len(begin))
        assert length > 0 and np.array_equal(own[:length], begin[:length])


def test_masks_are_a_function_of_seed_epoch_and_block():
    blocks = blocks_of()
    first = blocks.load(3, epoch=0, seed=1)
    again = blocks_of().load(3, epoch=0, seed=1)
    assert np.array_equal(first["source"], again["source"]) and np.array_equal(first["chosen"], again["chosen"])
    others = [blocks.load(3, epoch=1, seed=1), blocks.load(3, epoch=0, seed=2)]
    assert all(not np.array_equal(first["chosen"], other["chosen"]) for other in others)
    assert np.array_equal(first["source"] == blocks.dictionary.mask_id, first["chosen"])
    assert np.array_equal(first["source"][~first["chosen"]], first["tokens"][~first["chosen"]])


def test_fairseqs_masks_where_wanted():
    blocks = blocks_of(fairseq_masks=True, cut_long=False)
    item = blocks.load(7, epoch=2, seed=5)
    source, _ = blocks.masking(blocks.tokens(7), fairseq_generator(5, 3, 7))
    assert np.array_equal(item["source"], source)


def test_a_batch_is_padded_and_moves():
    blocks = blocks_of()
    items = [blocks.load(row, epoch=0, seed=0) for row in (0, 1, 2)]
    batch = collate_text(items, samples=130)
    assert len(batch) == 3 and batch.ids == [item["id"] for item in items]
    assert batch.tokens.shape == batch.source.shape == batch.chosen.shape == (3, 130)
    assert batch.tokens.dtype == batch.source.dtype == batch.lengths.dtype == torch.int64
    for index, item in enumerate(items):
        length = int(batch.lengths[index])
        assert length == len(item["tokens"])
        assert batch.tokens[index, :length].tolist() == item["tokens"].tolist()
        assert set(batch.tokens[index, length:].tolist()) == set(batch.source[index, length:].tolist()) == {1}
        assert not batch.chosen[index, length:].any()
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.source.device.type == moved.chosen.device.type == "meta"
    assert moved.lengths.device.type == "cpu"
    plain = collate_text([{"id": "a", "tokens": np.array([0, 2])}])
    assert plain.source is None and plain.chosen is None and plain.to("cpu").tokens.tolist() == [[0, 2]]


def test_fingerprint_is_of_text_and_blocks():
    prints = {blocks_of().fingerprint(), blocks_of("valid").fingerprint(), blocks_of(break_mode="eos").fingerprint()}
    assert len(prints) == 3 and blocks_of().fingerprint() in prints


def test_a_text_without_blocks_is_named(tmp_path):
    with IndexedTextWriter(tmp_path / "valid", "<u2") as writer:
        writer.add(np.array([2, 2, 2]), np.array([1, 1, 1]))
    with pytest.raises(ManifestError) as error:
        TextBlocks(IndexedText(tmp_path / "valid"), TextDictionary(["a"]))
    assert str(error.value) == (
        f"{tmp_path / 'valid'} (3 lines, 3 tokens) gives no block with break_mode 'complete_doc'; check that it is not "
        "empty."
    )


def test_a_dictionary_of_another_text_is_refused(tmp_path):
    folder = Path(shutil.copytree(TEXT / "bin_own", tmp_path / "mixed"))
    TextDictionary([f"w{number}" for number in range(100)]).save(folder / "dict.txt")
    with pytest.raises(TokenError) as error:
        blocks_of(folder=folder)
    assert str(error.value) == (
        f"{folder}/train.bin holds the token id 4041, but dict.txt has 104 entries (special ones included); the two do "
        "not belong together: take the dict.txt that was written with the .bin."
    )


def test_ids_are_checked_as_they_are_read_too():
    blocks = blocks_of()
    blocks.dictionary = TextDictionary(["a"])
    with pytest.raises(TokenError, match=r"^train:4: .*train\.bin holds the token id \d+, but dict\.txt has 5 entries"):
        blocks.tokens(1)


def test_the_masks_id_in_a_text_is_told_with_its_line():
    blocks = blocks_of(break_mode="eos")
    blocks.masking = TextMasking(mask_id=int(blocks.tokens(3)[2]), vocab_size=4042)
    with pytest.raises(TokenError, match=r"^train:4: the text holds the mask's id \d+ as a token; "):
        blocks.load(3, epoch=0)


# ---- a part in several pieces ----------------------------------------------------------------------------------------


@pytest.fixture
def pieces(tmp_path) -> Path:
    """The training text in four pieces, one of them empty, and a second one for validation."""
    whole, folder = IndexedText(TEXT / "bin_own" / "train"), tmp_path / "pieces"
    shutil.copytree(TEXT / "bin_own", folder)
    bounds = [0, 100, 101, 101, len(whole)]
    for name, first, end in zip(("train", "train1", "train2", "train3"), bounds, bounds[1:], strict=False):
        with IndexedTextWriter(folder / name, "<u2") as writer:
            for item in range(first, end):
                writer.add(whole[item], whole.sizes[item : item + 1])
    for end in ("bin", "idx"):
        shutil.copy(folder / f"valid.{end}", folder / f"valid1.{end}")
    return folder


@pytest.mark.parametrize("break_mode", ["complete_doc", "none"])
def test_pieces_are_one_text_as_in_fairseq(pieces, break_mode):
    dictionary, texts = open_text(pieces, ["train", "valid"], joined=["train"])
    whole = blocks_of(break_mode=break_mode)
    joined = TextBlocks(
        texts["train"], dictionary, masking=whole.masking, tokens_per_sample=128, break_mode=break_mode
    )
    assert joined.report() == whole.report() and len(joined) == len(whole)
    for row in range(len(whole)):
        ours, theirs = joined.load(row, epoch=0), whole.load(row, epoch=0)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ("tokens", "source", "chosen"))
    # fairseq reads a further valid1 only by its own name
    assert len(texts["valid"]) == len(IndexedText(TEXT / "bin_own" / "valid"))


def test_a_line_of_a_piece_is_named_by_its_piece(pieces):
    joined = open_text(pieces, ["train"], joined=["train"])[1]["train"]
    assert [joined.line_id(item) for item in (0, 99, 100, 101, 102)] == [
        "train:1", "train:100", "train1:1", "train3:1", "train3:2",
    ]  # fmt: skip


def test_pieces_travel_to_workers_and_are_told_apart(pieces):
    _, texts = open_text(pieces, ["train"], joined=["train"])
    again = pickle.loads(pickle.dumps(texts["train"]))
    assert again.fingerprint() == texts["train"].fingerprint() != IndexedText(pieces / "train").fingerprint()
    assert np.array_equal(again.tokens(0, 20000), texts["train"].tokens(0, 20000))
    assert again.num_tokens == 23671


def test_bad_pieces(pieces):
    _, texts = open_text(pieces, ["train"], joined=["train"])
    with pytest.raises(TokenError, match=r"train3\.bin holds the token id \d+, but dict\.txt has 100 entries"):
        TextBlocks(JoinedText(texts["train"].pieces[2:]), TextDictionary([f"w{n}" for n in range(96)]))
    blocks = TextBlocks(texts["train"], blocks_of().dictionary)
    blocks.dictionary = TextDictionary(["a"])
    with pytest.raises(TokenError, match=r"train\.bin \(or train1\.bin, train2\.bin, train3\.bin\) holds the token id"):
        blocks.tokens(0)
    (pieces / "train2.idx").unlink()
    with pytest.raises(TokenError) as error:
        open_text(pieces, ["train"], joined=["train"])
    assert str(error.value) == (
        f"{pieces} has train3.idx and no train2.idx; copy the missing piece, or move those behind it away."
    )


def test_bad_folders(tmp_path):
    with pytest.raises(TokenError) as error:
        open_text(tmp_path, ["train"])
    assert str(error.value) == (
        f"{tmp_path} has no dict.txt; give the folder that fairseq-preprocess or wikitext_prepare.py wrote."
    )
    with pytest.raises(TokenError) as error:
        open_text(TEXT / "bin_own", ["dev"])
    assert str(error.value) == f"{TEXT / 'bin_own'} has no part 'dev' (dev.idx); it has test, train, valid."
    with pytest.raises(ConfigError, match=r"^tokens_per_sample is 1, expected a whole number of 2 or more\.$"):
        blocks_of(tokens_per_sample=1)


# ---- the plan of an epoch --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 400),
    corpus=st.integers(0, 3),
    batch_tokens=st.sampled_from([64, 1000, 8192]),
    effective=st.sampled_from([None, 500, 4000, 30000]),
    world_size=st.sampled_from([1, 2, 3, 8]),
    max_batch_size=st.sampled_from([None, 1, 5]),
    epoch=st.integers(0, 3),
)
def test_invariants_of_the_plan(count, corpus, batch_tokens, effective, world_size, max_batch_size, epoch):
    lengths = np.random.default_rng(corpus).integers(2, 513, count)
    sampler = TokenSampler(lengths, batch_tokens=batch_tokens, effective_batch=effective, world_size=world_size,
                           max_batch_size=max_batch_size)  # fmt: skip
    plan = sampler.plan(epoch)
    sizes = np.diff(plan.batch_offsets)
    assert np.array_equal(np.sort(plan.rows), np.arange(count)) and sizes.min() >= 1
    assert plan.num_batches == sampler.batches_per_epoch == plan.update_offsets[-1]
    assert plan.num_updates == sampler.updates_per_epoch
    groups = sampler.micros_per_update
    assert groups % world_size == 0 and sampler.accumulation * world_size == groups
    assert np.all(np.diff(plan.update_offsets)[:-1] == groups) and 1 <= np.diff(plan.update_offsets)[-1] <= groups
    assert np.all((sizes * plan.batch_samples <= batch_tokens) | (sizes == 1))
    assert max_batch_size is None or sizes.max() <= max_batch_size
    for batch in range(plan.num_batches):
        assert lengths[plan.batch_rows(batch)].max() <= plan.batch_samples[batch]
    assert sampler.epoch_tokens == int((sizes * plan.batch_samples).sum())
    assert not plan.crop


def test_order_is_a_function_of_seed_and_epoch():
    lengths = blocks_of().lengths
    first, again = (TokenSampler(lengths, batch_tokens=1024, seed=3) for _ in range(2))
    assert np.array_equal(first.plan(2).rows, again.plan(2).rows) and first.plan_digest == again.plan_digest
    others = [first.plan(3), TokenSampler(lengths, batch_tokens=1024, seed=4).plan(2)]
    assert all(not np.array_equal(first.plan(2).rows, other.rows) for other in others)
    # Not only the order of the batches changes, but who is together.
    together = [{tuple(sorted(plan.batch_rows(batch))) for batch in range(plan.num_batches)}
                for plan in (first.plan(0), first.plan(1))]  # fmt: skip
    assert len(together[0] & together[1]) < len(together[0]) / 2


def test_updates_are_the_same_for_one_and_several_ranks():
    lengths = np.random.default_rng(0).integers(2, 513, 3000)
    one, four = (TokenSampler(lengths, batch_tokens=2048, effective_batch=16384, world_size=size) for size in (1, 4))
    assert one.plan_digest == four.plan_digest and one.micros_per_update == four.micros_per_update
    plan, other = one.plan(1), four.plan(1)
    assert np.array_equal(plan.rows, other.rows) and np.array_equal(plan.update_offsets, other.update_offsets)
    # At each step the ranks have work of like size: tokens, padding counted.
    sizes = np.diff(other.batch_offsets)
    work = []
    for update in range(other.num_updates - 1):
        for turn in zip(*(other.micros(update, rank, 4) for rank in range(4)), strict=True):
            held = [int(sizes[batch] * other.batch_samples[batch]) for _, batch in turn]
            work.append(max(held) / np.mean(held))
    assert np.mean(work) < 1.25


def test_an_update_sees_all_lengths():
    """Batches are of like lengths, but what is learned from at once is not: length says something of the text."""
    lengths = np.random.default_rng(0).integers(2, 513, 6000)
    plan = TokenSampler(lengths, batch_tokens=2048, effective_batch=32768).plan(0)
    spreads = []
    for update in range(plan.num_updates - 1):
        first, last = plan.update_offsets[update : update + 2].tolist()
        rows = plan.rows[plan.batch_offsets[first] : plan.batch_offsets[last]]
        spreads.append(lengths[rows].max() - lengths[rows].min())
    assert np.mean(spreads) > 350 and min(spreads) > 150  # of 510; neighbours alone would give about 20


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
@pytest.mark.parametrize("tokens_per_sample", [64, 512])
def test_padding_stays_below_five_percent(mode, tokens_per_sample):
    # Lines as in WikiText: paragraphs, and headings and empty lines between.
    rng = np.random.default_rng(1)
    paragraphs = np.clip(rng.lognormal(4.6, 0.7, 1500), 2, 900).astype(int)
    sizes = np.stack([paragraphs, np.ones(1500, int), rng.integers(4, 12, 1500), np.ones(1500, int)], 1).reshape(-1)
    blocks = make_blocks(sizes, tokens_per_sample - 1, break_mode=mode)
    sampler = TokenSampler(blocks.sizes + 1, batch_tokens=8192, effective_batch=16384)
    assert sampler.padding_share < 0.05
    assert f"padding: {100 * sampler.padding_share:.1f} % of what the model sees" in sampler.report()
    assert "warning" not in sampler.report()


def test_the_report():
    sampler = TokenSampler([512, 500, 130, 128, 512, 127], batch_tokens=1024, effective_batch=1024)
    assert sampler.report() == (
        "6 blocks, 1,909 tokens, in 3 batches of 1 to 3 blocks, padded to 2 lengths from 131 to 512; 2 updates an "
        "epoch\npadding: 1.0 % of what the model sees\nan update: 2 micro-batches, about 1,286 tokens; 1 rank, 2 "
        "accumulated on each\nwarning: an update holds 1,286 tokens, where effective_batch is 1,024: each rank takes "
        "one micro-batch of whole blocks at least, and there is no more than an epoch's text; choose effective_batch "
        "and batch_tokens by the number above."
    )


def test_fixed_shapes_end_on_whole_tokens():
    lengths = [512] * 32 + [511] * 10 + [128] * 64 + [100] * 10
    sampler = TokenBucketSampler(lengths, batch_tokens=8192, num_buckets=2)
    assert isinstance(sampler, BucketSampler)
    assert sampler.samples.tolist() == [128, 512] and sampler.batch_sizes.tolist() == [64, 16]
    plan = sampler.plan(0)
    assert set(plan.batch_samples.tolist()) == {128, 512} and sorted(plan.rows.tolist()) == list(range(116))
    lines = sampler.report().splitlines()
    assert lines[0] == "116 blocks, 30,686 tokens, in 2 buckets; 5 updates an epoch"
    assert lines[1].split() == ["bucket", "tokens", "batch", "blocks"]
    assert lines[2].split() == ["0", "128", "64", "64"] and lines[-1].startswith("an update: 1 micro-batch, about ")
    assert sampler.padding_share == pytest.approx(1 - 30686 / sampler.epoch_seconds)


@pytest.mark.parametrize("kind", [TokenSampler, TokenBucketSampler])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0, expected a number of tokens greater than 0 (1e9 at most)."),
        ({"effective_batch": "8k"},
         "effective_batch is '8k', expected a number of tokens greater than 0 (1e9 at most)."),
        ({"batch_tokens": 1, "effective_batch": 1e8},
         "effective_batch 1e+08 in micro-batches of batch_tokens 1 makes more than 1,000,000 of them for one update; "
         "both are tokens: lower effective_batch or raise batch_tokens."),
        ({"world_size": 0}, "world_size is 0, expected a whole number greater than 0."),
        ({"max_batch_size": 1.5}, "max_batch_size is 1.5, expected a whole number greater than 0."),
    ],
)  # fmt: skip
def test_bad_budgets(kind, arguments, message):
    with pytest.raises(ConfigError) as error:
        kind([5, 6], **{"batch_tokens": 64, **arguments})
    assert str(error.value) == message


@pytest.mark.parametrize("kind", [TokenSampler, TokenBucketSampler, TokenEvaluationSampler])
def test_bad_lengths(kind):
    with pytest.raises(ManifestError, match=r"^there are no blocks of text to plan; check that the prepared text is"):
        kind([], batch_tokens=64)
    with pytest.raises(ManifestError, match=r"^block 1 has 0 tokens, expected at least 1\.$"):
        kind([5, 0], batch_tokens=64)


# ---- the loader ------------------------------------------------------------------------------------------------------


def batches(loader: Loader, epoch: int, first_update: int = 0) -> list[tuple]:
    return [
        (micro.update, micro.micro, micro.last, micro.batch.ids, micro.batch.source.tolist())
        for micro in loader.epoch(epoch, first_update)
        if micro.batch is not None
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_any_update_gives_what_would_have_come(num_workers):
    blocks = blocks_of()
    options = {"batch_tokens": 1024, "effective_batch": 4096, "seed": 5}

    def loader() -> Loader:
        return Loader(blocks, TokenSampler(blocks.lengths, **options), collate=collate_text, num_workers=num_workers,
                      seed=5)  # fmt: skip

    running = loader()
    whole = [batches(running, epoch) for epoch in (0, 1)]
    running.close()
    resumed = loader()
    assert batches(resumed, 1, 2) == [row for row in whole[1] if row[0] >= 2]
    resumed.close()
    assert whole[0] != whole[1]
    assert sorted(name for row in whole[0] for name in row[3]) == sorted(
        blocks.block_id(row) for row in range(len(blocks))
    )


def test_ranks_share_the_batches_of_one():
    blocks = blocks_of()

    def share(rank: int, world_size: int) -> list[tuple]:
        sampler = TokenSampler(blocks.lengths, batch_tokens=1024, effective_batch=4096, world_size=world_size)
        return batches(Loader(blocks, sampler, collate=collate_text, rank=rank, world_size=world_size), 0)

    def content(rows: list[tuple]) -> list[tuple]:
        return sorted((update, micro, ids, source) for update, micro, _, ids, source in rows)

    assert content(share(0, 1)) == content(share(0, 2) + share(1, 2))


def test_validation_masks_never_change():
    blocks = blocks_of("valid")
    sampler = TokenEvaluationSampler(blocks.lengths, batch_tokens=1024)
    loader = Loader(blocks, sampler, collate=collate_text, seed=5)
    assert batches(loader, 0) == batches(loader, 0)


def test_a_large_text_is_planned_in_seconds():
    # The size of WikiText-103 in byte pairs: 1.8 million lines, 118 million tokens. Nothing here may be quadratic.
    sizes = np.maximum(1, np.random.default_rng(0).exponential(65, 1_800_000)).astype(np.int32)
    began = time.process_time()
    blocks = make_blocks(sizes, 511)
    sampler = TokenSampler(blocks.sizes + 1, batch_tokens=8192, effective_batch=131072)
    plan = sampler.plan(0)
    assert time.process_time() - began < 30  # about 1 s; a loop over tokens would take minutes
    assert len(plan.rows) == len(blocks) > 100_000
