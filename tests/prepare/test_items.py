import json
from dataclasses import replace
from pathlib import Path

import pytest

from megamm.config import Data, Dataset, Model, Recipe, SampleMapping, Tokenizer, Tower
from megamm.core.errors import ConfigError, DataError
from megamm.prepare.items import make_items
from megamm.prepare.tokenizer import make_tokenizer
from megamm.tokenizers.items import ITEMS_FILE
from megamm.tokenizers.text import TextTokenizer
from tests.support.preparing import files, write_shards

pytest.importorskip("sklearn")

# Baskets of two kinds; `late` and `never` are met in a test basket only, or by nobody.
BASKETS = {
    "ann": ["red1 red2", "red2 red3", "red1 red3", "late"],
    "bob": ["egg1 egg2", "egg2 egg3", "egg1 egg3", "red1"],
    "cat": ["egg1 egg3", "egg2", "egg3 egg1", "egg2"],
}
TEXTS = {"red1": "red lamp", "egg1": "egg cup", "late": "a red lamp, late", "never": "an egg cup that nobody bought"}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    events = [f"{user},{item},{day}" for user, baskets in BASKETS.items() for day, basket in enumerate(baskets) for item in basket.split()]
    (folder / "events.csv").write_text("\n".join(["user,item,time", *events]) + "\n")
    (folder / "items.csv").write_text("\n".join(["item,text", *(f'{item},"{text}"' for item, text in TEXTS.items())]) + "\n")
    return folder


def prepare(tables, output, **options):
    given = {"input": tables / "events.csv", "map": (), "hold_out": "test", "items": tables / "items.csv"}
    return write_shards("interactions", output, **{**given, **options})


@pytest.fixture(scope="module")
def root(tables):
    prepare(tables, tables / "shop")
    return tables


def recipe(root: Path, folder: str = "tokenizer", **tokenizer) -> Recipe:
    sizes = {"text_size": 300, "location_bins": 0, "item_levels": 2, "item_codes": 4, **tokenizer}
    return Recipe(
        name="test",
        model=Model(text=Tower(type="qwen3")),
        tokenizer=Tokenizer(folder=str(root / folder), **sizes),
        data=Data(root=str(root), train={"shop": Dataset("shop/train-*.tar")}),
    )


def items_line(item, text=""):
    return json.dumps({"id": item, "text": text}) + "\n"


def test_prepare_lists_every_item_and_nothing_of_who_met_it(root, tables, tmp_path):
    lines = [json.loads(line) for line in (root / "shop" / ITEMS_FILE).read_text().splitlines()]
    met = {item for baskets in BASKETS.values() for basket in baskets for item in basket.split()}
    assert lines == [{"id": item, "text": TEXTS.get(item, "")} for item in sorted({*met, *TEXTS})]
    for part in (1, 0):
        prepare(tables, tmp_path, job={"part": (part, 2)})
    assert files(tmp_path)[ITEMS_FILE] == files(root / "shop")[ITEMS_FILE]


def test_a_list_of_other_items_is_not_written_over(tables, tmp_path):
    (tmp_path / ITEMS_FILE).write_text(items_line("mine"))
    with pytest.raises(DataError, match=r"already holds another items\.jsonl; name another --output"):
        prepare(tables, tmp_path)
    assert (tmp_path / ITEMS_FILE).read_text() == items_line("mine")


def test_shards_of_other_items_are_another_plan(tables, tmp_path):
    prepare(tables, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "more.csv").write_text((tables / "items.csv").read_text() + "new,one more\n")
    with pytest.raises(DataError, match="begun with"):
        prepare(tables, tmp_path / "out", items=tmp_path / "more.csv")
    assert files(tmp_path / "out") == before


def test_the_tokenizer_codes_all_items_held_out_ones_too(root):
    line = make_tokenizer(recipe(root))
    assert " 8 items, fingerprint " in line
    items = TextTokenizer.load(root / "tokenizer").items
    assert items is not None
    assert items.ids == tuple(sorted({*TEXTS, "red2", "red3", "egg2", "egg3"}))
    assert items.text_of("late") == TEXTS["late"]
    # What is bought together begins together, without a word in common.
    first = {item: items.codes_of(item)[0] for item in items.ids}
    assert first["red2"] == first["red3"] != first["egg2"] == first["egg3"]


def test_a_table_made_from_the_same_is_kept_and_another_one_refused(root, monkeypatch):
    one = recipe(root, "kept")
    line = make_tokenizer(one)
    monkeypatch.setattr("megamm.prepare.items.learn_codes", None)
    assert make_tokenizer(one) == line
    monkeypatch.undo()
    before = files(root / "kept")
    with pytest.raises(ConfigError, match=r"already holds another tokenizer"):
        make_tokenizer(replace(one, seed=1))
    assert files(root / "kept") == before


def test_held_out_baskets_change_no_code(root, tables, tmp_path):
    rows = (tables / "events.csv").read_text().splitlines()
    # In the last baskets, which are held out, everything is bought with something else.
    changed = [row if not row.endswith(",3") else row.replace("red1", "egg1").replace("egg2", "red2") for row in rows]
    assert changed != rows
    (tmp_path / "events.csv").write_text("\n".join(changed) + "\n")
    prepare(tables, tmp_path / "shop", input=tmp_path / "events.csv")
    theirs, ours = make_items(recipe(tmp_path)), make_items(recipe(root))
    assert theirs.codes.tolist() == ours.codes.tolist()
    assert theirs.made_from == ours.made_from


def test_the_order_of_ids_leaks_into_no_code(tmp_path):
    # Items of which nothing but the id is known: codes in the order of ids would tell which came first.
    (tmp_path / "shop").mkdir()
    source = tmp_path / "events.csv"
    source.write_text("user,item,time\n" + "".join(f"u{index:03},{index:03},{day}\n" for index in range(64) for day in (1, 2)))
    write_shards("interactions", tmp_path / "shop", input=source, map=())
    codes = make_items(recipe(tmp_path, item_levels=1, item_codes=64)).codes[:, 0]
    assert sorted(codes.tolist()) == list(range(64))
    rising = (codes[1:] > codes[:-1]).sum()
    assert 20 <= rising <= 43


def test_without_codes_or_without_lists_there_is_no_table(root, tmp_path):
    assert make_items(recipe(root, item_levels=0)) is None
    assert make_items(recipe(root, item_codes=0)) is None
    write_shards("digit_text", tmp_path / "shop")
    assert make_items(recipe(tmp_path)) is None


def test_lists_beside_shards_of_another_form_are_not_ours(root):
    one = recipe(root)
    mapped = Dataset("shop/train-*.tar", mapping=SampleMapping(task="text", answer="json:user"))
    assert make_items(replace(one, data=replace(one.data, train={"shop": mapped}))) is None


def test_more_items_than_codes_are_refused_before_anything_is_written(root):
    with pytest.raises(ConfigError, match=r"8 items do not fit into tokenizer\.item_levels=1 levels of item_codes=4 \(4 combinations\)"):
        make_tokenizer(recipe(root, "small", item_levels=1))
    assert not (root / "small").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (items_line("red1") + "{", "line 2 is not JSON"),
        ('{"text": "x"}\n', "line 1 is no item"),
        ('{"id": 3}\n', "line 1 is no item"),
        ('{"id": "a", "text": null}\n', "line 1 is no item"),
        (items_line("a", "one") + items_line("a", "two"), "item 'a' is 'two' here and 'one' in a list before"),
        (items_line("red1"), r"sample user-\S+ of shard \S+train-00000\.tar holds item '\w+', which no items\.jsonl"),
    ],
)
def test_lists_that_say_too_little_or_two_things_are_refused(tables, tmp_path, content, message):
    prepare(tables, tmp_path / "shop")
    (tmp_path / "shop" / ITEMS_FILE).write_text(content)
    with pytest.raises(DataError, match=message):
        make_items(recipe(tmp_path))
