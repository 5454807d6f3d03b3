"""Held-out rows: every sample once, in order, equally many micro-batches on every rank."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import pytest

from megamm.config import Batching, Dataset
from megamm.core.errors import ConfigError, DataError
from megamm.data.loading.held_out import HeldOut, held_out_batches
from tests.data.conftest import MODEL

BATCH = Batching(row_tokens=96, global_rows=4, micro_rows=2)


@pytest.fixture
def held_out(corpus, tokenizer, settings_of):
    def open_(root=corpus, **changes):
        data = settings_of(root, **changes)
        return HeldOut(replace(data, held_out=data.train, train={}), BATCH, model=MODEL, tokenizer=tokenizer)

    return open_


def keys_of(batches):
    return [key for batch in batches for row in batch.keys for key in row]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_comes_once_on_equally_many_micro_batches(held_out, world_size):
    plan = held_out()
    parts = [list(held_out_batches(plan, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert all(batch.input_ids.shape == (2, 96) for part in parts for batch in part)
    keys = [key for part in parts for key in keys_of(part)]
    assert len(keys) == len(set(keys)) == sum(dataset.num_samples for dataset in plan.datasets.values()) == 51 + 18 + 28


def test_the_first_rows_are_the_same_for_every_world_size(held_out):
    plan = held_out()
    expected = keys_of(held_out_batches(plan, num_rows=7))
    assert {key.split("/")[0] for key in expected} == {"digits", "words", "text"}
    for world_size in (2, 3):
        parts = [list(held_out_batches(plan, rank=rank, world_size=world_size, num_rows=7)) for rank in range(world_size)]
        assert [key for group in zip(*parts, strict=True) for key in keys_of(group)] == expected


def test_bad_samples_are_left_out_with_a_warning(tmp_path, corpus, held_out, caplog):
    root = shutil.copytree(corpus, tmp_path / "corpus")
    tar = root / "digits/train-00001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 200] ^= 4
    tar.write_bytes(content)
    with caplog.at_level("WARNING", logger="megamm"):
        keys = keys_of(held_out_batches(held_out(root)))
    assert len(keys) == 96 and "digits/d1-0" not in keys
    assert any("digits/d1-0 is left out" in message for message in caplog.messages)


def test_leaving_early_leaves_no_threads(held_out):
    before = set(threading.enumerate())
    batches = held_out_batches(held_out())
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= before


def test_tasks_must_cover_the_held_out_ones(held_out):
    with pytest.raises(ConfigError, match="'classification'"):
        next(held_out_batches(held_out(), tasks=("text",)))
    batch = next(held_out_batches(held_out(), tasks=("classification", "other", "speech_recognition", "text")))
    assert set(batch.task_ids[batch.task_ids >= 0].tolist()) <= {0, 2, 3}


def test_missing_shards_are_named(held_out):
    with pytest.raises(DataError, match="dataset gone: no shard matches"):
        held_out(train={"gone": Dataset("gone/*.tar")})
