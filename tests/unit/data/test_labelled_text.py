"""Texts with labels: tables with their faults, the held-out part, tokens, batches."""

from dataclasses import replace

import pytest

from tests.recipes.recipe_rows import FIXTURES
from toolkit.data.labelled_text import (
    LabelledTexts,
    collate_labelled,
    dictionary_of,
    hold_out_rows,
    read_labelled_rows,
)
from toolkit.data.text_bpe import Gpt2Bpe, Gpt2Tokenizer
from toolkit.data.text_dictionary import TextDictionary
from toolkit.errors import ConfigError, ManifestError

TABLES = FIXTURES / "textcls_tiny"


@pytest.fixture(scope="module")
def bpe():
    return Gpt2Bpe.from_folder(FIXTURES / "gpt2_bpe")


@pytest.fixture
def table(tmp_path):
    """Writes a table of the given lines."""

    def write(*lines, name="t.csv", header="text,label", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes("\n".join([header, *lines, ""]).encode(encoding))
        return path

    return write


def refused(path, **columns):
    with pytest.raises(ManifestError) as error:
        read_labelled_rows([path], **columns)
    return str(error.value)


def test_a_table_with_all_that_csv_allows(table):
    path = table('x,"one, two",spam', 'y,"over', 'two lines",ham', "", "z, three ,ham", header="\ufeffid,text,label")
    rows = read_labelled_rows([path])
    assert rows.texts == ("one, two", "over\ntwo lines", "three") and rows.labels == ("spam", "ham", "ham")
    assert [line for _, line in rows.places] == [2, 3, 6] and rows.where(2) == f"{path}, line 6"
    assert rows.classes() == ("ham", "spam")
    tabs = table("a, b\tham", name="t.tsv", header="text\tlabel")
    assert read_labelled_rows([path, tabs]).texts[3] == "a, b"
    other = read_labelled_rows([table("1,2", header="what,kind")], text_column="what", label_column="kind")
    assert (other.texts, other.labels) == (("1",), ("2",))


def test_tables_that_cannot_be_used(table, tmp_path):
    missing = tmp_path / "none.csv"
    assert refused(missing) == (
        f"the table {missing} does not exist; give a CSV file with the columns text, label."
    )
    assert refused(tmp_path) == f"the table {tmp_path} is a folder; give a CSV file with the columns text, label."
    path = table("a,b", name="t.txt")
    assert refused(path) == f"{path} is of no known kind of table; name it .csv or .tsv by its content."
    path = table("hello,ham", header="message,label")
    advice = "name the columns with --text_column and --label_column."
    assert refused(path) == f"{path} has no column text; its header line has message, label: {advice}"
    path = table("a,b,c", header="text,label,text")
    assert refused(path) == f"{path} has two columns text; its header line has text, label, text: {advice}"
    path = table(header="")
    assert refused(path) == f"{path} has no column text; its header line has none: {advice}"
    path = table()
    assert refused(path) == f"{path} holds no rows below its header line; check how it was made."
    path = table("a,ham", '"  ",ham')
    assert refused(path) == f"{path}, line 3: the column text is empty; complete or delete the row."
    path = table("a,ham", "b,")
    assert refused(path) == f"{path}, line 3: the column label is empty; complete or delete the row."
    path = table('"two', 'lines",ham', "one, two,ham")
    assert refused(path) == (
        f"{path}, line 4: 3 fields, where the header line has 2; put a text that holds a separator in double quotes."
    )
    path = table("a,ham", '"never ends,ham')
    assert refused(path) == (
        f"{path}, line 3: unexpected end of data; correct the quotes of the row that begins here."
    )
    path = table("a,ham", "café,ham", encoding="latin-1")
    assert refused(path) == f"{path}, line 3: the text is not UTF-8; save the file as UTF-8."


def test_one_label_is_none(table):
    path = table("a,ham", "b,ham")
    with pytest.raises(ManifestError) as error:
        read_labelled_rows([path]).classes()
    assert str(error.value) == (
        f"{path}: all 2 texts have the label 'ham'; a classifier needs texts of two labels at least."
    )


def test_the_held_out_part_has_the_share_of_each_label_and_depends_on_the_seed(table):
    rows = read_labelled_rows([TABLES / "train.csv"])
    train, valid = hold_out_rows(rows, 0.1, seed=1)
    assert len(rows) == 160 and sorted([*train.places, *valid.places]) == sorted(rows.places)
    assert (valid.labels.count("ham"), valid.labels.count("spam")) == (12, 4)
    assert hold_out_rows(rows, 0.1, seed=1)[1] == valid and hold_out_rows(rows, 0.1, seed=2)[1] != valid
    small = read_labelled_rows([table("a,x", "b,y", "c,y", "d,y")])
    train, valid = hold_out_rows(small, 0.01, seed=1)
    assert len(valid) == 1 and valid.labels == ("y",)
    train, valid = hold_out_rows(small, 0.99, seed=1)
    assert set(train.labels) == {"x", "y"} and len(train) == 2
    single = table("a,x", "b,y")
    with pytest.raises(ConfigError) as error:
        hold_out_rows(read_labelled_rows([single]), 0.1, seed=1)
    assert str(error.value) == (
        f"{single} has one text of each label, too few to hold some out; name a table in valid_splits, or set "
        "valid_share to 0."
    )
    with pytest.raises(ConfigError, match=r"^valid_share is 1\.5; expected a share above 0 and below 1, or 0 for no "):
        hold_out_rows(small, 1.5, seed=1)


def test_tokens_labels_and_what_is_cut(table, bpe):
    path = table("hello there,ham", "hello hello hello hello hello,spam", "unseen,spam")
    rows = read_labelled_rows([path])
    dictionary = dictionary_of(rows.select([0, 1]), bpe)
    tokenizer = Gpt2Tokenizer(bpe, dictionary)
    texts = LabelledTexts(rows, tokenizer, ["ham", "spam"], max_length=5)
    assert texts.labels.tolist() == [0, 1, 1] and texts.lengths.tolist() == [4, 5, 4]
    item = texts.load(1, epoch=0)
    whole = tokenizer.encode(rows.texts[1], special=True)
    assert item["tokens"].tolist() == [*whole[:4], 2] and len(whole) == 7
    assert (item["id"], item["label"], item["text"]) == ("t.csv:3", 1, rows.texts[1])
    assert texts.load(0, epoch=0)["tokens"].tolist() == tokenizer.encode("hello there", special=True)
    assert texts.report() == (
        f"{path}: 3 texts, 13 tokens (2 unknown), 1 cut to 5 tokens; labels: spam 2, ham 1"
    )
    exact = LabelledTexts(rows, tokenizer, ["ham", "spam"], max_length=7)
    assert exact.num_cut == 0 and exact.lengths[1] == 7
    # What a checkpoint must notice: other tokens, other labels, labels in another order.
    other = LabelledTexts(rows, tokenizer, ["spam", "ham"], max_length=5)
    changed = LabelledTexts(replace(rows, labels=("spam", "ham", "ham")), tokenizer, ["ham", "spam"], max_length=5)
    assert len({made.fingerprint() for made in (texts, exact, other, changed)}) == 4
    with pytest.raises(ManifestError) as error:
        LabelledTexts(rows, tokenizer, ["ham", "eggs"], max_length=5)
    assert str(error.value) == (
        f"{path}, line 3: the label 'spam' is none of the model's (ham, eggs); correct the row, or train with texts "
        "of this label."
    )


def test_a_batch_is_padded_behind_and_keeps_its_lengths_on_the_host(bpe):
    rows = read_labelled_rows([TABLES / "test.csv"])
    texts = LabelledTexts(
        rows, Gpt2Tokenizer(bpe, TextDictionary.from_counts({"1": 1})), ("ham", "spam"), max_length=64
    )
    batch = collate_labelled([texts.load(row, epoch=0) for row in range(4)], samples=50)
    assert batch.tokens.shape == (4, 50) and batch.labels.tolist() == texts.labels[:4].tolist()
    assert ((batch.tokens != 1).sum(1) == batch.lengths).all() and (batch.tokens[:, 0] == 0).all()
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.labels.is_meta and not moved.lengths.is_meta and len(moved) == 4
    assert batch.texts == list(rows.texts[:4])
