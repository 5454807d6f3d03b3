import json
import os
import tarfile

import pytest
import webdataset

from megamm.core.errors import DataError
from megamm.data.shards.index import index_path, load_index
from megamm.prepare.source import Draft
from megamm.prepare.writer import ShardFile, remove_temporaries, sample_files
from tests.support.shards import flac, jpeg


def document(text="seven", **metadata):
    return {"task": "text", "messages": [{"role": "assistant", "content": text}], **metadata}


def asking(*members):
    parts = [{"type": "image", "member": member} for member in members]
    return {"task": "classification", "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}]}


def write(path, *samples):
    with ShardFile(path) as file:
        for key, content, members in samples:
            file.add(key, sample_files(key, Draft(content, members)))
    return file.shard


SAMPLES = (
    ("folder/a", asking("0.png", "1.jpg"), {"0.png": jpeg(3, 2, format="PNG"), "1.jpg": jpeg(5, 2)}),
    ("b", document("数字 seven", voice="m1"), {}),
)


def test_a_plain_reader_gets_what_was_written(tmp_path):
    write(tmp_path / "train-00000.tar", *SAMPLES)
    read = list(webdataset.WebDataset([str(tmp_path / "train-00000.tar")], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["folder/a", "b"]
    assert {suffix: read[0][suffix] for suffix in ("0.png", "1.jpg")} == SAMPLES[0][2]
    assert json.loads(read[0]["json"]) == SAMPLES[0][1]
    assert json.loads(read[1]["json"]) == SAMPLES[1][1]


def test_a_finished_shard_is_indexed_and_alone(tmp_path):
    path = tmp_path / "train-00003.tar"
    shard = write(path, *SAMPLES)
    index = load_index(path, verify_digest=True)
    assert (shard.name, shard.num_samples, shard.num_bytes, shard.digest) == ("train-00003", 2, path.stat().st_size, index.digest)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-00003.tar", "train-00003.tar.index"]


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("one.tar", "two.tar"):
        write(tmp_path / name, *SAMPLES)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "root", 0o644)}


def test_nothing_has_its_name_before_the_end(tmp_path):
    with ShardFile(tmp_path / "a.tar") as file:
        file.add("b", sample_files("b", Draft(document())))
        assert [path.name for path in tmp_path.iterdir()] == [f".a.tar.{os.getpid()}.tmp"]
    assert file.shard.num_samples == 1


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), ShardFile(tmp_path / "a.tar") as file:
        file.add("b", sample_files("b", Draft(document())))
        raise error
    assert list(tmp_path.iterdir()) == []
    assert file.shard is None


def test_no_sample_is_no_shard(tmp_path):
    assert write(tmp_path / "a.tar") is None
    assert list(tmp_path.iterdir()) == []


def test_an_old_shard_is_replaced_with_its_index(tmp_path):
    path = tmp_path / "a.tar"
    write(path, *SAMPLES)
    index_before = index_path(path).read_bytes()
    write(path, SAMPLES[1])
    assert load_index(path, verify_digest=True).num_samples == 1
    assert index_path(path).read_bytes() != index_before


def test_left_overs_of_killed_processes_are_removed(tmp_path):
    write(tmp_path / "train-00001.tar", *SAMPLES)
    for name in (".train-00001.tar.77.tmp", ".train-00001.tar.index.77.tmp", ".train-00002.tar.77.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, {"train-00001"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train-00002.tar.77.tmp", "train-00001.tar", "train-00001.tar.index"]


@pytest.mark.parametrize(
    ("key", "content", "members", "message"),
    [
        ("a.b", document(), {}, "a key holds letters, digits"),
        ("../a", document(), {}, "a key holds letters, digits"),
        ("/a", document(), {}, "a key holds letters, digits"),
        ("七", document(), {}, "a key holds letters, digits"),
        ("", document(), {}, "a key holds letters, digits"),
        ("__key__", document(), {}, "a key holds letters, digits"),
        ("a" * 96, document(), {}, "has more than 100 characters"),
        ("a", {"task": "text"}, {}, "sample has no messages"),
        ("a", document(score=float("nan")), {}, "the document is not JSON"),
        ("a", document(score=b"7"), {}, "the document is not JSON"),
        ("a", document("\ud800"), {}, "the document is not JSON"),
        ("a", document("x" * (16 << 20)), {}, "bytes, readers take 4194304; cut it"),
        ("a", asking("0.png"), {}, r"the messages name ['0.png'] and the members are []"),
        ("a", asking("0.png"), {"0.png": b"x", "1.png": b"x"}, r"the messages name ['0.png'] and the members are ['0.png', '1.png']"),
        ("a", asking("0.png"), {"0.png": b""}, "member 0.png is bytes of no bytes"),
        ("a", asking("0.pyd"), {"0.pyd": {"pickle": "me"}}, "member 0.pyd is dict of no bytes"),
        ("a", asking("0.png"), {"0.png": b"\x89PNG\r\n\x1a\n and no more"}, "the picture's header cannot be read"),
        ("a", asking("0.jpg"), {"0.jpg": flac(100)}, "header cannot be read (no JPEG, PNG or WebP"),
    ],
)
def test_what_no_reader_accepts_is_refused(key, content, members, message):
    with pytest.raises(DataError) as raised:
        sample_files(key, Draft(content, members))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_masks_are_members_of_their_sample():
    png = jpeg(3, 2, format="PNG")
    mask = {"type": "mask", "image": 0, "member": "1.mask.png", "labels": []}
    content = {**asking("0.png"), "messages": [asking("0.png")["messages"][0], {"role": "assistant", "content": [mask]}]}
    assert list(sample_files("a", Draft(content, {"0.png": png, "1.mask.png": png}))) == ["json", "0.png", "1.mask.png"]
    with pytest.raises(DataError, match="the messages name"):
        sample_files("a", Draft(content, {"0.png": png}))
