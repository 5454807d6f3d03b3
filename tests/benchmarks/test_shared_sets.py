"""The sets that are made of several, or by rules of our own: pairs of digits, and what faces feel."""

import gzip
import json
import struct
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from benchmarks import shared_places
from benchmarks.prepare_shared_data import plain
from benchmarks.shared_emoji import base_emoji, feeling
from benchmarks.shared_tables import without_held_out
from tests.prepare.test_shared_data import run
from tests.support.preparing import samples
from tests.support.shards import flac

NUM_PICTURES = {"train": 200, "test": 100}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """As many pictures of each digit, and three takes of two speakers: two to learn from, one of the official test."""
    data = tmp_path_factory.mktemp("digits")
    (data / "mnist12k").mkdir()
    (data / "fsdd").mkdir()
    for split, num in NUM_PICTURES.items():
        labels = np.arange(num, dtype=np.uint8) % 10
        pictures = np.random.default_rng(num).integers(0, 255, (num, 28, 28), dtype=np.uint8)
        for name, header, values in (
            ("images-idx3", struct.pack(">4i", 2051, num, 28, 28), pictures),
            ("labels-idx1", struct.pack(">2i", 2049, num), labels),
        ):
            (data / "mnist12k" / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    for digit in range(10):
        for number, name in enumerate(f"{digit}_{speaker}_{take}" for speaker in ("ann", "bob") for take in (4, 5, 6)):
            (data / "fsdd" / f"{name}.flac").write_bytes(flac(800 + 60 * digit + 10 * number))
    return data


@pytest.mark.integration
@pytest.mark.parametrize("name", ["digit_matching", "digit_sums"])
def test_neither_digit_tells_the_answer_and_nothing_stands_on_two_sides(tmp_path, digits, name):
    child = run(tmp_path, "--only", name, data=digits)
    assert child.returncode == 0, child.stderr
    media = {}
    for split, num in NUM_PICTURES.items():
        found = samples(tmp_path / name, split)
        documents = [document for document, _ in found.values()]
        assert len(documents) == num
        media[split] = {content for _, members in found.values() for content in members.values()}
        truth = {
            "digit_matching": lambda one: "yes" if one["pictured"] == one["spoken"] else "no",
            "digit_sums": lambda one: str(one["pictured"] + one["spoken"]),
        }[name]
        for document in documents:
            assert document["result"] == truth(document) == document["messages"][-1]["content"][0]["text"]
        by_picture = Counter((one["pictured"], one["result"] if name == "digit_matching" else one["spoken"]) for one in documents)
        assert max(by_picture.values()) == min(by_picture.values()), "each pictured digit has all answers alike"
        assert {one["speaker"] for one in documents} == {"ann", "bob"}
    assert not media["train"] & media["test"]


def test_scattered_digits_lie_in_their_boxes_and_nowhere_else(monkeypatch, tmp_path, digits):
    monkeypatch.setattr(shared_places, "_CANVASES", {"train": 60, "test": 20})
    commands = list(shared_places.digit_places(digits / "mnist12k", tmp_path))
    assert [command[command.index("--split") + 1] for command in commands] == ["train", "test"]
    for _, table, *_ in commands:
        found = json.loads(table.read_text())
        num_digits = Counter(one["image_id"] for one in found["annotations"])
        assert num_digits.keys() == {image["id"] for image in found["images"]} and set(num_digits.values()) == {1, 2}
        for image in found["images"]:
            ink = np.asarray(Image.open(tmp_path / image["file_name"]))
            assert ink.shape == (image["height"], image["width"])
            for one in (one for one in found["annotations"] if one["image_id"] == image["id"]):
                left, top, width, height = one["bbox"]
                inside = ink[top : top + height, left : left + width]
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any(), "boxes are tight"
                ink = ink.copy()
                ink[top : top + height, left : left + width] = 0
            assert not ink.any()


def test_pairs_without_sounds_are_refused(tmp_path):
    (tmp_path / "data" / "mnist12k").mkdir(parents=True)
    child = run(tmp_path / "out", "--only", "digit_sums", data=tmp_path / "data")
    assert (child.returncode, child.stderr.count("\n")) == (1, 1) and "has no folder fsdd" in child.stderr


def test_what_shares_anything_with_held_out_rows_is_not_learnt_from():
    rows = ["a1", "b2", "b3", "c2", "c4", "b2"]
    kept = list(without_held_out(rows, 2, set))
    assert kept == [(0, "a1", "train"), (1, "b2", "test"), (3, "c2", "test"), (5, "b2", "test")]


def test_comments_are_told_apart_by_words_and_by_signs_where_they_have_none():
    assert plain("So  COOL!!") == plain("so cool.") != plain("so cold")
    assert plain("\U0001f602 ") == plain("\U0001f602") != plain("\U0001f44d")


def test_faces_feel_what_their_names_say():
    expected = {
        "grinning face with sweat": "positive",
        "face with tears of joy": "positive",
        "sad but relieved face": "negative",
        "weary cat": "negative",
        "man gesturing NO, dark skin tone": "negative",
        "sleeping face": "neutral",
        "smiling face with tear": "",
        "smiling face with horns": "",
        "woman in steamy room": "",
        "red heart": "",
        "tongue": "",
        "raising hands": "",
    }
    assert {name: feeling(name) for name in expected} == expected


@pytest.mark.parametrize(("name", "base"), [("1f926_1f3fd_200d_2642", "1f926"), ("1f6b6_200d_2642", "1f6b6"), ("1f600_1f3fb", "1f600")])
def test_variants_of_an_emoji_stand_on_one_side(name, base):
    assert base_emoji(name) == base


@pytest.mark.integration
def test_a_face_stands_on_one_side_of_all_sets_in_all_skin_tones_and_genders(tmp_path):
    data = tmp_path / "data" / "noto_emoji48"
    (data / "png").mkdir(parents=True)
    tones = ["", *(f"_1f3f{tone}" for tone in "bcdef")]
    entries = [
        {"id": f"{base:x}{tone}{gender}", "name": name, "group": "People & Body", "keywords": []}
        for base, name in enumerate(["person frowning", "person shrugging", "person raising hand", "person walking"] * 5, 0x1F600)
        for tone in tones
        for gender in ("", "_200d_2640")
    ]
    entries.append({"id": "2764", "name": "grinning face", "group": "Symbols", "keywords": []})
    for number, entry in enumerate(entries):
        Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(data / "png" / f"{entry['id']}.png")
    (data / "names.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    turned = [(entry["id"], f"{entry['id'][:5]}_1f3fb{entry['id'][5:]}") for entry in entries if entry["id"][5:] in ("", "_200d_2640")]
    (data / "edit_pairs.tsv").write_text("".join(f"{before}\t{after}\tmake it lighter\n" for before, after in turned))
    names = ("noto_emoji48", "noto_emoji48_pictures", "noto_emoji48_edits", "noto_emoji48_faces")
    child = run(tmp_path / "out", "--only", *names, data=tmp_path / "data")
    assert child.returncode == 0, child.stderr
    seen = {
        split: {name: {picture for key in samples(tmp_path / "out" / name, split) for picture in key.split("-")} for name in names}
        for split in ("train", "test")
    }
    for held_out in names:
        for learnt in names:
            assert seen["test"][held_out] and not seen["test"][held_out] & seen["train"][learnt], (held_out, learnt)
    sides = {split: samples(tmp_path / "out" / "noto_emoji48_faces", split) for split in ("train", "test")}
    bases = {split: {base_emoji(key) for key in found} for split, found in sides.items()}
    assert bases["train"] and bases["test"] and not bases["train"] & bases["test"]
    assert sum(map(len, sides.values())) == 15 * 12, "people who walk feel nothing, symbols are no faces"
    answers = Counter(document["messages"][-1]["content"][0]["text"] for found in sides.values() for document, _ in found.values())
    assert set(answers) == {"negative", "neutral", "positive"} and {d["task"] for f in sides.values() for d, _ in f.values()} == {
        "sentiment"
    }
