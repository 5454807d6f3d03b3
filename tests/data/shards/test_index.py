"""The strict validator and the sidecar, against tars that plain readers accept in part."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import webdataset
import xxhash

from megamm.core.errors import DataError
from megamm.core.types import MediaFacts
from megamm.data.ledger import BadSample
from megamm.data.shards.arrays import map_arrays, write_arrays
from megamm.data.shards.index import build_index, index_path, load_index, write_index
from megamm.data.shards.reader import LocalReader, ShardReader
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar


def samples() -> dict[str, dict[str, bytes]]:
    picture = chat([{"type": "image", "member": "0.jpg"}], "cat")
    sound = chat([{"type": "audio", "member": "0.flac"}], "one", task="speech_recognition")
    return {
        "a/000": as_files(picture, _0_jpg=jpeg(40, 30)),
        "a/001": as_files(sound, _0_flac=flac(12345, rate_hz=22050)),
        "b": as_files(text_document("plain words")),
        "c": as_files(picture, _0_jpg=jpeg(20, 50, seed=1), _1_png=jpeg(7, 9, format="PNG")),
    }


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_tar(tmp_path / "train-00000.tar", samples())


def raw_tar(entries: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def put(folder: Path, content: bytes) -> Path:
    path = folder / "x.tar"
    path.write_bytes(content)
    return path


def test_index_agrees_with_the_bytes_and_with_webdataset(shard):
    index = build_index(shard)
    content = shard.read_bytes()
    assert index.tar_size == len(content)
    assert index.digest == xxhash.xxh3_128_hexdigest(content)
    expected = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [index.key(sample) for sample in range(index.num_samples)] == [entry["__key__"] for entry in expected] == list(samples())
    for sample, entry in enumerate(expected):
        found = {member.suffix: content[member.offset : member.offset + member.size] for member in index.members(sample)}
        assert found == {name: value for name, value in entry.items() if not name.startswith("__")}
        for member in index.members(sample):
            assert xxhash.xxh3_64_intdigest(content[member.offset - 512 : member.offset + member.size]) == member.digest
    assert index.media(0) == {"0.jpg": MediaFacts("image", 40, 30)}
    assert index.media(1) == {"0.flac": MediaFacts("audio", num_frames=12345, rate_hz=22050)}
    assert index.media(2) == {}
    assert index.media(3) == {"0.jpg": MediaFacts("image", 20, 50), "1.png": MediaFacts("image", 7, 9)}
    assert not index.problems


def test_written_index_is_mapped_back_equal(shard):
    built = write_index(shard)
    loaded = load_index(shard, verify_digest=True)
    for name, value in vars(built).items():
        other = getattr(loaded, name)
        assert np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other, name
    assert not loaded.member_offsets.flags.owndata and not loaded.member_offsets.flags.writeable


def test_vertical_picture_is_measured_after_its_orientation(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    tar = write_tar(
        tmp_path / "x.tar", {"a": as_files(text_document("x"), _0_jpg=jpeg(40, 30, exif=exif), _1_png=jpeg(8, 5, format="PNG", exif=exif))}
    )
    assert build_index(tar).media(0) == {"0.jpg": MediaFacts("image", 30, 40), "1.png": MediaFacts("image", 5, 8)}


def test_rotten_content_is_noted_and_costs_no_other_sample(tmp_path):
    wav = flac(0, format="WAV")
    tar = write_tar(
        tmp_path / "x.tar",
        {
            "broken": as_files(text_document("x"), _0_jpg=b"not a picture"),
            "fine": as_files(text_document("x")),
            "text": {"json": b"\xff\xfe"},
            "empty": as_files(text_document("x"), _0_wav=wav),
            "pickle": {"json": b"{}", "pkl": b"\x80\x04."},
        },
    )
    index = build_index(tar)
    assert set(index.problems) == {0, 3}
    assert "0.jpg" in index.problems[0] and "0 samples" in index.problems[3]


def test_what_the_tar_command_writes_is_read(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for name in ("a.jpg", "a.txt", "inner/b.CLS"):
        (folder / name).write_bytes(jpeg(4, 5) if name.endswith("jpg") else b"x")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True)
    index = build_index(tmp_path / "x.tar")
    assert [index.key(sample) for sample in range(index.num_samples)] == ["./a", "./inner/b"]
    assert [entry["__key__"] for entry in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)] == ["./a", "./inner/b"]
    assert [member.suffix for sample in range(2) for member in index.members(sample)] == ["jpg", "txt", "CLS"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path, format):
    names = ["d" * 90 + "/" + "k" * 120 + ".json", "d/ключ.json"]
    path = put(tmp_path, raw_tar([(name, b"{}") for name in names], format))
    index = build_index(path)
    assert [index.key(sample) + ".json" for sample in range(2)] == names


def test_ustar_prefix_is_part_of_the_name(tmp_path):
    name = "p" * 80 + "/" + "k" * 60 + ".json"
    assert build_index(put(tmp_path, raw_tar([(name, b"{}")]))).key(0) + ".json" == name


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a.json", b"{}"), ("b.json", b"{}"), ("a.txt", b"x")], "not adjacent"),
        ([("a.json", b"{}"), ("a.json", b"{}")], "occurs twice"),
        ([("a.json", b"{}"), ("a.0.JPG", b"x"), ("a.0.jpg", b"x")], "occurs twice"),
        ([("/a.json", b"{}")], "plain relative path"),
        ([("x/../../a.json", b"{}")], "plain relative path"),
        ([("././a.json", b"{}")], "plain relative path"),
        ([("a\\b.json", b"{}")], "plain relative path"),
        ([("noending", b"{}")], "KEY.SUFFIX"),
        ([("__meta__/a.json", b"{}")], "KEY.SUFFIX"),
        ([("a.__url__", b"{}")], "KEY.SUFFIX"),
    ],
)
def test_ambiguous_or_unsafe_members_are_refused(tmp_path, entries, message):
    with pytest.raises(DataError, match=message) as error:
        build_index(put(tmp_path, raw_tar(entries)))
    assert "x.tar" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"7"])
def test_anything_but_regular_files_is_refused(tmp_path, kind):
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = kind, "/etc/passwd"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match="regular files only"):
        build_index(put(tmp_path, file.getvalue()))


def test_pax_headers_that_change_meaning_are_refused(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.realsize": "1"}) as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(DataError, match=r"GNU\.sparse"):
        build_index(put(tmp_path, file.getvalue()))


def test_every_truncation_is_detected(tmp_path):
    content = write_tar(tmp_path / "full.tar", {"a": {"json": b"{}", "txt": b"x" * 600}, "b": {"json": b'{"n": 1}'}}).read_bytes()
    end = content.rstrip(b"\0")
    last_block = -(-len(end) // 512) * 512
    for size in [*range(0, last_block + 1024, 37), last_block, last_block + 512]:
        with pytest.raises(DataError):
            build_index(put(tmp_path, content[:size]))
    assert build_index(put(tmp_path, content[: last_block + 1024])).num_samples == 2


def test_no_flipped_bit_of_a_header_changes_what_is_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a": {"json": b"{}"}, "b": {"json": b"{}"}})
    content = path.read_bytes()
    keys = ["a", "b"]
    for bit in range(0, 512 * 8, 7):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            index = build_index(path)
        except DataError:
            continue
        # A few bits of the checksum field's own padding say nothing.
        assert [index.key(sample) for sample in range(index.num_samples)] == keys
        assert 148 <= bit // 8 < 156


def test_bytes_after_the_end_are_refused(tmp_path):
    content = write_tar(tmp_path / "x.tar", {"a": {"json": b"{}"}}).read_bytes()
    with pytest.raises(DataError, match="follow the end"):
        build_index(put(tmp_path, content + content))


def test_hole_in_the_middle_is_refused(tmp_path):
    content = write_tar(tmp_path / "x.tar", {key: {"json": b"{}"} for key in "abc"}).read_bytes()
    with pytest.raises(DataError, match="follow the end"):
        build_index(put(tmp_path, content[:1024] + bytes(1024) + content[2048:]))


def test_zeros_over_the_last_members_are_refused(tmp_path):
    """Writers end an archive with two zero blocks, or fill a record of 10240 bytes."""
    content = write_tar(tmp_path / "x.tar", {str(key): {"json": b"{}"} for key in range(40)}).read_bytes()
    assert len(content) % 10240 == 0
    end = 40 * 1024
    for size in (end + 1024, len(content)):
        assert build_index(put(tmp_path, content[:size])).num_samples == 40
    for found in (content[: end - 20480] + bytes(len(content) - end + 20480), content[: end - 1024] + bytes(2048), content + bytes(10240)):
        with pytest.raises(DataError, match="zeros follow the last member"):
            build_index(put(tmp_path, found))


def test_member_larger_than_the_file_is_refused(tmp_path):
    info = tarfile.TarInfo("a.json")
    info.size = 1 << 40
    with pytest.raises(DataError, match="beyond the file"):
        build_index(put(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))


def test_missing_shard_names_it(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar does not exist"):
        build_index(tmp_path / "gone.tar")
    with pytest.raises(DataError, match=r"gone\.tar does not exist"):
        load_index(tmp_path / "gone.tar")


def test_missing_index_says_what_to_run(shard):
    with pytest.raises(DataError, match=r"train-00000\.tar\.index is missing; run `megamm data index .*train-00000\.tar`"):
        load_index(shard)


def test_index_without_its_shard_is_an_error(shard):
    write_index(shard)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000\.tar does not exist, but its index does"):
        load_index(shard)


def test_changed_shard_is_an_error(shard):
    write_index(shard)
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512))
    with pytest.raises(DataError, match="changed since it was indexed"):
        load_index(shard)
    shard.write_bytes(content[:600] + b"!" + content[601:])
    load_index(shard)
    with pytest.raises(DataError, match="changed since it was indexed: digest"):
        load_index(shard, verify_digest=True)


def test_equal_bytes_under_other_keys_are_noticed(tmp_path):
    """The names lie in headers that no sample's bytes hold; the two shards have the same size."""
    path = write_tar(tmp_path / "x.tar", {"a": {"json": b"{}"}, "b": {"json": b"[]"}})
    index = write_index(path)
    write_tar(path, {"b": {"json": b"{}"}, "a": {"json": b"[]"}})
    shard = ShardReader(path, load_index(path), LocalReader())
    for number in range(index.num_samples):
        with pytest.raises(BadSample, match="changed since they were indexed"):
            shard.sample(number)


def test_damaged_index_is_an_error_wherever_a_bit_flips(shard):
    write_index(shard)
    path = index_path(shard)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(content) * 8, size=300, replace=False).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-00000\.tar"):
            load_index(shard)
    for size in range(0, len(content), 101):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="damaged"):
            load_index(shard)


def test_other_version_is_refused(shard, monkeypatch):
    monkeypatch.setattr("megamm.data.shards.index.INDEX_VERSION", 0)
    write_index(shard)
    monkeypatch.undo()
    with pytest.raises(DataError, match="version 0"):
        load_index(shard)


def test_equal_arrays_are_equal_bytes_that_safetensors_reads(tmp_path):
    arrays = {"b": np.arange(5), "a": np.arange(3, dtype=np.uint8), "c": np.zeros((0, 2), np.int32), "d": np.arange(4, dtype=np.uint64)}
    first = write_arrays(tmp_path / "one", arrays, {"x": 1})
    second = write_arrays(tmp_path / "two", dict(reversed(arrays.items())), {"x": 1})
    assert first == second != write_arrays(tmp_path / "three", arrays, {"x": 2})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    theirs = safetensors.numpy.load_file(tmp_path / "one")
    assert all(np.array_equal(theirs[name], array) and theirs[name].dtype == array.dtype for name, array in arrays.items())
    mapped = map_arrays(tmp_path / "one")
    assert mapped.facts == {"x": 1} and mapped.digest == first
    assert all(np.array_equal(mapped.arrays[name], array) and mapped.arrays[name].dtype == array.dtype for name, array in arrays.items())


def test_a_compressed_shard_is_told_as_one(shard):
    shard.write_bytes(gzip.compress(shard.read_bytes(), mtime=0))
    with pytest.raises(DataError, match=r"train-00000\.tar: it is compressed with gzip; decompress it, shards are read from any place$"):
        build_index(shard)
