"""Training from remote shards is training from local ones: the same steps, the same samples, whatever the network does."""

from __future__ import annotations

import random
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from webdataset import WebDataset

from megamm.cli import main
from megamm.config import Data, Dataset, Reading
from megamm.core.errors import DataError
from megamm.data.loading.loader import StepLoader
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.lengths import ensure_lengths
from megamm.data.shards.index import index_path, load_index
from megamm.data.shards.remote import open_reader
from tests.data.conftest import BATCH, MODEL
from tests.data.loading.test_loader import documents_of
from tests.support.http_server import BODY_FAULTS, FileServer
from tests.support.s3_server import s3_server, upload

NUM_STEPS = 8
RANGES = {"digits": "digits/train-{00000..00002}.tar", "words": "words/train-{00000..00001}.tar", "text": "text/train-{00000..00006}.tar"}
GLOBS = {name: f"{name}/train-*.tar" for name in RANGES}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("megamm.data.shards.fetching._FIRST_DELAY_SECONDS", 0.01)


@pytest.fixture(scope="module")
def served(corpus, tmp_path_factory) -> Path:
    """The corpus as somebody publishes it: shards and indexes, no lengths."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(corpus, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lengths-*"))
    return folder


def data_of(root: Path, base: str, names: dict[str, str], **reading) -> Data:
    weights = {"digits": 3.0, "words": 1.0, "text": 2.0}
    train = {name: Dataset(f"{base}{pattern}", weights[name]) for name, pattern in names.items()}
    settings = {"block_bytes": 4096, "read_ahead_blocks": 2, "buffer_bytes": 1 << 20, "timeout_seconds": 5.0, "retries": 5} | reading
    return Data(
        root=str(root), train=train, window=32, row_patches=48, row_frames=400, prefetch_steps=2, max_skipped_share=0.0, decode_workers=2,
        reading=Reading(**settings),
    )  # fmt: skip


def steps_of(data: Data, tokenizer) -> list:
    """Keys and documents of the first steps, after planning lengths as a run does."""
    rules, reader = MediaRules.of(MODEL, data), open_reader(data.reading)
    for name, dataset in data.train.items():
        ensure_lengths(find_shards(name, dataset, Path(data.root), reading=data.reading), tokenizer, rules, reader=reader)
    reader.close()
    plan = DataPlan.open(data, BATCH, model=MODEL, tokenizer=tokenizer, seed=5)
    with StepLoader(plan) as loader:
        steps = [next(loader) for _ in range(NUM_STEPS)]
        assert not any(step.skipped for step in steps)
        documents = [sorted(document for batch in step.micro_batches for document in documents_of(batch)) for step in steps]
        return [(step.keys, found, step.state.plan) for step, found in zip(steps, documents, strict=True)]


@pytest.fixture(scope="module")
def local(corpus, tokenizer):
    return steps_of(data_of(corpus, "", GLOBS), tokenizer)


def test_local_ranges_and_globs_are_one_plan(corpus, tokenizer, local):
    assert steps_of(data_of(corpus, "", RANGES), tokenizer) == local


def test_steps_over_http_are_those_of_local_files(served, tmp_path, tokenizer, local):
    with FileServer(served) as server:
        assert steps_of(data_of(tmp_path, f"{server.url}/", RANGES), tokenizer) == local
        assert server.num_gets(".tar.index") == 12 * 2
        server.requests.clear()
        assert steps_of(data_of(tmp_path, f"{server.url}/", RANGES, cache_folder=str(tmp_path / "cache")), tokenizer) == local
        assert not server.num_gets(".tar.index")
        num_bytes = sum(end - start for _, start, end in server.requests)
        server.requests.clear()
        assert steps_of(data_of(tmp_path, f"{server.url}/", RANGES, cache_folder=str(tmp_path / "cache")), tokenizer) == local
        # The blocks are on the disk: what is left is asking each shard's size, and what one run reads further ahead than another.
        assert sum(end - start for _, start, end in server.requests) < num_bytes / 4


def test_signed_urls_are_read(served, tmp_path, corpus):
    with FileServer(served) as server:
        signed = Dataset(f"{server.url}/digits/train-{{00000..00002}}.tar?sig=SECRET")
        shards = find_shards("digits", signed, tmp_path)
        assert [shard.name for shard in shards] == sorted(path.name for path in corpus.glob("digits/*.tar"))
        with closing(open_reader(Reading())) as reader:
            assert reader.read(shards[1], 512, 1024) == (corpus / "digits/train-00001.tar").read_bytes()[512:1536]


def test_decoder_processes_read_over_http(served, tmp_path, tokenizer, local):
    with FileServer(served) as server:
        data = replace(data_of(tmp_path, f"{server.url}/", RANGES), decoders="processes")
        assert steps_of(data, tokenizer) == local


def test_steps_over_s3_are_those_of_local_files(served, tmp_path, tokenizer, local, monkeypatch):
    with s3_server(monkeypatch) as url:
        upload(served)
        assert steps_of(data_of(tmp_path, f"{url}/", GLOBS), tokenizer) == local
        assert steps_of(data_of(tmp_path, f"{url}/", RANGES), tokenizer) == local


def test_faults_change_nothing(served, tmp_path, tokenizer, local):
    rng = random.Random(0)
    with FileServer(served) as server:
        data = data_of(tmp_path, f"{server.url}/", RANGES, timeout_seconds=0.3, retries=8)
        for _ in range(40):
            server.inject(
                rng.choice(["500", "503", "429", "ignore_range", "other_range", "half_said", *BODY_FAULTS]),
                1,
                rng.choice(["digits", "words", "text"]),
            )
        assert steps_of(data, tokenizer) == local
        assert not any(fault.times for fault in server._faults)


@pytest.mark.parametrize("kind", ["404", "403", "416", "500", "stall"])
def test_a_server_that_keeps_failing_ends_the_run(served, tmp_path, tokenizer, kind):
    with FileServer(served) as server:
        data = data_of(tmp_path, f"{server.url}/", RANGES, timeout_seconds=0.1, retries=1)
        steps_of(data, tokenizer)
        plan = DataPlan.open(data, BATCH, model=MODEL, tokenizer=tokenizer, seed=5)
        server.inject(kind, 10**6, "digits")
        with StepLoader(plan) as loader, pytest.raises(DataError, match=r"shard http://127\.0\.0\.1:\d+/digits/train-\d+\.tar"):
            while True:
                next(loader)


def test_a_shard_that_was_replaced_ends_the_run_and_is_never_skipped(served, tmp_path, tokenizer):
    folder = tmp_path / "served"
    shutil.copytree(served, folder)
    with FileServer(folder) as server:
        data = data_of(tmp_path, f"{server.url}/", RANGES)
        steps_of(data, tokenizer)
        plan = DataPlan.open(data, BATCH, model=MODEL, tokenizer=tokenizer, seed=5)
        for tar in folder.glob("text/*.tar"):
            tar.write_bytes(tar.read_bytes()[:-1024])
        with StepLoader(plan) as loader, pytest.raises(DataError, match=r"text/train-\d+\.tar changed since it was indexed"):
            while True:
                assert not next(loader).skipped


def test_missing_and_wrong_indexes_are_told(served, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(served, folder)
    with FileServer(folder) as server:
        dataset, reading = Dataset(f"{server.url}/text/train-{{00000..00001}}.tar"), Reading(timeout_seconds=5.0)

        def find(message: str) -> None:
            with pytest.raises(DataError, match=message):
                find_shards("text", dataset, tmp_path, reading=reading)
            assert not list((tmp_path / "sidecars").glob("*/train-00001*"))

        index = folder / "text/train-00001.tar.index"
        good = index.read_bytes()
        index.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        find(r"train-00001\.tar\.index beside it is damaged")
        index.write_bytes((folder / "digits/train-00001.tar.index").read_bytes())
        find(r"train-00001\.tar changed since it was indexed: \d+ bytes, indexed \d+")
        index.unlink()
        find(r"there is no train-00001\.tar\.index beside it; run `megamm data index http")
        (folder / "text/train-00001.tar").unlink()
        find(r"train-00001\.tar does not exist")


def test_the_command_line_indexes_and_verifies_urls(served, tmp_path, capsys):
    folder = tmp_path / "served"
    shutil.copytree(served, folder, ignore=shutil.ignore_patterns("*.index"))
    with FileServer(folder) as server:
        words = ["--sidecars", str(tmp_path / "sidecars")]
        url = f"{server.url}/digits/train-{{00000..00002}}.tar"
        main(["data", "index", url, *words])
        assert capsys.readouterr().out.count("17 samples") == 3
        (shard, *_) = find_shards("digits", Dataset(url), tmp_path)
        assert index_path(shard).read_bytes() == (served / "digits/train-00000.tar.index").read_bytes()
        assert load_index(shard).num_samples == 17
        main(["data", "verify", url, *words])
        assert "digest" in capsys.readouterr().out
        tar = folder / "digits/train-00002.tar"
        raw = bytearray(tar.read_bytes())
        raw[2000] ^= 1
        tar.write_bytes(raw)
        assert main(["data", "verify", url, *words])
        assert "train-00002.tar changed since it was indexed: digest" in capsys.readouterr().err


def test_an_object_store_shard_that_went_missing_is_told(served, tmp_path, monkeypatch):
    with s3_server(monkeypatch) as url:
        upload(served / "text", "*-00000*")
        upload(served / "text", "*-00001.tar.index")
        with pytest.raises(DataError, match=r"s3://corpus/train-00001\.tar does not exist, but its index does"):
            find_shards("text", Dataset(f"{url}/train-*.tar"), tmp_path, reading=Reading())


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")
def test_webdataset_reads_the_same_urls(served, corpus):
    with FileServer(served) as server:
        url = f"{server.url}/text/train-{{00000..00006}}.tar"
        theirs = [sample["__key__"] for sample in WebDataset(url, shardshuffle=False)]
    ours = [
        index.key(number) for tar in sorted(corpus.glob("text/*.tar")) for index in [load_index(tar)] for number in range(index.num_samples)
    ]
    assert theirs == ours
