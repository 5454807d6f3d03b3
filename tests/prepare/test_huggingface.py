import sys

import pytest

from megamm.core.errors import ConfigError
from tests.support.preparing import omitted, samples, text_of, write_shards
from tests.support.shards import flac, jpeg

datasets = pytest.importorskip("datasets")


def rows(number=4, start=0):
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "class": datasets.ClassLabel(names=["cat", "dog"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["big", "small"])),
            "who": datasets.Value("string"),
        }
    )
    columns = {
        "picture": [{"bytes": jpeg(4 + start + n, 3), "path": None} for n in range(number)],
        "class": [n % 2 for n in range(number)],
        "tags": [[0, 1][: n % 3] for n in range(number)],
        "who": [f"rater {n}" for n in range(number)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def prepare(tmp_path, found, *pairs, **options):
    found.save_to_disk(str(tmp_path / "in"))
    write_shards("huggingface", tmp_path / "out", job=options.pop("job", None), input=tmp_path / "in", map=pairs, **options)
    return samples(tmp_path / "out")


def test_media_are_stored_bytes_and_classes_their_names(tmp_path):
    found = prepare(tmp_path, rows(), ("picture", "image"), ("class", "label"), ("who", "metadata"), ("tags", "metadata"))
    assert sorted(found) == [f"row-{n:08}" for n in range(4)]
    for number in range(4):
        document, media = found[f"row-{number:08}"]
        assert media == {"0.jpg": jpeg(4 + number, 3)}
        assert (text_of(document), document["who"]) == (("cat", "dog")[number % 2], f"rater {number}")
        assert document["tags"] == ["big", "small"][: number % 3]
    assert omitted(tmp_path / "out") == []


def test_splits_stay_apart(tmp_path):
    parts = datasets.DatasetDict({"train": rows(3), "test": rows(2, start=3)})
    found = prepare(tmp_path, parts, ("picture", "image"), ("class", "label"))
    assert sorted(found) == [f"train/row-{n:08}" for n in range(3)]
    assert sorted(samples(tmp_path / "out", "test")) == [f"test/row-{n:08}" for n in range(2)]
    assert omitted(tmp_path / "out") == [("", "input", "column tags is not used"), ("", "input", "column who is not used")]


def test_rows_that_were_selected_are_those_that_are_read(tmp_path):
    found = prepare(tmp_path, rows(8).select([5, 2]), ("picture", "image"), ("who", "label"), ("who", "key"))
    assert {text_of(document): len(media["0.jpg"]) for document, media in found.values()} == {
        "rater 5": len(jpeg(9, 3)),
        "rater 2": len(jpeg(6, 3)),
    }


def test_sounds_are_not_decoded_and_texts_are_documents(tmp_path):
    sounds = datasets.Dataset.from_dict({"audio": [{"bytes": flac(800), "path": "a.flac"}], "answer": ["seven"]})
    sounds = sounds.cast_column("audio", datasets.Audio(decode=False))
    ((document, media),) = prepare(tmp_path, sounds, task="speech_recognition").values()
    assert media == {"0.flac": flac(800)}
    assert text_of(document) == "seven"
    texts = datasets.Dataset.from_dict({"text": ["one", "two", ""]})
    found = prepare(tmp_path / "texts", texts, ("text", "document"))
    assert sorted(text_of(document) for document, _ in found.values()) == ["one", "two"]
    assert omitted(tmp_path / "texts" / "out") == [("row-00000002", "sample", "column text is empty")]


def test_paths_are_read_below_the_root(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.jpg").write_bytes(jpeg(5, 5))
    table = datasets.Dataset.from_dict({"image": ["a.jpg", "../b.jpg", None], "label": ["x", "y", "z"]})
    found = prepare(tmp_path, table, root=tmp_path / "media")
    assert [media for document, media in found.values() if text_of(document) == "x"] == [{"0.jpg": jpeg(5, 5)}]
    assert [reason for _, _, reason in omitted(tmp_path / "out") if "outside" in reason]


def test_groups_and_unlabelled_rows(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a"] * 40, "label": [0, -1] * 20, "speaker": [f"{n % 5}" for n in range(40)]})
    table = table.cast_column("label", datasets.ClassLabel(names=["only"]))
    prepare(tmp_path, table, ("speaker", "group"), ("speaker", "metadata"), job={"test_share": 0.4, "seed": 2})
    groups = [{document["speaker"] for document, _ in samples(tmp_path / "out", split).values()} for split in ("train", "test")]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == set("01234")
    skipped = [reason for split in ("train", "test") for _, _, reason in omitted(tmp_path / "out", split)]
    assert skipped == ["no answer: nothing in label"] * 20


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((("image", "label"),), "has no column 'image'; its columns are picture, class, tags, who"),
        ((("picture", "photo"),), "there is no field 'photo'"),
        ((("picture", "image"),), "no column of .* is an answer"),
    ],
)
def test_wrong_columns_are_named(tmp_path, pairs, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path, rows(), *pairs)


def test_other_folders_and_a_missing_library_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"is no folder of `datasets\.Dataset\.save_to_disk`") as raised:
        write_shards("huggingface", tmp_path / "out", input=tmp_path)
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"pip install 'megamm\[prepare\]'"):
        write_shards("huggingface", tmp_path / "out", input=tmp_path / "other")
