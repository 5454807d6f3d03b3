import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Tokenizer
from megamm.core.errors import ConfigError, DataError
from megamm.tokenizers import text
from megamm.tokenizers.items import ITEMS_FILE, ItemTable
from megamm.tokenizers.vocabulary import Vocabulary

CODES = [[0, 3], [2, 1], [2, 0]]
CONFIG = Tokenizer(text_size=300, location_bins=0, item_levels=2, item_codes=4)


def table(ids=("a", "b", "ü\u2028"), texts=("A lamp", "", "Line\u2028end"), codes=CODES, num_codes=4):
    return ItemTable(tuple(ids), tuple(texts), np.array(codes, dtype=np.int32), num_codes, "somewhere")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentences):
    folder = tmp_path_factory.mktemp("items") / "tokenizer"
    text.train(sentences, CONFIG, folder, items=table())
    return folder


@st.composite
def tables(draw):
    num_levels, num_codes = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    keys = draw(st.sets(st.integers(0, num_codes**num_levels - 1), min_size=1, max_size=30))
    codes = np.array([[key // num_codes**level % num_codes for level in range(num_levels)] for key in sorted(keys)], dtype=np.int32)
    ids = tuple(sorted(draw(st.sets(st.text(st.characters(codec="utf-8"), min_size=1), min_size=len(keys), max_size=len(keys)))))
    return ItemTable(
        ids, ("",) * len(ids), draw(st.permutations(codes.tolist()).map(lambda rows: np.array(rows, dtype=np.int32))), num_codes
    )


@given(one=tables())
def test_items_codes_and_tokens_name_each_other(one):
    vocabulary = Vocabulary(text=7, item_levels=one.num_levels, item_codes=one.num_codes)
    for item in one.ids:
        assert one.id_of(one.codes_of(item)) == item
        ids = one.token_ids(item, vocabulary)
        assert [vocabulary.describe(token_id)[0] for token_id in ids] == ["item"] * one.num_levels
        assert one.item_of(ids, vocabulary) == item


@given(one=tables(), data=st.data())
def test_codes_of_no_item_are_refused(one, data):
    codes = data.draw(st.lists(st.integers(-2, one.num_codes + 1), min_size=0, max_size=5))
    if tuple(codes) in {one.codes_of(item) for item in one.ids}:
        assert one.codes_of(one.id_of(codes)) == tuple(codes)
    else:
        with pytest.raises(DataError, match="no item has the codes"):
            one.id_of(codes)


def test_tokens_of_other_blocks_are_no_item():
    vocabulary = Vocabulary(text=10, item_levels=2, item_codes=4)
    first, second = table().token_ids("a", vocabulary)
    for ids in ([first], [second, first], [first, second, second], [3, 4], [first, second + 4]):
        with pytest.raises(DataError, match="no item has the codes"):
            table().item_of(ids, vocabulary)


def test_an_unknown_item_is_named_with_the_way_out():
    for ask in (table().codes_of, table().text_of, table().row_of):
        with pytest.raises(DataError, match=r"item 'z' is not among the tokenizer's 3 items; list it in items.jsonl beside its shards"):
            ask("z")
    assert "z" not in table()
    assert table().text_of("a") == "A lamp"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": [[0, 1], [0, 1], [1, 1]]}, DataError, "items 'a' and 'b' have the same codes"),
        ({"codes": [[0, 1], [0, 4], [1, 1]]}, DataError, "reach from 0 to 4, the table has 4 a level"),
        ({"codes": [[0, 1], [0, -1], [1, 1]]}, DataError, "reach from -1 to 1"),
        ({"codes": [[0, 1], [0, 2]]}, DataError, "no table of items"),
        ({"ids": ("b", "a", "c")}, DataError, "not sorted"),
        ({"ids": ("a", "a", "c")}, DataError, "not sorted by id without repeats"),
        ({"ids": (), "texts": (), "codes": np.zeros((0, 2))}, DataError, "no table of items"),
        ({"num_codes": 1 << 32}, ConfigError, r"more combinations than 2\^62"),
    ],
)
def test_tables_that_cannot_be_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        table(**changes)


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / ITEMS_FILE
    path.write_bytes(table().to_bytes())
    read = ItemTable.load(path)
    assert (read.ids, read.texts, read.codes.tolist(), read.num_codes, read.made_from) == (
        table().ids, table().texts, CODES, 4, "somewhere",
    )  # fmt: skip
    assert read.digest == table().digest != table(texts=("A lamp", "", "")).digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "no table of items"),
        (lambda data: data[: data[:-1].rindex(b"\n") + 1], "its digest differs"),
        (lambda data: data.replace(b"lamp", b"lamb"), "its digest differs"),
        (lambda data: data.replace(b'"format":1', b'"format":9'), "has format 9, this is 1"),
        (lambda data: data.replace(b'"codes":4', b'"codes":1'), "no table of items"),
        (lambda data: b"[]\n", "no table of items"),
        (lambda data: b"\xff", "no table of items"),
        (lambda data: b"", "no table of items"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, damage, message):
    path = tmp_path / ITEMS_FILE
    path.write_bytes(damage(table().to_bytes()))
    with pytest.raises(ConfigError, match=rf"{ITEMS_FILE} .*{message}.*megamm tokenizer"):
        ItemTable.load(path)


def test_items_live_in_the_tokenizers_folder_and_fingerprint(folder, sentences, tmp_path):
    loaded = text.TextTokenizer.load(folder)
    assert loaded.items is not None
    assert loaded.items.item_of(loaded.items.token_ids("b", loaded.vocabulary), loaded.vocabulary) == "b"
    assert text.train(sentences, CONFIG, folder, items=table()).fingerprint == loaded.fingerprint
    assert pickle.loads(pickle.dumps(loaded)).items.codes_of("b") == (2, 1)
    without = text.train(sentences, CONFIG, tmp_path / "without")
    assert without.items is None
    assert text.TextTokenizer.load(tmp_path / "without").fingerprint == without.fingerprint != loaded.fingerprint


def test_a_folder_with_other_items_is_left_alone(folder, sentences):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for items in (None, table(texts=("A lamp", "", ""))):
        with pytest.raises(ConfigError, match=r"already holds another tokenizer \(items.jsonl differs\)"):
            text.train(sentences, CONFIG, folder, items=items)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_items_of_other_codes_than_the_vocabularys_are_refused(folder, sentences, tmp_path):
    wanted = "2 levels of 4 codes, the vocabulary has 2 of 8"
    with pytest.raises(ConfigError, match=wanted):
        text.train(sentences, Tokenizer(text_size=300, item_levels=2, item_codes=8), tmp_path / "new", items=table())
    assert not (tmp_path / "new").exists()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "vocabulary.json").read_text())["sizes"] | {"item_codes": 8}
    (tmp_path / "vocabulary.json").write_text(json.dumps(Vocabulary(**values).to_json()))
    with pytest.raises(ConfigError, match=wanted):
        text.TextTokenizer.load(tmp_path)
