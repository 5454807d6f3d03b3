"""Which shards a dataset has, and opening very many of them at once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from megamm.config import Data, Dataset
from megamm.core.errors import ConfigError, DataError
from megamm.data.media.features import MediaRules
from megamm.data.samples import catalogue as catalogues
from megamm.data.samples.datasets import find_shards, open_dataset
from megamm.data.samples.lengths import ensure_lengths, lengths_key, lengths_path, open_catalogue
from megamm.data.shards.index import index_path, write_index
from tests.support.shards import as_files, text_document, write_tar

RULES = MediaRules(None, None, 1)


def names(shards) -> list[str]:
    return [shard.name for shard in shards]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_globs_ranges_and_paths_name_the_same_shards(tmp_path):
    touch(tmp_path, *(f"a/x-{number:02}.tar" for number in range(12)), "a/other.tar", "b/x-00.tar", "a/x-00.tar.index")
    for pattern in ("a/x-*.tar", "a/x-{00..11}.tar", "a/x-{0,1}[0-9].tar", str(tmp_path / "a/x-{00..11}.tar")):
        assert find_shards("d", Dataset(pattern), tmp_path) == tuple(tmp_path / f"a/x-{number:02}.tar" for number in range(12))
    assert find_shards("d", Dataset("*/x-00.tar"), tmp_path) == (tmp_path / "a/x-00.tar", tmp_path / "b/x-00.tar")
    assert find_shards("d", Dataset("**/x-0*.tar"), tmp_path)[-1] == tmp_path / "b/x-00.tar"
    assert names(find_shards("d", Dataset("a/x-00.tar*"), tmp_path)) == ["x-00.tar"]
    assert names(find_shards("d", Dataset("{b,a}/x-00.tar"), tmp_path)) == ["x-00.tar", "x-00.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-*.tar", "no shard matches"),
        ("gone/x-*.tar", "no shard matches"),
        ("x-00.tar", "no shard matches"),
        ("a/x-{00..02}.tar", r"a/x-01\.tar does not exist; bring it back"),
        ("a/y-*.tar", r"a/y-01\.tar does not exist, but its index does"),
    ],
)
def test_missing_shards_are_told(tmp_path, pattern, message):
    touch(tmp_path, "a/x-00.tar", "a/x-02.tar", "a/y-00.tar", "a/y-01.tar.index")
    with pytest.raises(DataError, match=message):
        find_shards("d", Dataset(pattern), tmp_path)


def test_what_runs_code_is_no_shard(tmp_path):
    with pytest.raises(ConfigError, match="is never run or read"):
        find_shards("d", Dataset("pipe:touch ran"), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def small_catalogues(monkeypatch):
    monkeypatch.setattr(catalogues, "MIN_SHARDS", 3)


@pytest.fixture
def tars(tmp_path):
    tars = []
    for shard in range(5):
        samples = {f"t{shard}-{number}": as_files(text_document("plain words " * (number + 1))) for number in range(shard + 1)}
        tars.append(write_tar(tmp_path / f"x-{shard}.tar", samples))
        write_index(tars[-1])
    return tuple(tars)


def same(one, other) -> bool:
    lists = one.digests == other.digests and one.lengths_digests == other.lengths_digests
    numbers = (one.num_tokens, one.num_problems, one.task_names) == (other.num_tokens, other.num_problems, other.task_names)
    return lists and numbers and np.array_equal(one.num_samples, other.num_samples)


def test_a_catalogue_says_what_the_headers_say(tars, tokenizer, small_catalogues, monkeypatch):
    key = lengths_key(tokenizer, RULES)
    assert ensure_lengths(tars, tokenizer, RULES) == list(tars)
    from_catalogue = catalogues.read_catalogue(tars, key, (1, 1))
    assert from_catalogue is None, "other versions of sidecars are other facts"
    reads = []
    monkeypatch.setattr("megamm.data.samples.lengths.read_shard_facts", lambda tar: reads.append(tar))
    from_catalogue = open_catalogue(tars, key)
    assert ensure_lengths(tars, tokenizer, RULES) == [] and not reads
    monkeypatch.undo()
    assert same(from_catalogue, open_catalogue(tars, key)) and from_catalogue.num_samples.tolist() == [1, 2, 3, 4, 5]


def _rewrite(tars):
    write_tar(tars[1], {"other": as_files(text_document("other words"))})
    write_index(tars[1])


def _rewrite_same_size(tars):
    content = tars[2].read_bytes()
    tars[2].write_bytes(content.replace(b"plain words", b"other words"))
    write_index(tars[2])


CHANGES = {
    "rewritten": (_rewrite, "changed|another version"),
    "same size": (_rewrite_same_size, "another version"),
    "cut": (lambda tars: tars[3].write_bytes(tars[3].read_bytes()[:-512]), "changed since it was indexed"),
    "no index": (lambda tars: index_path(tars[0]).unlink(), "is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_catalogue_is_not_believed_of_changed_shards(tars, tokenizer, small_catalogues, change):
    key = lengths_key(tokenizer, RULES)
    ensure_lengths(tars, tokenizer, RULES)
    # File systems keep times in steps of a few milliseconds.
    time.sleep(0.02)
    act, message = CHANGES[change]
    act(tars)
    with pytest.raises(DataError, match=message):
        open_catalogue(tars, key)


@pytest.mark.parametrize("pattern", ["*", "x-*", "*.tar*"])
def test_what_lies_beside_shards_is_no_shard(tmp_path, tars, tokenizer, small_catalogues, monkeypatch, pattern):
    monkeypatch.setattr("megamm.data.samples.lengths.IN_MEMORY_SAMPLES", 0)
    ensure_lengths(tars, tokenizer, RULES)
    touch(tmp_path, ".x-9.tar.123.tmp")
    assert len(list(tmp_path.iterdir())) == 3 * len(tars) + 3, "indexes, lengths, catalogue, joined lengths, a file being written"
    assert find_shards("d", Dataset(pattern), tmp_path) == tars


def test_lengths_that_went_missing_are_planned_again(tars, tokenizer, small_catalogues):
    key = lengths_key(tokenizer, RULES)
    ensure_lengths(tars, tokenizer, RULES)
    lengths_path(tars[4], key).unlink()
    with pytest.raises(DataError, match=r"x-4\.tar: .* is missing"):
        open_catalogue(tars, key)
    assert ensure_lengths(tars, tokenizer, RULES) == [tars[4]]


def test_a_damaged_catalogue_is_made_anew(tars, tokenizer, small_catalogues):
    key = lengths_key(tokenizer, RULES)
    ensure_lengths(tars, tokenizer, RULES)
    path = tars[0].with_name(f"{tars[0].name}.catalogue-{key}")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert open_catalogue(tars, key).num_samples.sum() == 15
    assert ensure_lengths(tars, tokenizer, RULES) == [] and path.read_bytes() == good


def test_a_folder_that_cannot_be_written_to_does_without_a_catalogue(tars, tokenizer, small_catalogues, caplog):
    key = lengths_key(tokenizer, RULES)
    ensure_lengths(tars, tokenizer, RULES)
    path = tars[0].with_name(f"{tars[0].name}.catalogue-{key}")
    path.unlink()
    path.mkdir()
    assert ensure_lengths(tars, tokenizer, RULES) == []
    assert open_catalogue(tars, key).num_samples.sum() == 15


@pytest.mark.slow
def test_a_hundred_thousand_shards_open_from_one_catalogue(tmp_path, tokenizer):
    num_shards, key = 100_000, lengths_key(tokenizer, RULES)
    first = write_tar(tmp_path / "x-000000.tar", {"a": as_files(text_document("say one"))})
    write_index(first)
    ensure_lengths([first], tokenizer, RULES)
    for number in range(1, num_shards):
        for ending in ("", ".index", f".lengths-{key}"):
            path = Path(f"{tmp_path}/x-{number:06}.tar{ending}")
            if number % 50_000:
                path.hardlink_to(tmp_path / f"x-{number - number % 50_000:06}.tar{ending}")
            else:
                # A file takes no more than 65,000 names.
                path.write_bytes(Path(f"{first}{ending}").read_bytes())
    ensure_lengths(find_shards("d", Dataset("x-*.tar"), tmp_path), tokenizer, RULES)
    took = []
    for _ in range(3):
        start = time.process_time()
        opened = open_catalogue(find_shards("d", Dataset("x-*.tar"), tmp_path), key)
        took.append(time.process_time() - start)
    assert opened.num_samples.sum() == num_shards
    # Without the catalogue it takes 11 seconds of processor time.
    assert min(took) < 4.0, took


@pytest.mark.parametrize("copied", [shutil.copy, lambda tar, other: other.symlink_to(tar), lambda tar, other: other.hardlink_to(tar)])
def test_shards_with_the_same_content_are_told_once(tmp_path, tars, tokenizer, caplog, copied):
    """Their samples are trained on twice a pass, which may be wanted; shards without a sample are all the same."""
    for number, empty in enumerate(("e-0.tar", "e-1.tar")):
        write_index(write_tar(tmp_path / f"x-{empty}", {}))
        copied(tars[number], tmp_path / f"x-again-{number}.tar")
        write_index(tmp_path / f"x-again-{number}.tar")
    data = Data(root=str(tmp_path))

    def warnings(pattern: str) -> list[str]:
        ensure_lengths(find_shards("d", Dataset(pattern), tmp_path), tokenizer, RULES)
        caplog.clear()
        open_dataset("d", Dataset(pattern), data, tokenizer=tokenizer, rules=RULES)
        return [record.getMessage() for record in caplog.records]

    assert warnings("x-[0-4e]*.tar") == []
    (told,) = warnings("x-*.tar")
    assert "dataset d: shards" in told and str(tars[0]) in told and "x-again-0.tar" in told and "and 1 more" in told
