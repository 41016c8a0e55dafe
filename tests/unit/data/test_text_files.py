"""fairseq's dictionaries and binary text, and GPT-2's byte pairs: as fairseq reads and writes them, byte for byte."""

from __future__ import annotations

import json
import re
import struct
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.indexed_text import IndexedText, IndexedTextWriter
from toolkit.data.text_binarize import binarize, read_text_lines
from toolkit.data.text_bpe import Gpt2Bpe, Gpt2Tokenizer
from toolkit.data.text_dictionary import TextDictionary, stored_type
from toolkit.data.tokens import load_tokenizer
from toolkit.errors import TokenError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TEXT, BPE = FIXTURES / "fairseq_text", FIXTURES / "gpt2_bpe"
FACTS = json.loads((TEXT / "binaries.json").read_bytes())
PARTS = ("train", "valid", "test")
RAW = {part: TEXT / "raw" / f"{part}.raw" for part in PARTS}


def gpt2_dictionary() -> TextDictionary:
    """By the rule of binaries.json: GPT-2's numbers in their order."""
    return TextDictionary.from_counts({str(number): 50257 - number for number in range(50257)})


@pytest.fixture(scope="module")
def bpe() -> Gpt2Bpe:
    return Gpt2Bpe.from_folder(BPE)


# ---- dictionaries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FACTS["dictionaries"] if "not stored" not in name])
def test_dictionary_is_read_and_written_byte_for_byte(name, tmp_path):
    wanted = FACTS["dictionaries"][name]
    dictionary = TextDictionary.from_file(TEXT / name)
    assert len(dictionary) == wanted["len_with_specials"]
    for index, symbol, count in wanted["first"] + wanted["last"]:
        assert (dictionary.symbols[index], dictionary.counts[index]) == (symbol, count)
    assert {symbol: dictionary.index(symbol) for symbol in wanted["index_of"]} == wanted["index_of"]
    assert dictionary.mask_id == len(dictionary) == dictionary.vocab_size - 1
    dictionary.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_bytes() == (TEXT / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("word_dicts/dict_thr2.txt", {"min_count": 2}),
        ("word_dicts/dict_n1000.txt", {"max_size": 1000}),
        ("word_dicts/dict_pad1.txt", {"padding_factor": 1}),
        ("word_dicts/dict_thr3_n500_pad1.txt", {"min_count": 3, "max_size": 500, "padding_factor": 1}),
        ("bin_word/dict.txt", {}),
    ],
)
def test_dictionary_is_built_as_by_fairseq(name, options):
    counts: dict[str, int] = {}
    for word in " ".join(read_text_lines(RAW["train"].read_bytes(), "train")).split():
        counts[word] = counts.get(word, 0) + 1
    assert TextDictionary.from_counts(counts, **options).to_bytes() == (TEXT / name).read_bytes()


def test_gpt2_dictionary_by_rule():
    wanted = FACTS["dictionaries"]["bin_gpt2dict/dict.txt (not stored; by rule)"]
    dictionary = gpt2_dictionary()
    assert len(dictionary) == wanted["len_with_specials"] and dictionary.mask_id == 50264
    assert [list(row) for row in zip(range(12), dictionary.symbols, dictionary.counts.tolist(), strict=False)] == (
        wanted["first"]
    )


def test_a_symbol_may_come_twice_only_where_the_flag_says_so(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("a 3\nb 2\na 1 #fairseq:overwrite\n<s> 1 #fairseq:overwrite\n")
    dictionary = TextDictionary.from_file(path)
    assert dictionary.index("a") == 6 and dictionary.index("<s>") == 7 and len(dictionary) == 8
    assert dictionary.to_bytes() == path.read_bytes()


def test_a_dictionary_with_its_own_mask(tmp_path):
    (tmp_path / "dict.txt").write_text("a 3\n<mask> 1\nb 2\n")
    dictionary = TextDictionary.from_file(tmp_path / "dict.txt")
    assert (dictionary.mask_id, dictionary.vocab_size) == (5, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 3\na 1\n", "{path}, line 2: the symbol 'a' stands twice (or is one of <s>, <pad>, </s>, <unk>); delete "
         "the line, or end it with #fairseq:overwrite if it is meant."),
        (b"</s> 3\n", "{path}, line 1: the symbol '</s>' stands twice (or is one of <s>, <pad>, </s>, <unk>); delete "
         "the line, or end it with #fairseq:overwrite if it is meant."),
        (b"a 3\nword\n", "{path}, line 2: expected 'symbol count', but the line is 'word'; give a fairseq dict.txt."),
        (b"a b c\n", "{path}, line 1: expected 'symbol count', but the line is 'a b c'; give a fairseq dict.txt."),
        (b"a 3\n\nb 2\n", "{path}, line 2: expected 'symbol count', but the line is ''; give a fairseq dict.txt."),
        (b"", "{path} holds no symbols; give a dictionary with a line 'symbol count' for each."),
        (b"a 1\n\xff 2\n", "{path} is not UTF-8 text (byte 4); take a fairseq dict.txt."),
    ],
)  # fmt: skip
def test_bad_dictionaries(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(TokenError) as error:
        TextDictionary.from_file(path)
    assert str(error.value) == message.format(path=path)


def test_stored_types():
    wanted = {size: name for size, name in FACTS["dtype_by_vocab_size"].items()}
    for size, name in wanted.items():
        assert stored_type(None if size == "None" else int(size)).name == name, size


# ---- binary text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTS["binaries"])
def test_binary_text_is_read_and_written_byte_for_byte(name, tmp_path):
    wanted = FACTS["binaries"][name]
    text = IndexedText(TEXT / name)
    assert (len(text), text.num_tokens, text.dtype.itemsize) == (
        wanted["n_items"], wanted["n_tokens"], wanted["itemsize"],
    )  # fmt: skip
    assert text.sizes[: len(wanted["sizes"])].tolist() == wanted["sizes"]
    assert text.pointers[: len(wanted["pointers_head"])].tolist() == wanted["pointers_head"]
    for item, tokens in wanted["first_items"].items():
        assert text[int(item)][: len(tokens)].tolist() == tokens
    everything = text.tokens(0, text.num_tokens)
    assert everything.dtype == np.int64 and int(everything.sum()) == wanted["sum_of_ids"]
    assert int((everything == 3).sum()) == wanted["n_unk"]
    with IndexedTextWriter(tmp_path / "again", text.dtype) as writer:
        half = len(text) // 2
        cut = int(text.sizes[:half].sum())
        writer.add(everything[:cut], text.sizes[:half])
        writer.add(everything[cut:], text.sizes[half:])
    for end in (".bin", ".idx"):
        assert (tmp_path / f"again{end}").read_bytes() == (TEXT / f"{name}{end}").read_bytes(), end


def test_text_is_mapped_and_travels_by_its_name():
    text = IndexedText(TEXT / "bin_own" / "train")
    assert isinstance(text._tokens, np.memmap) and isinstance(text.sizes, np.memmap)
    packed = ForkingPickler.dumps(text)  # as to a worker process
    assert len(packed) < 1000
    assert np.array_equal(ForkingPickler.loads(packed)[5], text[5])


def test_a_text_of_nothing(tmp_path):
    with IndexedTextWriter(tmp_path / "none", "<u2"):
        pass
    assert len(IndexedText(tmp_path / "none")) == 0


def test_nothing_is_left_of_a_failed_write(tmp_path):
    with pytest.raises(TokenError, match=r"^a token id does not fit into uint16, in which .* is written\.$"):
        with IndexedTextWriter(tmp_path / "train", "<u2") as writer:
            writer.add(np.array([70000]), np.array([1]))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken(tmp_path):
    """A copy that a test may damage."""
    for end in (".bin", ".idx"):
        (tmp_path / f"train{end}").write_bytes((TEXT / "bin_own" / f"train{end}").read_bytes())
    return tmp_path / "train"


def damage_index(prefix: Path, position: int, new: bytes) -> None:
    path = prefix.with_suffix(".idx")
    data = bytearray(path.read_bytes())
    data[position : position + len(new)] = new
    path.write_bytes(data)


def fails(prefix: Path) -> str:
    with pytest.raises(TokenError) as error:
        IndexedText(prefix)
    return str(error.value).replace(f"{prefix.parent}/", "")


def test_wrong_magic(broken):
    advice = (
        "; only the mmap kind is read: prepare the text again with --dataset-impl mmap, or with wikitext_prepare.py."
    )
    damage_index(broken, 0, b"PK\x03\x04")
    assert fails(broken) == (
        "train.idx is no index of fairseq's mmap kind (it begins with b'PK\\x03\\x04IDX\\x00')" + advice
    )
    damage_index(broken, 0, b"TNTIDX\x00\x00")
    assert fails(broken) == "train.idx is of fairseq's older lazy or cached kind" + advice
    damage_index(broken, 0, b"HUFFIDX\x00\x00")
    assert fails(broken) == "train.idx is of fairseq's huffman kind" + advice


@pytest.mark.parametrize("size", [0, 5, 20, 26, 3000, 3817])
def test_truncated_index(broken, size):
    path = broken.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:size])
    wanted = "3,818" if size >= 26 else "26"
    assert fails(broken) == (
        f"train.idx is truncated: it has {size:,} bytes of {wanted}; copy it again, or prepare the text again."
    )


@pytest.mark.parametrize(("change", "word"), [(-2, "truncated"), (-1, "truncated"), (2, "too long")])
def test_tokens_of_another_length(broken, change, word):
    path = broken.with_suffix(".bin")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\x00" * change)
    assert fails(broken) == (
        f"train.bin is {word}: it has {47342 + change:,} bytes, but train.idx speaks of 47,342; copy both files again, "
        "or prepare the text again."
    )


def test_unknown_type_version_and_damaged_pointers(broken):
    damage_index(broken, 17, b"\x06")
    assert fails(broken) == (
        "train.idx says that its tokens are of type 6, expected one of 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, "
        "8 uint16, 9 uint32, 10 uint64."
    )
    damage_index(broken, 9, struct.pack("<QB", 2, 8))
    assert fails(broken) == "train.idx has version 2, expected 1; prepare the text again."
    damage_index(broken, 9, struct.pack("<Q", 1))
    damage_index(broken, 26 + 4 * 316 + 8, struct.pack("<q", 1234))
    assert fails(broken) == (
        "train.idx is damaged: its items do not stand one behind the other; prepare the text again."
    )


def test_megatron_index_is_named(broken):
    sizes = IndexedText(TEXT / "bin_own" / "train").sizes
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), 3) + b"\x00" * (12 * len(sizes) + 24)
    broken.with_suffix(".idx").write_bytes(index)
    assert fails(broken) == (
        f"train.idx is Megatron's format: it has {len(index):,} bytes, and 3,818 would hold its 316 items; give an "
        "index that fairseq-preprocess or wikitext_prepare.py wrote."
    )


@pytest.mark.parametrize("end", [".idx", ".bin"])
def test_missing_file(broken, end):
    broken.with_suffix(end).unlink()
    assert fails(broken) == (
        f"train{end} is missing; give the folder that fairseq-preprocess or a prepare script wrote (NAME.idx and "
        "NAME.bin beside each other)."
    )


def test_dictionary_of_another_text(broken):
    with pytest.raises(TokenError) as error:
        IndexedText(broken).check_ids(4000, "dict.txt")
    assert str(error.value) == (
        f"{broken}.bin holds the token id 4041, but dict.txt has 4000 entries (special ones included); the two do not "
        "belong together: take the dict.txt that was written with the .bin."
    )
    IndexedText(broken).check_ids(4042, "dict.txt")


def test_fingerprint_tells_texts_apart(broken):
    before = IndexedText(broken).fingerprint()
    data = bytearray(broken.with_suffix(".bin").read_bytes())
    data[20000] ^= 1
    broken.with_suffix(".bin").write_bytes(data)
    assert IndexedText(broken).fingerprint() != before == IndexedText(TEXT / "bin_own" / "train").fingerprint()


# ---- byte pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_byte_pairs_are_gpt2s(bpe, part):
    lines = read_text_lines(RAW[part].read_bytes(), part)
    encoded = bpe.encode_lines([line.strip() for line in lines])
    assert "".join(f"{' '.join(map(str, ids))}\n" for ids in encoded).encode() == (
        (TEXT / "bpe" / f"{part}.bpe").read_bytes()
    )
    for line, ids in zip(lines, encoded, strict=True):
        assert bpe.encode(line.strip()) == ids and bpe.decode(ids) == line.strip()


def test_byte_pairs_of_odd_text(bpe):
    odd = "🙂👩‍🚀 héß ١٢٣ don't DON'T"
    for text in ("", " ", " a  b\n\n\tc ", "<s> <|endoftext|> <unk>", "\u00a0\u3000\u2028\x85", odd):
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode("hello world") == [31373, 995]  # GPT-2's published example
    assert 50256 not in bpe.encode("<|endoftext|>")


def test_tokenizer_of_a_model(bpe, tmp_path):
    tokenizer = Gpt2Tokenizer(bpe, gpt2_dictionary())
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (50265, 50264)
    ids = tokenizer.encode(" the game \n", special=True)
    assert ids[0] == 0 and ids[-1] == 2 and tokenizer.decode([*ids, 1, 50264]) == "the game"
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"tokens": tokenizer.config}))
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Gpt2Tokenizer)
    assert again.encode("the game") == ids[1:-1]
    with pytest.raises(TokenError, match=r"^token id 50265 is outside the vocabulary of 50265; "):
        tokenizer.decode([50265])


def test_symbols_that_only_look_like_numbers_have_no_text(bpe):
    symbols = ["262", "²", "٣", "50257", "9" * 5000, "the"]
    tokenizer = Gpt2Tokenizer(bpe, TextDictionary(symbols))
    assert tokenizer.decode(range(4, 4 + len(symbols))) == " the"


@pytest.mark.parametrize("words", [True, False])
def test_a_dictionary_alone_encodes_words_and_nothing_that_it_does_not_know(tmp_path, words):
    tokenizer = DictionaryTokenizer(TextDictionary(["the", "game", "<mask>"]), words=words)
    (tmp_path / tokenizer.save(tmp_path)).with_name("config.json").write_text(json.dumps({"tokens": tokenizer.config}))
    again = load_tokenizer(tmp_path)
    assert isinstance(again, DictionaryTokenizer) and (again.vocab_size, again.mask_id) == (7, 6)
    assert again.decode([0, 5, 4, 6, 2, 1]) == "game the"
    with pytest.raises(TokenError, match=r"^token id 7 is outside the vocabulary of 7; "):
        again.decode([7])
    if words:
        assert again.encode(" the old\tgame ", special=True) == [0, 4, 3, 5, 2] and again.encode("game") == [5]
    else:
        with pytest.raises(TokenError, match=r"^the model's tokens are a dict\.txt alone, .* text cannot be encoded"):
            again.encode("the game")


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_missing_bpe_file(tmp_path, name):
    for other in {"encoder.json", "vocab.bpe"} - {name}:
        (tmp_path / other).write_bytes((BPE / other).read_bytes())
    with pytest.raises(TokenError) as error:
        Gpt2Bpe.from_folder(tmp_path)
    assert str(error.value) == (
        f"the BPE folder {tmp_path} has no {name}; give the folder that holds GPT-2's encoder.json and vocab.bpe."
    )


def test_hub_names_and_another_layout_of_the_same_files(tmp_path):
    pieces = json.loads((BPE / "encoder.json").read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(pieces, ensure_ascii=False, indent=1), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((BPE / "vocab.bpe").read_bytes().replace(b"\n", b"\r\n").rstrip())
    assert Gpt2Bpe.from_folder(tmp_path).encode("hello world") == [31373, 995]


@pytest.mark.parametrize("change", ["pieces", "numbers", "merges"])
def test_a_bpe_that_is_not_gpt2s(tmp_path, change):
    pieces = json.loads((BPE / "encoder.json").read_bytes())
    merges = (BPE / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    if change == "pieces":
        pieces["<mask>"] = 50257
    elif change == "numbers":  # as many, but in another order
        pieces["!"], pieces["#"] = pieces["#"], pieces["!"]
    else:
        merges[1], merges[2] = merges[2], merges[1]
    (tmp_path / "encoder.json").write_text(json.dumps(pieces))
    (tmp_path / "vocab.bpe").write_text("\n".join(merges), encoding="utf-8")
    with pytest.raises(TokenError) as error:
        Gpt2Bpe.from_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'encoder.json'} ({50258 if change == 'pieces' else 50257:,} pieces) and {tmp_path / 'vocab.bpe'} "
        "(50,000 merges) are not GPT-2's vocabulary (50,257 and 50,000); take encoder.json and vocab.bpe as GPT-2, "
        "RoBERTa and data2vec use them."
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", b"{", "{folder}/encoder.json is not JSON; take GPT-2's encoder.json."),
        ("encoder.json", b"[1]", "{folder}/encoder.json is no table of pieces and their numbers; take GPT-2's "
         "encoder.json."),
        ("vocab.bpe", b"#version\nabc\n", "{folder}/vocab.bpe, line 2: expected two pieces; take GPT-2's vocab.bpe."),
        ("vocab.bpe", b"\xff", "{folder}/vocab.bpe is not UTF-8 text (byte 0); take GPT-2's vocab.bpe."),
    ],
)  # fmt: skip
def test_damaged_bpe_files(tmp_path, name, content, message):
    for other in ("encoder.json", "vocab.bpe"):
        (tmp_path / other).write_bytes((BPE / other).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenError, match="^" + re.escape(message.format(folder=tmp_path)) + "$"):
        Gpt2Bpe.from_folder(tmp_path)


# ---- from text to binary ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 5000])
@pytest.mark.parametrize("name", ["bin_own", "bin_gpt2dict", "bin_word"])
def test_binarized_byte_for_byte(tmp_path, name, chunk_bytes):
    reports = binarize(
        RAW,
        tmp_path,
        bpe_folder=None if name == "bin_word" else BPE,
        dictionary=gpt2_dictionary() if name == "bin_gpt2dict" else None,
        num_workers=0,
        chunk_bytes=chunk_bytes,
    )
    names = ["dict.txt", *(f"{part}.{end}" for part in PARTS for end in ("bin", "idx"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for file in names:
        if (TEXT / name / file).is_file():
            assert (tmp_path / file).read_bytes() == (TEXT / name / file).read_bytes(), file
    wanted = {part: FACTS["binaries"][f"{name}/{part}"] for part in PARTS}
    for part, report in reports.items():
        assert (report.lines, report.tokens) == (wanted[part]["n_items"], wanted[part]["n_tokens"])


def test_processes_give_the_same(tmp_path):
    binarize(RAW, tmp_path, bpe_folder=BPE, dictionary=None, num_workers=2, chunk_bytes=40000)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (TEXT / "bin_own" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("size", [65499, 65500])
def test_integers_by_the_size_of_the_dictionary(tmp_path, size):
    dictionary = TextDictionary([f"t{number:05d}" for number in range(size - 4)])
    binarize({"train": TEXT / "vocab_boundary" / f"v{size}.txt"}, tmp_path, bpe_folder=None, dictionary=dictionary)
    for end in (".bin", ".idx"):
        wanted = TEXT / "vocab_boundary" / f"bin_v{size}" / f"train{end}"
        assert (tmp_path / f"train{end}").read_bytes() == wanted.read_bytes()


def test_unknown_words_are_counted_but_not_those_written_so(tmp_path):
    (tmp_path / "a.txt").write_text("a b <unk> c\n\n<unk> d")
    (tmp_path / "out").mkdir()
    reports = binarize({"test": tmp_path / "a.txt"}, tmp_path / "out", bpe_folder=None,
                       dictionary=TextDictionary(["a", "b"]), num_workers=0)  # fmt: skip
    assert str(reports["test"]) == "3 lines (1 empty), 9 tokens with line ends, 22.2 % not in the dictionary"


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(TokenError, match=r"a\.txt is not UTF-8 text \(byte 6\); save it as UTF-8\.$"):
        binarize({"train": tmp_path / "a.txt"}, tmp_path, bpe_folder=None, dictionary=None, chunk_bytes=2)
