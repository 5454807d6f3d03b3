import json
import tarfile

import pytest
import webdataset

from megamm.core.errors import DataError
from megamm.data.index import load_index
from megamm.prepare.writer import ShardWriter


def document(text="seven", **metadata):
    return {"task": "text", "messages": [{"role": "assistant", "content": text}], **metadata}


def asking(*members):
    parts = [{"type": "image", "member": member} for member in members]
    return {"task": "classification", "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}]}


def png(width=2):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (width, 2)).save(file, format="PNG")
    return file.getvalue()


def write(folder, num_samples=7, **limits):
    with ShardWriter(folder, "train", **limits) as writer:
        for index in range(num_samples):
            writer.write(f"key-{index}", document(f"seven {index}", rank=index), {})
    return writer.shards


def test_a_plain_reader_gets_what_was_written(tmp_path):
    members = {"0.png": png(), "1.png": png(5)}
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("folder/a", asking("0.png", "1.png"), members)
        writer.write("b", document("数字 seven", voice="m1"), {})
    read = list(webdataset.WebDataset([str(shard.path) for shard in writer.shards], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["folder/a", "b"]
    assert {suffix: read[0][suffix] for suffix in members} == members
    assert json.loads(read[0]["json"]) == asking("0.png", "1.png")
    assert json.loads(read[1]["json"]) == document("数字 seven", voice="m1")


def test_shards_are_cut_by_samples_and_indexed(tmp_path):
    shards = write(tmp_path, 7, max_samples=3)
    assert [shard.num_samples for shard in shards] == [3, 3, 1]
    assert [shard.path.name for shard in shards] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert [load_index(shard.path, verify_digest=True).num_samples for shard in shards] == [3, 3, 1]
    assert [shard.num_bytes for shard in shards] == [shard.path.stat().st_size for shard in shards]
    assert len(list(tmp_path.iterdir())) == 6


def test_shards_are_cut_by_bytes_and_a_large_sample_stands_alone(tmp_path):
    picture = png()
    with ShardWriter(tmp_path, "train", max_bytes=300) as writer:
        for index, text in enumerate(["a", "b" * 400, "c", "d"]):
            writer.write(str(index), document(text), {})
        writer.write("4", asking("0.png"), {"0.png": picture})
    assert [shard.num_samples for shard in writer.shards] == [1, 1, 2, 1]


def test_equal_samples_give_equal_bytes(tmp_path):
    first, second = (write(tmp_path / name)[0].path for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "root", 0o644)}


def test_existing_shards_of_the_prefix_are_refused_and_kept(tmp_path):
    before = write(tmp_path)[0].path.read_bytes()
    with pytest.raises(DataError, match=r"already holds train-00000\.tar; name another folder"):
        ShardWriter(tmp_path, "train")
    assert (tmp_path / "train-00000.tar").read_bytes() == before
    with ShardWriter(tmp_path, "test") as writer:
        writer.write("a", document(), {})
    assert len(writer.shards) == 1


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", max_samples=2) as writer:
        for index in range(5):
            writer.write(str(index), document(), {})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    assert writer.shards == []


def test_nothing_has_its_name_before_the_end(tmp_path):
    with ShardWriter(tmp_path, "train", max_samples=1) as writer:
        for index in range(3):
            writer.write(str(index), document(), {})
            assert not list(tmp_path.glob("train-*"))
    assert len(list(tmp_path.glob("train-*.tar"))) == 3


def test_no_sample_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample was written"), ShardWriter(tmp_path, "train"):
        pass


@pytest.mark.parametrize(
    ("key", "content", "members", "message"),
    [
        ("a.b", document(), {}, "holds other characters"),
        ("../a", document(), {}, "holds other characters"),
        ("/a", document(), {}, "holds other characters"),
        ("七", document(), {}, "holds other characters"),
        ("", document(), {}, "holds other characters"),
        ("old", document(), {}, "was written before"),
        ("a" * 96, document(), {}, "has more than 100 characters"),
        ("a", {"task": "text"}, {}, "sample has no messages"),
        ("a", document(score=float("nan")), {}, "the document is not JSON"),
        ("a", document(score=b"7"), {}, "the document is not JSON"),
        ("a", asking("0.png"), {}, r"the messages name ['0.png'] and the members are []"),
        ("a", asking("0.png"), {"0.png": b"x", "1.png": b"x"}, r"the messages name ['0.png'] and the members are ['0.png', '1.png']"),
        ("a", asking("0.png"), {"0.png": b""}, "member 0.png is bytes of no bytes"),
        ("a", asking("0.pyd"), {"0.pyd": {"pickle": "me"}}, "member 0.pyd is dict of no bytes"),
    ],
)
def test_what_no_reader_accepts_is_refused(tmp_path, key, content, members, message):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("old", document(), {})
        with pytest.raises(DataError) as raised:
            writer.write(key, content, members)
    assert message in str(raised.value)
    assert writer.shards[0].num_samples == 1
