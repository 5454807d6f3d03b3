"""From shards to model-ready batches: samples a processor second, against other loaders doing the same with public parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.corpus import Corpus
from benchmarks.peer_decode import Batches
from benchmarks.peers import NUM_WORKERS, samples
from benchmarks.race import CHECKOUT, Contestant, Turn, race
from benchmarks.results import Row, measured
from megamm.core.types import TokenSequence
from megamm.data.loading.source import SampleSource
from megamm.data.planning.rows import PlannedSample
from megamm.data.samples.encode import SampleEncoder
from megamm.data.shards.reader import LocalReader

GOAL = ">= 2"
NOT_INSTALLED = "not installed"
OPTIONAL = {"litdata": "litdata", "mosaic": "mosaicml-streaming"}
"""Contestant -> package. They run under the Python that `MEGAMM_PEERS` names, where it has them."""
PEERS = {
    "webdataset": "webdataset WebLoader",
    "litdata": "litdata StreamingDataLoader",
    "mosaic": "MosaicML StreamingDataset under torch's DataLoader",
}
# A decoder of another library may round a pixel (2 / 255 a level) the other way; sums of a spectrum differ in their order.
TOLERANCES = {"input_ids": 0, "labels": 0, "pixels": 2.1 / 255, "mel": 1e-4}


def peer_versions() -> dict[str, str]:
    """Package -> version of the optional contestants, as the interpreter that runs them has them."""
    program = "import json, sys; from benchmarks.results import installed_versions; print(json.dumps(installed_versions(sys.argv[1:])))"
    command = [_peer_python(), "-c", program, *OPTIONAL.values()]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=CHECKOUT).stdout)


def decoding_rows(corpus: Corpus, *, num_rounds: int, versions: Mapping[str, str]) -> list[Row]:
    """Race all loaders that are installed; a turn is one pass over the corpus.

    Args:
        corpus: What to decode.
        num_rounds: Turns of each.
        versions: From `peer_versions`.
    """
    check_equal(corpus)
    names = [
        "megamm",
        "megamm-processes",
        "webdataset",
        *(name for name, package in OPTIONAL.items() if versions[package] != NOT_INSTALLED),
    ]
    with ExitStack() as stack:
        contestants = [
            stack.enter_context(Contestant(name, corpus.folder, python=_peer_python() if name in OPTIONAL else sys.executable))
            for name in names
        ]
        turns = race(contestants, num_rounds=num_rounds, num_samples=corpus.num_samples)
    _check_work(turns)
    ours = [turn.cpu_ms for turn in turns["megamm"]]
    rows = [
        _cost("megamm", ours, f"StepLoader, {NUM_WORKERS} threads; {corpus.origin}"),
        _cost("megamm-processes", [turn.cpu_ms for turn in turns["megamm-processes"]], f"StepLoader, {NUM_WORKERS} processes"),
    ]
    for name, label in PEERS.items():
        if name not in turns:
            rows.append(Row(f"full decode: {name}", NOT_INSTALLED, peer=f"{label}; see docs/benchmarks.md"))
            continue
        theirs = [turn.cpu_ms for turn in turns[name]]
        ratios = [peer / own for peer, own in zip(theirs, ours, strict=True)]
        goal = GOAL if name == "webdataset" else ""
        rows += [
            _cost(name, theirs, f"{label}, {NUM_WORKERS} worker processes"),
            measured(f"full decode: megamm / {name}, samples a CPU second", ratios, "×", goal=goal, peer=label),
        ]
    return rows


def _cost(name: str, cpu_ms: list[float], peer: str) -> Row:
    return measured(f"full decode: {name}", cpu_ms, "CPU ms a sample", peer=peer)


def check_equal(corpus: Corpus, num_samples: int = 8) -> None:
    """See that the peers' decoder gives what ours gives, so that both do the same work.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    batch = Batches(corpus.folder / "tokenizer")(list(islice(samples(corpus.tars), num_samples)))
    for number, own in enumerate(_decoded(corpus, num_samples)):
        length = len(own.input_ids)
        pixels, mel = own.images[0].pixels, own.audios[0].mel
        pairs = {
            "input_ids": (batch["input_ids"][number, :length], own.input_ids),
            "labels": (batch["labels"][number, :length], own.labels),
            "pixels": (batch["pixel_values"][number, : len(pixels)], pixels),
            "mel": (batch["input_features"][number, :, : mel.shape[1]], mel),
        }
        for name, (theirs, ours) in pairs.items():
            difference = np.abs(theirs.numpy() - ours).max()
            assert difference <= TOLERANCES[name], f"{own.key}: {name} of the two decoders differ by {difference}"
        counted = [int(batch[name][number].sum()) for name in ("attention_mask", "pixel_attention_mask", "input_features_mask")]
        assert counted == [length, len(pixels), mel.shape[1]], f"{own.key}: {counted} tokens, patches and frames"


def _decoded(corpus: Corpus, num_samples: int) -> list[TokenSequence]:
    """The first samples of the corpus as the loader's decoders make them."""
    plan = corpus.plan()
    ((name, dataset),) = plan.datasets.items()
    source = SampleSource(plan.datasets, SampleEncoder(plan.tokenizer, plan.rules), LocalReader())
    decoded = []
    for number in range(num_samples):
        tokens, patches, frames = dataset.lengths[number].reshape(-1).tolist()
        one = source.load(PlannedSample(0, name, number, 0, tokens, patches, frames))
        assert isinstance(one, TokenSequence), f"sample {number} was skipped: {one}"
        decoded.append(one)
    source.close()
    return decoded


def _check_work(turns: Mapping[str, list[Turn]]) -> None:
    """All contestants must have delivered alike samples: equal tokens, patches and frames a sample, up to which samples they were."""
    work = {name: _a_sample(its) for name, its in turns.items()}
    for name, counts in work.items():
        for one, other in zip(counts, work["megamm"], strict=True):
            assert abs(one / other - 1) < 0.05, f"{name} delivered {counts} tokens, patches and frames a sample, megamm {work['megamm']}"


def _a_sample(turns: list[Turn]) -> list[float]:
    total = {name: sum(turn.delivered[name] for turn in turns) for name in turns[0].delivered}
    return [total[name] / total["samples"] for name in ("tokens", "patches", "frames")]


def _peer_python() -> str:
    """Absolute, because contestants start in the checkout; not resolved, because a virtual environment's Python is a link."""
    return str(Path(os.environ.get("MEGAMM_PEERS", sys.executable)).absolute())
