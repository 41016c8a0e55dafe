"""Tokens: any script goes in and comes out, files are fairseq's, and what cannot be spelt is said."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece

from toolkit.data.tokens import LetterTokenizer, SentencePieceTokenizer, load_tokenizer
from toolkit.errors import TokenError

# Transcripts of the Arabic Speech Corpus (Nawar Halabi, CC BY 4.0, in Buckwalter letters) and AISHELL-1 (Apache-2.0).
BUCKWALTER = [
    ">atAHat lilbA}iEi lmutajaw~ili >an yakuwna jA*iban lilmuwATini l>aqal~i daxlan",
    ">axfaqa majlisu ln~uw~Abi ll~ubnAniy~u fiy xtiyAri ra}iysin jadiydin lilbilAdi - xalafan",
]
MANDARIN = ["广州市房地产中介协会分析"]
SCRIPTS = {
    "english": ["HE DIDN'T SAY", "O'CLOCK"],
    "buckwalter": BUCKWALTER,
    "mandarin": MANDARIN,
    "arabic": ["أتاحت للبائع المتجول", "مُحَمَّد"],
    "hindi": ["नमस्ते दुनिया"],
    "thai": ["สวัสดีชาวโลก"],
    "vietnamese": ["Tiếng Việt đẹp"],
    "emoji and rare planes": ["𝒳 👩‍🚀 ok"],
    "digits and signs": ["3 + 4 = 7 #1 <s> <unk>"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_letters_round_trip_in_any_script(tmp_path, script):
    texts = SCRIPTS[script]
    tokenizer = LetterTokenizer.from_texts(texts)
    tokenizer.save(tmp_path)
    again = LetterTokenizer.from_file(tmp_path / "dict.ltr.txt")
    assert again.symbols == tokenizer.symbols
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(4 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.decode(ids) == tokenizer.normalize(text)
        assert again.encode(text) == ids


def test_fairseq_ids():
    tokenizer = LetterTokenizer(["|", "E", "T", "A"])
    assert tokenizer.encode("A TEA") == [7, 4, 6, 5, 7, 4]
    assert tokenizer.encode("  A\t\tTEA \n") == [7, 4, 6, 5, 7, 4]
    assert tokenizer.encode("") == tokenizer.encode("  ") == []
    assert (tokenizer.vocab_size, tokenizer.blank_id) == (8, 0)
    assert tokenizer.decode([0, 7, 1, 4, 2, 6, 3, 4]) == "A T<unk>"


def test_order_is_by_count_then_code_point():
    tokenizer = LetterTokenizer.from_texts(["bb aa ccc"])
    assert tokenizer.symbols == ("c", "|", "a", "b")
    assert tokenizer.counts == (3, 3, 2, 2)


def test_composed_and_decomposed_letters_are_one():
    tokenizer = LetterTokenizer.from_texts(["caf\u00e9"])
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "caf\u00e9"


@pytest.mark.parametrize(("case", "wanted"), [("upper", "STRASSE ÉT"), ("lower", "straße ét"), ("keep", "Straße ét")])
def test_case(case, wanted):
    tokenizer = LetterTokenizer.from_texts(["Straße ét"], case=case)
    assert tokenizer.decode(tokenizer.encode("Straße ét")) == wanted


def test_word_boundary_that_is_a_letter():
    """Buckwalter writes a letter as |."""
    tokenizer = LetterTokenizer.from_texts(["|l b"])
    assert tokenizer.word_boundary == "▁"
    assert tokenizer.decode(tokenizer.encode("|l b")) == "|l b"
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_texts(["|l b"], word_boundary="|")
    assert str(caught.value) == (
        "the transcripts hold the character '|', which stands for the gap between words; set word_boundary to "
        "'▁' or '␣'."
    )
    plain = LetterTokenizer(["|", "l", "b"])
    with pytest.raises(TokenError) as caught:
        plain.encode("|l b")
    assert str(caught.value) == (
        "the transcript '|l b' holds the character '|', which stands for the gap between words; "
        "set word_boundary to '▁' or '␣'."
    )


def test_unknown_characters():
    texts = ["A B"]
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_texts(texts).encode("A Ž B")
    assert str(caught.value) == (
        "the transcript 'A Ž B' holds the character 'Ž' (U+017D, LATIN CAPITAL LETTER Z WITH CARON), which is "
        "not among "
        "the tokenizer's 3 symbols; build the tokens from all training transcripts, set case to 'upper' or "
        "'lower' where "
        "only the case differs, or set unknown to 'drop' or 'unk'."
    )
    drop = LetterTokenizer.from_texts(texts, unknown="drop")
    assert drop.decode(drop.encode("AŽ Ž |B")) == "A B"
    assert drop.encode("A Ž B") == drop.encode("A B")
    assert drop.encode("ŽŽ") == []
    unk = LetterTokenizer.from_texts(texts, unknown="unk")
    boundary = unk.encode("A")[-1]
    assert unk.encode("Ž|") == [3, 3, boundary]


def test_dictionary_without_word_boundary():
    with pytest.raises(TokenError, match=r"holds the character '\|' \(U\+007C, VERTICAL LINE\)"):
        LetterTokenizer(["A"]).encode("A")


BAD_DICTS = {
    "A\n": "{path}, line 1: 'A' is not a symbol, a space and a count; correct the line.",
    "A 1\nB x\n": "{path}, line 2: 'B x' is not a symbol, a space and a count; correct the line.",
    "A 1\nB 2\nA 3\n": (
        "{path}, line 3: the symbol 'A' comes twice; delete one of them, or end the line with #fairseq:overwrite."
    ),
    "<pad> 1\n": (
        "{path}, line 1: the symbol '<pad>' comes twice; delete one of them, or end the line with #fairseq:overwrite."
    ),
    "": "{path} holds no symbols; give a dictionary with a line 'symbol count' for each.",
}


@pytest.mark.parametrize("content", BAD_DICTS)
def test_bad_dictionaries(tmp_path, content):
    path = tmp_path / "dict.txt"
    path.write_text(content)
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_file(path)
    assert str(caught.value) == BAD_DICTS[content].format(path=path)


def test_other_bad_files(tmp_path):
    path = tmp_path / "dict.txt"
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_file(path)
    assert str(caught.value) == f"the token file {path} cannot be read (No such file or directory); check the path."
    path.write_bytes(b"A 1\n\xff 1\n")
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_file(path)
    assert str(caught.value) == f"{path} is not UTF-8 text (byte 4); save it as UTF-8."
    path.write_bytes(b"not a model")
    with pytest.raises(TokenError) as caught:
        SentencePieceTokenizer.from_file(path)
    assert str(caught.value) == f"{path} cannot be read as a SentencePiece model; train or copy it again."


def test_overwritten_symbol_keeps_the_other_ids(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("A 5\nB 4\nA 3 #fairseq:overwrite\n| 1\n")
    tokenizer = LetterTokenizer.from_file(path)
    assert tokenizer.encode("AB") == [6, 5, 7]


def test_windows_line_ends_and_separators_inside(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_bytes("| 3\r\n\u200b 2\r\n".encode())
    assert LetterTokenizer.from_file(path).symbols == ("|", "\u200b")


def test_nothing_to_build_from_and_wrong_options():
    for build in (LetterTokenizer.from_texts, lambda texts: SentencePieceTokenizer.train(texts, 10)):
        with pytest.raises(TokenError, match=r"check the column 'wrd' of the training manifest\.$"):
            build(["", "  "])
    with pytest.raises(TokenError) as caught:
        LetterTokenizer(["A"], unknown="skip")
    assert str(caught.value) == "unknown is 'skip', expected one of error, drop, unk."
    with pytest.raises(TokenError) as caught:
        LetterTokenizer(["A", "B", "A"])
    assert str(caught.value) == "the list of symbols holds the symbol 'A' twice; delete one of them."
    with pytest.raises(TokenError) as caught:
        LetterTokenizer(["A"]).decode([5])
    assert str(caught.value) == "token id 5 is outside the vocabulary of 5; the tokens do not belong to this model."


@pytest.mark.parametrize("boundary", ["", " ", "\n", "a b", None, 3, ["|"]])
def test_word_boundary_must_fit_a_line_of_the_dictionary(boundary):
    """Saved, it would give a file that cannot be read."""
    sentence = f"word_boundary is {boundary!r}, expected a symbol without white space, as '|' or '▁' or '␣'."
    with pytest.raises(TokenError) as caught:
        LetterTokenizer(["A"], word_boundary=boundary)
    assert str(caught.value) == sentence
    if boundary is not None:
        with pytest.raises(TokenError) as caught:
            LetterTokenizer.from_texts(["A B"], word_boundary=boundary)
        assert str(caught.value) == sentence


@pytest.mark.parametrize("symbol", ["", "\n"])
def test_symbols_must_fit_a_line_of_the_dictionary(symbol):
    with pytest.raises(TokenError) as caught:
        LetterTokenizer(["A", symbol])
    assert str(caught.value) == (
        f"the list of symbols holds {symbol!r}, which no line of dict.ltr.txt can hold; leave it out."
    )


@pytest.mark.parametrize("factor", [0, -8, 2.5, True, None, 10**9])
def test_padding_factor_is_a_whole_number(factor):
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_texts(["A B"], padding_factor=factor)
    assert str(caught.value) == f"padding_factor is {factor!r}, expected a whole number from 1 (none) to 1024."


def test_id_outside_a_file_names_the_file(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("A 5\n| 1\n")
    with pytest.raises(TokenError) as caught:
        LetterTokenizer.from_file(path).decode([4, 19])
    assert str(caught.value) == (
        f"token id 19 is outside the vocabulary of 6 in {path}; the tokens do not belong to this model: take the file "
        "that was saved with it."
    )
    name = SentencePieceTokenizer.train(["abc de"] * 3, 8).save(tmp_path)
    with pytest.raises(TokenError, match=f"the vocabulary of 8 in {tmp_path / name}; the tokens do not belong"):
        SentencePieceTokenizer.from_file(tmp_path / name).decode([99])


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
@pytest.mark.parametrize("script", ["english", "buckwalter", "mandarin", "arabic"])
def test_sentencepiece_on_small_corpora(tmp_path, model_type, script):
    """More tokens asked for than so little text can give."""
    texts = SCRIPTS[script]
    tokenizer = SentencePieceTokenizer.train(texts, 500, model_type=model_type)
    assert tokenizer.vocab_size <= 500
    assert tokenizer.blank_id == 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids and 0 not in ids and 1 not in ids
        assert tokenizer.decode(ids) == tokenizer.normalize(text)
        assert tokenizer.decode([0, *ids, 0]) == tokenizer.normalize(text)
    assert tokenizer.encode("") == []
    again = SentencePieceTokenizer.train(texts, 500, model_type=model_type)
    tokenizer.save(tmp_path)
    again.save(tmp_path / "..")
    assert (tmp_path / "sentencepiece.model").read_bytes() == (tmp_path / ".." / "sentencepiece.model").read_bytes()


def test_sentencepiece_learns_words():
    texts = ["the cat sat on the mat", "the dog sat on the cat"] * 10
    tokenizer = SentencePieceTokenizer.train(texts, 30, model_type="bpe")
    assert tokenizer.vocab_size == 30
    assert len(tokenizer.encode("the cat")) < len("the cat") / 2


def test_sentencepiece_keeps_compatibility_letters():
    """Full-width letters and ligatures are the corpus's choice; only composition is unified."""
    tokenizer = SentencePieceTokenizer.train(["ＡＢＣ ﬁn caf\u00e9"] * 3, 30)
    assert tokenizer.decode(tokenizer.encode("ＡＢＣ ﬁn cafe\u0301")) == "ＡＢＣ ﬁn caf\u00e9"


def test_sentencepiece_errors():
    with pytest.raises(TokenError) as caught:
        SentencePieceTokenizer.train(["abc de"], 7)
    assert str(caught.value) == (
        "vocab_size is 7, but the transcripts hold 6 different characters and two more ids are for blank and unknown; "
        "use 8 or more, or a character_coverage below 1."
    )
    tokenizer = SentencePieceTokenizer.train(["abc de"] * 3, 8)
    with pytest.raises(TokenError) as caught:
        tokenizer.encode("abŽ")
    assert str(caught.value) == (
        "the transcript 'abŽ' holds 'Ž' (U+017D), for which the SentencePiece model has no token; "
        "train it on all training transcripts, or set unknown to 'drop' or 'unk'."
    )
    drop = SentencePieceTokenizer.train(["abc de"] * 3, 8, unknown="drop")
    assert drop.decode(drop.encode("abŽ")) == "ab"
    assert 1 in SentencePieceTokenizer.train(["abc de"] * 3, 8, unknown="unk").encode("abŽ")
    with pytest.raises(TokenError) as caught:
        tokenizer.decode([99])
    assert str(caught.value) == "token id 99 is outside the vocabulary of 8; the tokens do not belong to this model."


def test_foreign_sentencepiece_model_needs_id_0(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc de"] * 3), model_writer=model, vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(TokenError) as caught:
        SentencePieceTokenizer(model.getvalue())
    assert str(caught.value) == (
        "the SentencePiece model uses id 0 for '<unk>', but CTC needs it for the blank; train it again with "
        "--pad_id=0 --unk_id=1 --bos_id=-1 --eos_id=-1."
    )


@pytest.mark.parametrize("with_config", [True, False])
def test_model_folder(tmp_path, with_config):
    letters = LetterTokenizer.from_texts(["|a b"], case="lower", unknown="drop")
    pieces = SentencePieceTokenizer.train(["abc de"] * 3, 8, unknown="unk")
    for tokenizer in (letters, pieces):
        folder = tmp_path / tokenizer.config["kind"]
        folder.mkdir()
        assert tokenizer.save(folder) == tokenizer.config["file"]
        if with_config:
            (folder / "config.json").write_text(json.dumps({"kind": "ctc", "tokens": tokenizer.config}))
        loaded = load_tokenizer(folder)
        assert type(loaded) is type(tokenizer)
        assert loaded.vocab_size == tokenizer.vocab_size
        if with_config:
            assert loaded.config == tokenizer.config
            for text in ("|a b", "abc", "aŽ"):
                assert loaded.encode(text) == tokenizer.encode(text)


def test_folders_without_tokens(tmp_path):
    with pytest.raises(TokenError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no tokens (dict.ltr.txt or sentencepiece.model); "
        "give the model folder of a fine-tuned model, not of a pretrained one."
    )
    (tmp_path / "config.json").write_text('{"tokens": {"kind": "phones"}}')
    with pytest.raises(TokenError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: the tokens are of kind 'phones', expected letters, sentencepiece, gpt2 or "
        "dictionary; the folder may come from a newer version of the toolkit."
    )
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(TokenError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'} is not a JSON object; copy the model folder again."
