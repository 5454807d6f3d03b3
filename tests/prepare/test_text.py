import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.errors import ConfigError
from megamm.prepare.sources import text
from tests.support.preparing import omitted, samples, text_of, write_shards


def prepare(tmp_path, source, *pairs, **options):
    write_shards("text", tmp_path / "out", job=options.pop("job", None), input=source, map=pairs, **options)
    return samples(tmp_path / "out", options.get("split", "train"))


def rejoined(found):
    """Chunks joined by the part of their key before the number."""
    ordered = sorted(found.items())
    return {name: "".join(text_of(document) for _, (document, _) in group) for name, group in groupby(ordered, lambda one: one[0][:-6])}


def test_files_of_a_folder_are_documents(tmp_path):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    contents = {"a.txt": "First. " * 40, "deep/b.md": "Ein Wort – 词\n" * 50, "c.txt": "short\r\n"}
    for name, content in contents.items():
        (source / name).write_bytes(content.encode())
    (source / "d.pdf").write_bytes(b"%PDF")
    (source / "empty.txt").touch()
    found = prepare(tmp_path, source, chunk_characters=100)
    assert rejoined(found) == {name.rpartition(".")[0]: content for name, content in contents.items()}
    assert all(len(text_of(document)) <= 100 and document["task"] == "text" for document, _ in found.values())
    assert found["deep/b-00002"][0] | {"messages": 0} == {"task": "text", "file": "deep/b.md", "chunk": 2, "messages": 0}
    assert omitted(tmp_path / "out") == [("", "input", "1 files of ending .pdf are not used")]


@settings(max_examples=40, deadline=None)
@given(
    content=st.text(st.sampled_from("a。é\n 👩"), min_size=1, max_size=300),
    max_characters=st.integers(1, 50),
    mode=st.sampled_from(["file", "line", "blank-line"]),
)
def test_no_byte_of_a_text_file_is_lost(tmp_path_factory, content, max_characters, mode):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(content.encode())
    listing = text.SOURCE.records(input=path, map=(), task="", documents=mode, chunk_characters=max_characters)
    pieces = [text_of(listing.make(listing.records[number]).document) for number in range(len(listing.records))]
    assert all(len(piece) <= max_characters for piece in pieces)
    joined = "".join(pieces)
    if mode == "file":
        assert joined == content
    elif mode == "line":
        assert joined == "".join(line for line in content.splitlines(keepends=True) if line.strip())
    else:
        # What lies between blank lines; a blank line with spaces belongs to no document.
        blocks = [list(lines) for blank, lines in groupby(content.splitlines(keepends=True), lambda line: not line.strip()) if not blank]
        assert joined == "".join("".join(lines) for lines in blocks)


def test_lines_and_blank_lines_divide_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert sorted(map(text_of, (document for document, _ in prepare(tmp_path, tmp_path / "a.txt", documents="line").values()))) == [
        "one\n", "three\n", "two\n",
    ]  # fmt: skip
    write_shards("text", tmp_path / "blocks", input=tmp_path / "a.txt", documents="blank-line")
    assert sorted(text_of(document) for document, _ in samples(tmp_path / "blocks").values()) == ["one\ntwo\n", "three\n"]


def test_lines_of_json_are_documents_with_names_splits_and_metadata(tmp_path):
    rows = [
        {"body": f"{n}: " + "汉字。" * 100, "title": f"poem {n}", "part": "test" if n == 2 else None, "year": 700 + n} for n in range(4)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)))
    pairs = (("body", "text"), ("title", "key"), ("part", "split"), ("year", "metadata"))
    found = prepare(tmp_path, tmp_path / "a.jsonl", *pairs, chunk_characters=64)
    assert sorted(rejoined(found).values()) == [rows[n]["body"] for n in (0, 1, 3)]
    assert {document["year"] for document, _ in found.values()} == {700, 701, 703}
    assert list(rejoined(samples(tmp_path / "out", "test")).values()) == [rows[2]["body"]]


def test_lines_need_not_all_have_the_same_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"year": 700, "text": "two"}\n')
    found = prepare(tmp_path, tmp_path / "a.jsonl", ("year", "metadata"))
    assert {text_of(document): document["year"] for document, _ in found.values()} == {"one": None, "two": 700}


def test_chunks_of_a_document_stay_on_one_side(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} " * 50}) + "\n" for n in range(30)))
    prepare(tmp_path, tmp_path / "a.jsonl", job={"test_share": 0.4}, chunk_characters=20)
    sides = [{key[:-6] for key in samples(tmp_path / "out", split)} for split in ("train", "test")]
    assert len(sides[0] | sides[1]) == 30
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 3


def test_listed_files_are_held_out(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 30)
    prepare(tmp_path, tmp_path, job={"test_names": frozenset({"b.txt"})}, chunk_characters=20)
    assert {document["file"] for document, _ in samples(tmp_path / "out", "test").values()} == {"b.txt"}


def test_documents_that_are_no_text_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"x" * 500 + b"\xff" + b"y" * 10)
    (tmp_path / "in" / "b.txt").write_bytes(b"gut" + "é".encode()[:1])
    (tmp_path / "in" / "c.txt").write_bytes(b"fine")
    lines = [
        b'{"text": "fine"}',
        b'{"text": " "}',
        b'{"text": 1.5}',
        b'{"txt": "a"}',
        b"{",
        b'"a"',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
    ]
    (tmp_path / "in" / "d.jsonl").write_bytes(b"\n".join(lines))
    found = prepare(tmp_path, tmp_path / "in", chunk_characters=100)
    assert sorted(found) == ["c-00000", "d-00000001-00000"]
    reasons = sorted(reason for _, _, reason in omitted(tmp_path / "out"))
    assert reasons[:2] == ["a.txt is not UTF-8 at byte 500", "b.txt is not UTF-8 at byte 3"]
    expected = [
        "its text is empty",
        "'1.5' is float, not text",
        "its text is empty",
        "it is not JSON",
        "it is str, not",
        "half of a surrogate",
        "it is not JSON",
    ]
    for line, (reason, part) in enumerate(zip(reasons[2:], expected, strict=True), 2):
        assert reason.startswith(f"d.jsonl line {line}: ")
        assert part in reason


def test_a_long_corpus_takes_few_bytes_a_chunk(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 200_000)
    listing = text.SOURCE.records(input=tmp_path / "a.txt", map=(), task="", documents="file", chunk_characters=10)
    assert len(listing.records) == 100_000
    assert listing.records.places.buffer_info()[1] * listing.records.places.itemsize <= 56 * len(listing.records)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "x", {}, r"holds no \.txt, \.md, \.jsonl file; unpack compressed files"),
        ("a.txt.gz", "x", {}, r"holds no \.txt, \.md, \.jsonl file; unpack compressed files"),
        ("a.jsonl", '{"body": "x"}', {}, r"no column of .*a\.jsonl is the text; give --map COLUMN=text, its columns are body"),
        ("a.jsonl", '{"body": "x"}', {"map": (("txt", "text"),)}, "has no column 'txt'; its columns are body"),
        ("a.jsonl", '{"text": "x"}', {"map": (("text", "image"),)}, "there is no field 'image'; the fields are text, key"),
        ("a.jsonl", '{"text": "x", "chunk": 1}', {"map": (("chunk", "metadata"),)}, "the column chunk cannot be kept as metadata"),
    ],
)
def test_inputs_without_text_are_refused(tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        write_shards("text", tmp_path / "out", input=tmp_path / name, **options)
