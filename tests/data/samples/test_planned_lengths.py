"""Planned lengths: what decoding will find, kept beside the shard, with reasons for what cannot be used."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from megamm.config import Data, Dataset, Limits
from megamm.core.errors import DataError
from megamm.data.loading.source import SampleSource
from megamm.data.media.features import MediaRules
from megamm.data.planning.rows import PlannedSample
from megamm.data.samples.datasets import open_dataset
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.lengths import ensure_lengths, lengths_key, lengths_path, load_lengths, plan_lengths, read_lengths_facts
from megamm.data.shards.index import index_path, load_index, read_shard_facts, write_index
from megamm.data.shards.reader import LocalReader
from tests.data.conftest import BATCH, MODEL
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar

RULES = MediaRules.of(MODEL, Data())


def test_planned_equals_encoded(corpus, tokenizer, open_plan):
    plan = open_plan(corpus)
    source = SampleSource(plan.datasets, SampleEncoder(tokenizer, RULES), LocalReader())
    for dataset in plan.datasets.values():
        for index in range(dataset.num_samples):
            tar, number = dataset.locate(index)
            lengths = load_lengths(tar, lengths_key(tokenizer, RULES))
            planned = PlannedSample(0, dataset.name, index, 0, *lengths.lengths[number, 0].tolist())
            sequence = source.load(planned)
            assert len(sequence.input_ids) == planned.tokens == lengths.tokens[number]
            assert lengths.task_names[lengths.tasks[number]] == sequence.task
            wrong = source.load(replace(planned, tokens=planned.tokens + 1))
            assert "its media do not hold what their headers say" in wrong.reason
    source.close()


def test_what_cannot_be_used_has_a_reason_and_length_zero(tmp_path, tokenizer):
    picture, sound = {"type": "image", "member": "0.jpg"}, {"type": "audio", "member": "0.flac"}
    samples = {
        "fine": as_files(chat([picture], "cat"), _0_jpg=jpeg(20, 20)),
        "broken": as_files(chat([picture], "cat"), _0_jpg=b"nothing"),
        "absent": as_files(chat([picture], "cat")),
        "mistaken": as_files(chat([{"type": "audio", "member": "0.jpg"}], "cat"), _0_jpg=jpeg(20, 20)),
        "huge": as_files(chat([picture], "cat"), _0_jpg=jpeg(300, 300)),
        "long": as_files(chat([sound], "one"), _0_flac=flac(9000)),
        "unknown": as_files(chat([picture], "cat", task="Dance!"), _0_jpg=jpeg(20, 20)),
    }
    tar = write_tar(tmp_path / "x.tar", samples)
    write_index(tar)
    rules = replace(RULES, limits=Limits(pixels=40_000), audio=replace(RULES.audio, max_seconds=0.5))
    lengths = plan_lengths(tar, tokenizer, rules)
    assert set(lengths.problems) == set(range(1, 7))
    assert lengths.tokens[0] > 0 and not lengths.lengths[1:].any()
    for number, part in enumerate(("header cannot be read", "0.jpg is missing", "no readable audio", "300 x 300", "0.6 s", "'Dance!'"), 1):
        assert part in lengths.problems[number]


def test_a_model_without_a_tower_plans_its_media_as_unusable(tmp_path, tokenizer):
    tar = write_tar(
        tmp_path / "x.tar",
        {"a": as_files(chat([{"type": "image", "member": "0.jpg"}], "x"), _0_jpg=jpeg(9, 9)), "b": as_files(text_document("x"))},
    )
    write_index(tar)
    lengths = plan_lengths(tar, tokenizer, MediaRules.of(replace(MODEL, vision=None), Data()))
    assert "no vision tower" in lengths.problems[0] and lengths.tokens[1] > 0


def test_lengths_are_made_once_and_again_when_the_shard_changes(tmp_path, tokenizer):
    tar = write_tar(tmp_path / "x.tar", {"a": as_files(text_document("plain words"))})
    write_index(tar)
    key = lengths_key(tokenizer, RULES)
    assert ensure_lengths([tar], tokenizer, RULES) == [tar]
    first = read_lengths_facts(tar, key, read_shard_facts(tar))
    assert ensure_lengths([tar], tokenizer, RULES) == []
    write_tar(tar, {"a": as_files(text_document("plain words " * 999))})
    with pytest.raises(DataError, match="changed since it was indexed"):
        load_index(tar)
    write_index(tar)
    with pytest.raises(DataError, match="another version of the shard"):
        read_lengths_facts(tar, key, read_shard_facts(tar))
    assert ensure_lengths([tar], tokenizer, RULES) == [tar]
    assert read_lengths_facts(tar, key, read_shard_facts(tar)).digest != first.digest
    lengths_path(tar, key).write_bytes(b"torn")
    with pytest.raises(DataError, match="is damaged"):
        read_lengths_facts(tar, key, read_shard_facts(tar))
    assert ensure_lengths([tar], tokenizer, RULES) == [tar]


def test_lengths_that_are_not_those_of_the_catalogue_are_refused(tmp_path, tokenizer, monkeypatch):
    """The catalogue looks at shards and not into sidecars: who reads these must notice."""
    monkeypatch.setattr("megamm.data.samples.catalogue.MIN_SHARDS", 1)
    data, key = Data(root=str(tmp_path)), lengths_key(tokenizer, RULES)
    for name, number in (("x", 2), ("other", 3)):
        tar = write_tar(tmp_path / f"{name}.tar", {str(one): as_files(text_document("plain words")) for one in range(number)})
        write_index(tar)
        ensure_lengths([tar], tokenizer, RULES)
    path = lengths_path(tmp_path / "x.tar", key)
    for other, message in ((lengths_path(tar, key), "changed since they were catalogued"), (index_path(tar), "it is another file")):
        shutil.copy(other, path)
        with pytest.raises(DataError, match=rf"x\.tar.*{message}"):
            open_dataset("x", Dataset("x.tar"), data, tokenizer=tokenizer, rules=RULES)


def test_a_wrong_number_of_samples_in_the_header_of_an_index_is_refused(tmp_path, tokenizer):
    """The header alone says how many there are when a dataset is opened; its digest covers the arrays as well and is not computed then."""
    tar = write_tar(tmp_path / "x.tar", {str(one): as_files(text_document("plain words")) for one in range(4)})
    write_index(tar)
    ensure_lengths([tar], tokenizer, RULES)
    path = index_path(tar)
    content = path.read_bytes()
    assert content.count(b'num_samples\\":4') == 1
    for number in (b"6", b"2"):
        path.write_bytes(content.replace(b'num_samples\\":4', b'num_samples\\":' + number))
        with pytest.raises(DataError, match=r"x\.tar: [26] samples in its index, 4 planned lengths"):
            open_dataset("x", Dataset("x.tar"), Data(root=str(tmp_path)), tokenizer=tokenizer, rules=RULES)


def test_other_settings_are_other_files(tokenizer):
    rules = [
        RULES,
        replace(RULES, limits=Limits(pixels=1)),
        replace(RULES, image=replace(RULES.image, max_patches=9)),
        replace(RULES, audio=None),
    ]
    assert len({lengths_key(tokenizer, one) for one in rules}) == 4


def test_large_datasets_map_one_joined_file(corpus, tmp_path, tokenizer, open_plan, monkeypatch):
    root = shutil.copytree(corpus, tmp_path / "corpus")
    batch = replace(BATCH, global_rows=30)
    whole = open_plan(root, batch=batch)
    expected = [row.samples for row in whole.next_step(whole.start()).rows]
    monkeypatch.setattr("megamm.data.samples.lengths.IN_MEMORY_SAMPLES", 20)
    with pytest.raises(DataError, match=r"lengths-\w+\.npy is missing; run `megamm data plan-lengths`"):
        open_plan(root)
    for name in ("digits", "words", "text"):
        assert ensure_lengths(sorted(root.glob(f"{name}/*.tar")), tokenizer, RULES) == []
    mapped = open_plan(root, batch=batch)
    assert mapped.fingerprint == whole.fingerprint
    assert [row.samples for row in mapped.next_step(mapped.start()).rows] == expected
    (joined,) = root.glob("digits/lengths-*.npy")
    joined.write_bytes(joined.read_bytes()[:-4])
    with pytest.raises(DataError, match="is damaged"):
        open_plan(root)


def test_damage_of_the_joined_file_is_an_error_or_is_noticed_by_every_sample(corpus, tmp_path, tokenizer, open_plan, monkeypatch):
    root = shutil.copytree(corpus, tmp_path / "corpus")
    monkeypatch.setattr("megamm.data.samples.lengths.IN_MEMORY_SAMPLES", 0)
    for name in ("digits", "words", "text"):
        ensure_lengths(sorted(root.glob(f"{name}/*.tar")), tokenizer, RULES)
    path = next(root.glob("text/lengths-*.npy"))
    content = path.read_bytes()
    for place in range(10, 60):
        path.write_bytes(content[:place] + b"(" + content[place + 1 :])
        with pytest.raises(DataError, match=r"lengths-\w+\.npy"):
            open_plan(root)
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"lengths-\w+\.npy"):
            open_plan(root)
    path.write_bytes(content[:128] + bytes(len(content) - 128))
    with pytest.raises(DataError, match="has no planned length"):
        open_plan(root).datasets["text"].problem(0)
