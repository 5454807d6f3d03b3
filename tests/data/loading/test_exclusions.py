"""Keys that are kept out become places: every sample of that key and no other, each index opened once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megamm.data.loading.exclusions import excluded_samples
from megamm.data.planning.state import Exclusion
from megamm.data.shards.index import load_index, write_index
from tests.support.plans import shard_set
from tests.support.shards import as_files, text_document, write_tar


@pytest.fixture
def datasets(tmp_path):
    """`a` of three shards, two of which hold the key `both`; `b`, whose shards are not even there."""
    shards = (["x", "both", "y"], ["both"], ["u", "v"])
    tars = []
    for number, keys in enumerate(shards):
        tars.append(write_tar(tmp_path / f"a-{number:05}.tar", {key: as_files(text_document(key)) for key in keys}))
        write_index(tars[-1])
    return {"a": replace(shard_set("a", [3, 1, 2]), tars=tuple(tars)), "b": shard_set("b", [9])}


def test_every_sample_of_a_key_is_found(datasets):
    exclusions = [Exclusion(3, ("a/both", "a/v")), Exclusion(9, ("a/v", "a/y"))]
    assert excluded_samples(exclusions, datasets) == {("a", 1), ("a", 2), ("a", 3), ("a", 5)}


def test_keys_that_are_gone_keep_nothing_out(datasets):
    assert excluded_samples([Exclusion(0, ("a/gone", "gone/x"))], datasets) == frozenset()


def test_equal_hashes_are_not_equal_keys(datasets):
    tar = datasets["a"].tars[0]
    index = load_index(tar)
    write_index(tar, replace(index, key_digests=np.full(3, index.key_digests[2])))
    assert excluded_samples([Exclusion(0, ("a/y",))], datasets) == {("a", 2)}


def test_each_index_is_opened_once_and_only_of_datasets_with_exclusions(datasets, monkeypatch):
    opened = []
    monkeypatch.setattr("megamm.data.loading.exclusions.load_index", lambda tar: opened.append(tar) or load_index(tar))
    assert len(excluded_samples([Exclusion(0, ("a/x", "a/u"))], datasets)) == 2
    assert opened == list(datasets["a"].tars)
