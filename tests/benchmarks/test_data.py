"""The parts of `benchmarks.data` that need no peers: they measure what they say, on little data."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bounds import bounds_rows
from benchmarks.bytes_only import bytes_only_rows
from benchmarks.corpus import Corpus, make_corpus
from benchmarks.decoding import check_equal
from benchmarks.memory import PeakMemory
from benchmarks.planning import planning_rows
from benchmarks.race import Contestant, race
from benchmarks.scale import scale_rows
from megamm.data.shards.index import load_index


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MEGAMM_DATA", raising=False)
        return make_corpus(tmp_path_factory.mktemp("samples"), num_shards=2, samples_a_shard=12)


def test_the_corpus_is_what_it_says(corpus):
    assert corpus.origin.startswith("generated") and len(corpus.tars) == 2
    for tar in corpus.tars:
        index = load_index(tar)
        assert index.num_samples == 12
        for sample in range(12):
            facts = index.media(sample)
            assert 256 <= facts["0.jpg"].width <= 512 and 256 <= facts["0.jpg"].height <= 512
            assert facts["1.flac"].num_frames == 5 * facts["1.flac"].rate_hz


def test_equal_seeds_make_equal_shards(corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGAMM_DATA", raising=False)
    again = make_corpus(tmp_path, num_shards=1, samples_a_shard=12)
    assert again.tars[0].read_bytes() == corpus.tars[0].read_bytes()


@pytest.mark.integration
def test_the_peers_decoder_gives_what_ours_gives(corpus):
    check_equal(corpus)


@pytest.mark.integration
def test_readers_are_measured_against_each_other(corpus):
    rows = {row.row: row for row in bytes_only_rows(corpus, num_rounds=3)}
    ours, raw = rows["bytes only: index reader"].value, rows["bytes only: plain reads"].value
    assert 0 < raw < ours
    assert rows["bytes only: index reader / plain reads"].goal == "<= 1.6"


def test_planning_fills_rows_and_levels_ranks():
    rows = {row.row: row.value for row in planning_rows(num_steps=2, num_rounds=1)}
    assert 0.5 < rows["planning: fill, short and long texts"] <= 1
    assert rows["planning: costliest rank / mean, 8 rows a rank"] >= 1


def test_peak_memory_sees_what_is_gone_again():
    with PeakMemory() as memory:
        block = np.ones(64 << 20, dtype=np.uint8)
        time.sleep(0.05)
        del block
    assert 60e6 < memory.added_bytes < 200e6


@pytest.mark.integration
def test_contestants_deliver_the_same_work(corpus):
    with Contestant("megamm", corpus.folder) as ours, Contestant("webdataset", corpus.folder) as theirs:
        turns = race([ours, theirs], num_rounds=1, num_samples=corpus.num_samples)
    for (turn,) in turns.values():
        assert turn.cpu_seconds > 0 and turn.delivered["samples"] >= corpus.num_samples
        assert turn.delivered["frames"] == 500 * turn.delivered["samples"]


@pytest.mark.integration
def test_a_contestant_that_ends_is_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError, match="webdataset ended with code"):
        Contestant("webdataset", tmp_path / "nowhere")


@pytest.mark.integration
def test_a_billion_samples_are_opened_sought_and_planned():
    rows = {row.row: row for row in scale_rows(num_shards=300)}
    assert len(rows) == 6 and all(row.holds for row in rows.values()), rows


@pytest.mark.integration
def test_the_loader_stays_under_its_bound_among_bombs(corpus):
    (row,) = bounds_rows(corpus, num_steps=6)
    assert row.holds, row
