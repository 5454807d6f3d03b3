from __future__ import annotations

from pathlib import Path

import pytest

from megamm.core.errors import ConfigError
from megamm.data.planning.plan import DataPlan
from megamm.tokenizers.text import TextTokenizer
from megamm.train.data import plan_all_lengths
from megamm.train.exclusion import check_known, read_keys
from tests.support.runs import make_data, recipe_over


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_data(root, num_each=6)
    recipe = recipe_over(root)
    tokenizer = TextTokenizer.load(Path(recipe.tokenizer.folder))
    list(plan_all_lengths(recipe, tokenizer))
    return DataPlan.open(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer, seed=recipe.seed).datasets


def listed(folder: Path, text: str | bytes) -> Path:
    path = folder / "keys.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_keys_are_read_once_each_without_comments_and_ends_of_lines(tmp_path):
    path = listed(tmp_path, "# seen by eye\r\ntexts/t003\r\n\n  pictures/p001  \ntexts/t003\nwords/a/b.c\n")
    assert read_keys(path) == ["pictures/p001", "texts/t003", "words/a/b.c"]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read_keys(listed(tmp_path, b"\xef\xbb\xbftexts/t003\r\n")) == ["texts/t003"]


@pytest.mark.parametrize("character", ["\x0b", "\x1c", "\x85", "\u2028", "\r"])
def test_only_line_feeds_end_a_line(tmp_path, character):
    """A key may hold what Unicode calls the end of a line, also as its last character."""
    assert read_keys(listed(tmp_path, f"texts/a{character}b\n")) == [f"texts/a{character}b"]
    if character != "\r":
        assert read_keys(listed(tmp_path, f"texts/a{character}\n")) == [f"texts/a{character}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no sample"),
        ("# only this\n\n", "names no sample"),
        ("texts/t003\nt004\n", "line 2, 't004', is not dataset/key"),
        ("/t004\n", "line 1, '/t004', is not dataset/key"),
        (b"texts/\xff\n", "is not UTF-8"),
    ],
)
def test_files_that_say_nothing_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_keys(listed(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"keys\.txt does not exist"):
        read_keys(tmp_path / "keys.txt")
    with pytest.raises(ConfigError, match="is a folder"):
        read_keys(tmp_path)


def test_keys_of_the_data_are_accepted(datasets):
    check_known(["both/b000", "pictures/p005", "texts/t000", "texts/t005"], datasets)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["text/t003"], "there is no training dataset 'text'; did you mean 'texts'"),
        (["texts/t003", "texts/t03"], r"texts/t03 is no sample of texts; did you mean 't003'\?; correct"),
        (["texts/x", "texts/y"], r"texts/x is no sample of texts \(and 1 more"),
    ],
)
def test_keys_that_are_not_there_name_the_nearest(datasets, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_known(keys, datasets)
