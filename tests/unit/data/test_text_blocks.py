"""Blocks, masks and the order of batches: fairseq's tables, and what we do otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.indexed_text import IndexedText
from toolkit.data.text import collate_text
from toolkit.data.text_blocks import Blocks, locate, make_blocks
from toolkit.data.text_dictionary import TextDictionary
from toolkit.data.text_masks import TextMasking, fairseq_generator, fairseq_seed
from toolkit.data.text_order import fairseq_batches, fairseq_order, fairseq_turns
from toolkit.errors import ConfigError, ManifestError, TokenError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TEXT = FIXTURES / "fairseq_text"
TABLES = np.load(TEXT / "blocks.npz", allow_pickle=False)
BLOCKS = json.loads((TEXT / "blocks.json").read_bytes())
MASKS = json.loads((TEXT / "masks.json").read_bytes())
MORE_MASKS = json.loads((FIXTURES / "fairseq_models" / "masks" / "text_masks.json").read_bytes())
ORDER = json.loads((TEXT / "order.json").read_bytes())


def ranges(blocks: Blocks) -> list[list[int]]:
    return np.stack([blocks.starts, blocks.ends], axis=1).tolist()


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key.removesuffix("__sizes") for key in TABLES if key.endswith("__sizes")])
def test_every_table_of_fairseq(key):
    data, mode, block_size = key.split("__")
    sizes = IndexedText(TEXT / data.replace(".", "/")).sizes
    blocks = make_blocks(sizes, int(block_size), break_mode=mode, cut_long=False)
    assert np.array_equal(np.stack([blocks.starts, blocks.ends], axis=1), TABLES[f"{key}__slice_indices"])
    assert np.array_equal(blocks.sizes, TABLES[f"{key}__sizes"])
    assert np.array_equal(locate(sizes, blocks), TABLES[f"{key}__block_to_dataset_index"])


def test_edge_cases_of_fairseq():
    assert len(BLOCKS["edge_cases"]) == 160
    for case in BLOCKS["edge_cases"]:
        sizes = np.array(case["sizes"])
        options = {"break_mode": case["mode"], "cut_long": False, "separator": case["document_sep_len"]}
        if "error" in case:
            with pytest.raises(ManifestError):
                make_blocks(sizes, case["block_size"], **options)
            continue
        blocks = make_blocks(sizes, case["block_size"] or 1, **options)
        assert ranges(blocks) == case["slice_indices"], case
        assert locate(sizes, blocks).tolist() == case["block_to_dataset_index"], case


def packed_one_by_one(sizes: list[int], block_size: int, separator: int) -> list[tuple[int, int]]:
    """The same walk, item after item, long ones in pieces."""
    blocks, start, place = [], 0, 0
    for size in sizes:
        if size == separator:
            blocks.append((start, place))
            place = start = place + size
            continue
        pieces = [block_size] * (-(-size // block_size))
        pieces[-1] = size - block_size * (len(pieces) - 1)
        if len(pieces) > 1 and pieces[-1] == 1 and block_size > 2:
            pieces[-1], pieces[-2] = 2, pieces[-2] - 1
        for piece in pieces:
            if place + piece - start > block_size and place > start:
                blocks.append((start, place))
                start = place
            place += piece
    return [*blocks, (start, place)]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    block_size=st.integers(2, 15),
    mode=st.sampled_from(["complete", "complete_doc", "eos", "none"]),
)
def test_long_lines_are_cut_and_nothing_is_lost(sizes, block_size, mode):
    separator = 1 if mode == "complete_doc" else 0
    wanted = [pair for pair in packed_one_by_one(sizes, block_size, separator)
              if pair[1] - pair[0] > (1 if mode == "complete_doc" else 0)]  # fmt: skip
    try:
        blocks = make_blocks(np.array(sizes), block_size, break_mode=mode)
    except ManifestError:
        assert not wanted
        return
    assert blocks.sizes.max() <= block_size
    assert blocks.num_lines == len(sizes) and blocks.num_tokens == sum(sizes)
    if mode in ("complete", "complete_doc"):
        assert [tuple(pair) for pair in ranges(blocks)] == wanted
    if mode != "complete_doc":
        assert blocks.starts[0] == 0 and blocks.ends[-1] == sum(sizes)
        assert np.array_equal(blocks.ends[:-1], blocks.starts[1:])
    elif block_size > 2:  # only the separators are missing
        assert blocks.sizes.sum() == sum(size for size in sizes if size > 1)
        assert blocks.separators == sizes.count(1)
    assert blocks.cut_lines == (0 if mode == "none" else sum(size > block_size for size in sizes))


def test_the_report_counts_everything():
    sizes = IndexedText(TEXT / "bin_own" / "train").sizes
    assert make_blocks(sizes, 63).report() == (
        "316 lines, 23,671 tokens -> 486 blocks of 23,566 tokens; 124 lines longer than a block were cut, none of "
        "their tokens is lost; 105 empty lines part the documents and are left out"
    )
    assert make_blocks(sizes, 63, cut_long=False).report() == (
        "316 lines, 23,671 tokens -> 199 blocks of 23,566 tokens; 124 lines longer than a block are left whole; 105 "
        "empty lines part the documents and are left out"
    )
    # a one-token piece that stands alone in its document (blocks of two tokens cannot spare another)
    assert make_blocks(np.array([3]), 2).report() == (
        "1 lines, 3 tokens -> 1 blocks of 2 tokens; 1 lines longer than a block were cut; 1 tokens stood alone and are "
        "left out"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"break_mode": "lines"}, "break_mode is 'lines', expected one of none, complete, complete_doc, eos."),
        ({"block_size": 0}, "a block has 0 tokens, expected a whole number greater than 0."),
        ({"block_size": 2.5}, "a block has 2.5 tokens, expected a whole number greater than 0."),
    ],
)
def test_bad_arguments_of_blocks(arguments, message):
    with pytest.raises(ConfigError) as error:
        make_blocks(np.array([4]), arguments.pop("block_size", 8), **arguments)
    assert str(error.value) == message


def test_a_text_of_empty_lines_gives_no_block():
    with pytest.raises(ManifestError) as error:
        make_blocks(np.ones(3, dtype=np.int32), 8, name="prepared/valid")
    assert str(error.value) == (
        "prepared/valid (3 lines, 3 tokens) gives no block with break_mode 'complete_doc'; check that it is not empty."
    )


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_seeds_are_fairseqs():
    for row in MASKS["hash_to_seed"]:
        assert fairseq_seed(row["seed"], row["epoch"], row["index"]) == row["rng_seed"]
    for row in MASKS["numpy_seed_two_args"]:
        assert fairseq_seed(row["seed"], *row["addl"]) == row["np_seed"]


def masking_of(config: dict, dictionary: TextDictionary) -> TextMasking:
    return TextMasking(
        mask_id=dictionary.mask_id,
        vocab_size=dictionary.vocab_size,
        mask_prob=config["mask_prob"],
        mask_length=config["mask_multiple_length"],
        mask_length_std=config["mask_stdev"],
        keep_prob=config["leave_unmasked_prob"],
        random_prob=config["random_token_prob"],
        random_weights=dictionary.frequencies if config["freq_weighted_replacement"] else None,
    )


def block_tokens(text: IndexedText, config: dict) -> list[np.ndarray]:
    """All blocks with ``<s>``, lines shortened first where the case does so."""
    limit, lines = config["tokens_per_sample"], [text[item] for item in range(len(text))]
    if config["shorten_method"] == "truncate":
        lines = [line[:limit] for line in lines]
    elif config["shorten_method"] == "random_crop":
        for item, line in enumerate(lines):
            if len(line) > limit:  # the epoch that counts is 0 in every epoch
                rng = np.random.RandomState(fairseq_seed(config["seed"], 0, item))
                start = rng.randint(0, len(line) - limit)
                lines[item] = line[start : start + limit]
    stream = np.concatenate(lines)
    sizes = np.array([len(line) for line in lines])
    blocks = make_blocks(sizes, limit - 1, break_mode=config["sample_break_mode"], cut_long=False)
    return [np.concatenate([[0], stream[start:end]]) for start, end in ranges(blocks)]


@pytest.mark.parametrize("number", range(len(MASKS["cases"])))
def test_masks_are_fairseqs_token_for_token(number):
    case = MASKS["cases"][number]
    if case["data"] == "bin_own":
        dictionary = TextDictionary.from_file(TEXT / "bin_own" / "dict.txt")
    else:
        dictionary = TextDictionary.from_counts({str(number): 50257 - number for number in range(50257)})
    assert (dictionary.vocab_size, dictionary.mask_id) == (case["vocab_len_with_mask"], case["mask_idx"])
    config = case["cfg"]
    blocks = block_tokens(IndexedText(TEXT / case["data"] / case["split"]), config)
    assert len(blocks) == case["n_blocks"]
    shape = case["collated_first3"].get("src_tokens") or case["collated_first3"]["source"]
    batch = collate_text([{"id": "", "tokens": blocks[sample["index"]]} for sample in case["samples"][: shape[0]]])
    assert list(batch.tokens.shape) == shape and int(batch.lengths.sum()) == case["collated_first3_ntokens"]
    masking = masking_of(config, dictionary)
    for sample in case["samples"]:
        tokens = blocks[sample["index"]]
        if config["skip_masking"]:
            assert tokens.tolist() == sample["source"]
            continue
        source, chosen = masking(tokens, fairseq_generator(config["seed"], case["epoch"], sample["index"]))
        assert source.tolist() == sample["source"]
        assert np.where(chosen, tokens, 1).tolist() == sample["target"]
        assert int(chosen.sum()) == sample["n_masked"]


def test_more_masks_of_fairseq():
    for case in MORE_MASKS["cases"]:
        config = {"mask_multiple_length": 1, "mask_stdev": 0.0, **case["settings"]}
        masking = TextMasking(
            mask_id=MORE_MASKS["mask"], vocab_size=MORE_MASKS["vocab_size"], mask_prob=config["mask_prob"],
            mask_length=config["mask_multiple_length"], mask_length_std=config["mask_stdev"],
            keep_prob=config["leave_unmasked_prob"], random_prob=config["random_token_prob"],
        )  # fmt: skip
        tokens = np.array(case["tokens"])
        source, chosen = masking(tokens, fairseq_generator(case["seed"], case["epoch"], case["index"]))
        assert source.tolist() == case["source"] and np.where(chosen, tokens, 1).tolist() == case["target"]


def test_what_is_hidden_kept_and_replaced():
    masking = TextMasking(mask_id=99, vocab_size=100, mask_prob=0.5, mask_length=1, keep_prob=0.25, random_prob=0.25)
    tokens = np.full(20000, 50)
    source, chosen = masking(tokens, np.random.default_rng(0))
    assert abs(chosen.mean() - 0.5) < 0.001 and not np.any(source[~chosen] != 50)
    hidden, kept = np.mean(source[chosen] == 99), np.mean(source[chosen] == 50)
    assert abs(hidden - 0.5) < 0.02 and abs(kept - 0.25) < 0.02
    drawn = np.unique(source[chosen & (source != 99) & (source != 50)])
    assert drawn.min() == 4 and drawn.max() == 98  # never a special symbol
    everything, chosen = TextMasking(mask_id=9, vocab_size=10, mask_prob=1.0, mask_length=1)(
        np.arange(4, 8), np.random.default_rng(0)
    )
    assert everything.tolist() == [9, 9, 9, 9] and chosen.all()


def test_a_text_must_not_hold_the_mask():
    with pytest.raises(TokenError) as error:
        TextMasking(mask_id=9, vocab_size=10)(np.array([0, 9, 2]), np.random.default_rng(0))
    assert str(error.value) == (
        "the text holds the mask's id 9 as a token; take the dictionary that belongs to it."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_prob": 0}, "mask_prob is 0: nothing would be hidden and nothing learned; expected a share above 0."),
        ({"mask_prob": 1.5}, "mask_prob is 1.5, expected a share from 0 to 1."),
        ({"keep_prob": -0.1}, "keep_prob is -0.1, expected a share from 0 to 1."),
        ({"keep_prob": 0.6, "random_prob": 0.6}, "keep_prob 0.6 and random_prob 0.6 are more than 1 together."),
        ({"mask_length": 0}, "mask_length is 0, expected a whole number of tokens greater than 0."),
        ({"mask_length_std": -1}, "mask_length_std is -1, expected 0 or more."),
        ({"mask_id": 10}, "mask_id is 10, expected one of the 10 ids."),
        ({"random_weights": np.ones(3)}, "random_weights has shape (3,), expected (10,)."),
        ({"random_prob": 0.1, "random_weights": np.zeros(10)},
         "random_weights leave no token to be drawn; give some of them a weight."),
    ],
)  # fmt: skip
def test_bad_arguments_of_masks(arguments, message):
    with pytest.raises(ConfigError) as error:
        TextMasking(**{"mask_id": 9, "vocab_size": 10, **arguments})
    assert str(error.value) == message


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(ORDER["text"])))
def test_batches_of_text_are_fairseqs(number):
    case, sizes = ORDER["text"][number], np.array(ORDER["text_sizes"])
    options = case["params"]
    assert fairseq_order(sizes, options["seed"]).tolist() == case["ordered_indices"]
    batches = fairseq_batches(
        fairseq_order(sizes, options["seed"], max_positions=options["max_positions"]),
        sizes,
        max_tokens=options["max_tokens"],
        max_sentences=options["batch_size"],
        multiple=options["required_batch_size_multiple"],
    )
    assert batches == case["batches_before_shuffle"]
    assert sum(map(len, batches)) == case["n_items_batched"]
    for epoch in case["epochs"]:
        turns = fairseq_turns(len(batches), options["seed"], epoch["epoch"], world_size=options["num_shards"])
        assert turns == epoch["order_of_batches"]


def test_batches_by_size_are_fairseqs():
    for case in ORDER["batch_by_size_only"]:
        items = range(len(case["sizes"]))
        limits = {"max_tokens": case["max_tokens"], "max_sentences": case["max_sentences"], "multiple": case["mult"]}
        if case["batches"] == "AssertionError":
            with pytest.raises(ConfigError, match=r"^an item has \d+ tokens, more than max_tokens \d+; raise max_tok"):
                fairseq_batches(items, case["sizes"], **limits)
        else:
            assert fairseq_batches(items, case["sizes"], **limits) == case["batches"], case
