import json

import pytest

from megamm.core.errors import ConfigError, DataError
from tests.support.preparing import omitted, samples, write_shards

EVENTS = [  # user, item, time, basket; not in the order of time
    ("ann", "i3", "2024-01-02", "b2"),
    ("ann", "i1", "2024-01-01", "b1"),
    ("ann", "i2", "2024-01-01", "b1"),
    ("ann", "i2", "2024-01-01", "b1"),
    ("bob", "i1", "2024-01-05", "b4"),
    ("ann", "i4", "2024-01-03", "b3"),
    ("ann", "i5", "2024-01-03", "b5"),
    ("ann", "i1", "2024-01-09", "b6"),
]


def write(path, rows=EVENTS, header=("user", "item", "time")):
    lines = [header, *[row[: len(header)] for row in rows]]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


def prepare(tmp_path, table, *pairs, **options):
    write_shards("interactions", tmp_path / "out", input=table, map=pairs, **options)
    return {split: samples(tmp_path / "out", split) for split in ("train", "validation", "test")}


def read(document):
    """History with borders of baskets as |, and answer."""
    history = ["|" if part["type"] == "text" else part["id"] for part in document["messages"][0]["content"][:-1]]
    return " ".join(history), " ".join(part["id"] for part in document["messages"][1]["content"])


def test_each_basket_is_asked_for_after_those_before(tmp_path):
    found = prepare(tmp_path, write(tmp_path / "a.tsv"))["train"]
    assert {key: read(document) for key, (document, _) in found.items()} == {
        "user-ann-00001": ("i1 i2 |", "i3"),
        "user-ann-00002": ("i1 i2 | i3 |", "i5 i4"),
        "user-ann-00003": ("i1 i2 | i3 | i5 i4 |", "i1"),
    }
    document, _ = found["user-ann-00002"]
    assert {name: document[name] for name in ("task", "user", "time", "basket")} == {
        "task": "recommendation", "user": "ann", "time": "2024-01-03", "basket": 2,
    }  # fmt: skip
    assert document["messages"][0]["content"][-1] == {"type": "text", "text": "What comes next?"}
    assert omitted(tmp_path / "out") == [
        ("", "input", "1 events repeat an item of their basket"),
        ("", "input", "1 users have one basket only, which nothing came before"),
    ]


def test_answers_in_training_are_bounded_and_held_out_ones_and_histories_are_whole(tmp_path):
    rows = [("ann", f"i{day}{item}", f"{day}") for day in range(4) for item in range(5)]
    whole = prepare(tmp_path / "whole", write(tmp_path / "a.tsv", rows), hold_out="both")
    cut = prepare(tmp_path / "cut", write(tmp_path / "a.tsv", rows), hold_out="both", max_answer=2)
    ((history, answer),) = (read(document) for document, _ in whole["train"].values())
    assert [read(document) for document, _ in cut["train"].values()] == [(history, " ".join(answer.split()[:2]))]
    assert len(answer.split()) == 5 and all(cut[split] == whole[split] for split in ("validation", "test"))


def test_a_sorted_log_does_not_say_which_item_comes_first(tmp_path):
    rows = [(f"user{user}", f"i{item}", day) for user in range(60) for day in ("1", "2") for item in range(3)]
    found = prepare(tmp_path, write(tmp_path / "a.tsv", rows))["train"]
    first = [read(document)[1].split()[0] for document, _ in found.values()]
    assert all(first.count(f"i{item}") > 8 for item in range(3)), first
    turned = prepare(tmp_path / "turned", write(tmp_path / "b.tsv", rows[::-1]))["train"]
    assert {key: document for key, (document, _) in turned.items()} == {key: document for key, (document, _) in found.items()}


def test_a_column_can_divide_the_baskets_of_a_day(tmp_path):
    found = prepare(tmp_path, write(tmp_path / "a.tsv", header=("user", "item", "time", "basket")))["train"]
    assert read(found["user-ann-00003"][0]) == ("i1 i2 | i3 | i4 |", "i5")


@pytest.mark.parametrize(
    ("hold_out", "train", "validation", "test"),
    [
        ("none", {"i3", "i5 i4", "i1"}, set(), set()),
        ("test", {"i3", "i5 i4"}, set(), {"i1"}),
        ("both", {"i3"}, {"i5 i4"}, {"i1"}),
    ],
)
def test_the_last_baskets_are_held_out_and_never_seen_in_training(tmp_path, hold_out, train, validation, test):
    found = prepare(tmp_path, write(tmp_path / "a.tsv"), hold_out=hold_out)
    answers = {split: {read(document)[1] for document, _ in parts.values()} for split, parts in found.items()}
    assert answers == {"train": train, "validation": validation, "test": test}
    held_out = validation | test
    seen = {basket.strip() for document, _ in found["train"].values() for basket in read(document)[0].split("|")}
    assert not seen & held_out
    assert all(read(document)[0] == "i1 i2 | i3 | i5 i4 |" for document, _ in found["test"].values())


def test_items_stand_as_their_codes_alone_where_asked(tmp_path):
    (tmp_path / "items.tsv").write_text("item\ttext\ni1\tred mug\n")
    table = write(tmp_path / "a.tsv")
    for show, expected in (("text", {"type": "item", "id": "i1", "text": "red mug"}), ("codes", {"type": "item", "id": "i1"})):
        write_shards("interactions", tmp_path / show, input=table, items=tmp_path / "items.tsv", show=show)
        document, _ = samples(tmp_path / show, "train")["user-ann-00001"]
        assert document["messages"][0]["content"][0] == expected
        assert json.loads((tmp_path / show / "items.jsonl").read_text().splitlines()[0])["text"] == "red mug"


def test_a_history_is_as_long_as_asked_and_the_latest(tmp_path):
    found = prepare(tmp_path, write(tmp_path / "a.tsv"), history=3)["train"]
    assert read(found["user-ann-00003"][0])[0] == "i3 | i5 i4 |"
    assert read(found["user-ann-00002"][0])[0] == "i1 i2 | i3 |"
    write_shards("interactions", tmp_path / "two", input=tmp_path / "a.tsv", history=2)
    assert read(samples(tmp_path / "two")["user-ann-00002"][0])[0] == "i2 | i3 |"


def test_numbers_sort_as_numbers(tmp_path):
    rows = [{"who": 7, "what": what, "when": when} for what, when in ((11, 10), (12, 9), (13, 8.5))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(tmp_path, tmp_path / "a.jsonl", ("who", "user"), ("what", "item"), ("when", "time"))["train"]
    assert read(found["user-7-00002"][0]) == ("13 | 12 |", "11")


def test_items_bring_their_text(tmp_path):
    (tmp_path / "items.csv").write_text('item,text,price\ni1,"A lamp, blue",3\ni3,Cup,2\ni2,,1\n')
    found = prepare(tmp_path, write(tmp_path / "a.tsv"), items=tmp_path / "items.csv", prompt="Next?")["train"]
    assert found["user-ann-00001"][0]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "item", "id": "i1", "text": "A lamp, blue"},
                {"type": "item", "id": "i2"},
                {"type": "text", "text": "\n"},
                {"type": "text", "text": "Next?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "item", "id": "i3", "text": "Cup"}]},
    ]
    assert any("2 items are not in" in reason and "'i4'" in reason for _, _, reason in omitted(tmp_path / "out"))


def test_events_without_user_item_or_time_are_named(tmp_path):
    rows = [*EVENTS, ("", "i1", "2024-01-01"), ("ann", "", "2024-01-01"), ("ann", "i9")]
    prepare(tmp_path, write(tmp_path / "a.tsv", rows))
    assert omitted(tmp_path / "out")[0] == ("", "input", "3 events cannot be used, the first: line 10: column user is empty")


@pytest.mark.parametrize(
    ("rows", "header", "options", "error", "message"),
    [
        (EVENTS, ("user", "item"), {}, ConfigError, r"no column of .* is the time; give --map COLUMN=time, its columns are user, item"),
        (EVENTS, ("user", "item", "time"), {"map": (("when", "time"),)}, ConfigError, "has no column 'when'"),
        (
            [("a", "b", "1"), ("a", "c", "monday")],
            ("user", "item", "time"),
            {},
            DataError,
            r"the time 'monday' does not sort as text",
        ),
        ([("a", "b", "1")], ("user", "item", "time"), {}, DataError, "the source holds no sample"),
        ([("a", "b", "12/31/2010"), ("a", "c", "1/1/2011")], ("user", "item", "time"), {}, DataError, "'12/31/2010' does not sort as text"),
        ([("a", "b", "2011-12-09 8:30")], ("user", "item", "time"), {}, DataError, "'2011-12-09 8:30' does not sort as text"),
        (
            [("a", "b", "2011-12-09T08:30:00Z"), ("a", "c", "2011-12-09T08:30:00+02:00")],
            ("user", "item", "time"),
            {},
            DataError,
            "several time zones",
        ),
    ],
)
def test_logs_that_say_too_little_are_refused(tmp_path, rows, header, options, error, message):
    with pytest.raises(error, match=message):
        write_shards("interactions", tmp_path / "out", input=write(tmp_path / "a.tsv", rows, header), **options)


def test_an_item_table_needs_its_columns(tmp_path):
    (tmp_path / "items.csv").write_text("item,name\n1,2\n")
    with pytest.raises(ConfigError, match="has no column text; it needs item and text, its columns are item, name"):
        write_shards("interactions", tmp_path / "out", input=write(tmp_path / "a.tsv"), items=tmp_path / "items.csv")
