"""One contestant of the decoding race, in a process of its own: reads a number of samples a line, answers when they are there.

`python -m benchmarks.peers NAME FOLDER` is started by `benchmarks.race`; every contestant delivers the same samples ready for the
model: patches of pictures, log-mel of sounds, token ids with labels. Two threads or worker processes each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

NUM_WORKERS = 2
BATCH_SAMPLES = 24
PREFETCH_BATCHES = 4
SHUFFLE_BUFFER_SAMPLES = 128


@dataclass
class Delivered:
    """What arrived, so that contestants can be held to the same work."""

    samples: int = 0
    tokens: int = 0
    patches: int = 0
    frames: int = 0

    def add(self, other: Delivered) -> None:
        """Count another batch."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def megamm_batches(folder: Path, *, decoders: str = "threads") -> Generator[Delivered]:
    """Our loader in its default order."""
    from benchmarks.corpus import Corpus
    from megamm.data.loading.loader import StepLoader

    plan = Corpus(folder, "", 0).plan(decoders=decoders, decode_workers=NUM_WORKERS)
    with StepLoader(plan) as loader:
        for step in loader:
            assert not step.skipped, f"{step.skipped[0]} was skipped"
            delivered = Delivered(step.num_samples)
            for batch in step.micro_batches:
                delivered.tokens += batch.num_tokens
                delivered.patches += int(batch.pixel_mask.sum())
                delivered.frames += int(batch.mel_mask.sum())
            yield delivered


def webdataset_batches(folder: Path) -> Generator[Delivered]:
    """The pipeline of webdataset's documentation: batches are made in the workers, WebLoader around it."""
    import webdataset

    from benchmarks.peer_decode import Batches

    urls = [str(tar) for tar in sorted(folder.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).repeat().shuffle(SHUFFLE_BUFFER_SAMPLES)
    dataset = dataset.map(_with_json).batched(BATCH_SAMPLES, collation_fn=Batches(folder / "tokenizer"))
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=NUM_WORKERS, prefetch_factor=PREFETCH_BATCHES)
    yield from map(_delivered, loader)


def _with_json(sample: dict[str, Any]) -> dict[str, bytes]:
    return {"json": sample["json"], "jpg": sample["0.jpg"], "flac": sample["1.flac"]}


def litdata_batches(folder: Path) -> Generator[Delivered]:
    """litdata's optimized chunks and its own loader."""
    import litdata

    from benchmarks.peer_decode import Batches

    output = folder / "litdata"
    tars = list(map(str, sorted(folder.glob("train-*.tar"))))
    litdata.optimize(fn=_litdata_samples, inputs=tars, output_dir=str(output), num_workers=1, chunk_bytes="64MB")

    loader = litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(output), shuffle=True, drop_last=False, seed=0),
        batch_size=BATCH_SAMPLES,
        num_workers=NUM_WORKERS,
        collate_fn=Batches(folder / "tokenizer"),
        prefetch_factor=PREFETCH_BATCHES,
        persistent_workers=True,
    )
    while True:
        yield from map(_delivered, loader)


def _litdata_samples(tar: str) -> Iterator[dict[str, bytes]]:
    # litdata asks for a generator function, not for one that returns an iterator.
    yield from samples([tar])


def mosaic_batches(folder: Path) -> Generator[Delivered]:
    """MosaicML streaming's MDS shards under torch's DataLoader."""
    from benchmarks.peer_decode import Batches, define_torchvision_operators

    define_torchvision_operators()
    import streaming
    from torch.utils.data import DataLoader

    output = folder / "mosaic"
    with streaming.MDSWriter(out=str(output), columns={"json": "bytes", "jpg": "bytes", "flac": "bytes"}, size_limit="64mb") as writer:
        for sample in samples(sorted(folder.glob("train-*.tar"))):
            writer.write(sample)

    loader = DataLoader(
        streaming.StreamingDataset(local=str(output), shuffle=True, batch_size=BATCH_SAMPLES, shuffle_seed=0),
        batch_size=BATCH_SAMPLES,
        num_workers=NUM_WORKERS,
        collate_fn=Batches(folder / "tokenizer"),
        prefetch_factor=PREFETCH_BATCHES,
        persistent_workers=True,
    )
    try:
        while True:
            yield from map(_delivered, loader)
    finally:
        # It shares state between processes through named memory, which stays behind when they end.
        streaming.base.util.clean_stale_shared_memory()


def samples(tars: Sequence[Path | str]) -> Iterator[dict[str, bytes]]:
    """The samples of shards as every peer gets them."""
    import webdataset

    return map(_with_json, webdataset.WebDataset(list(map(str, tars)), shardshuffle=False))


def _delivered(batch: dict[str, Any]) -> Delivered:
    masks = (batch[name] for name in ("attention_mask", "pixel_attention_mask", "input_features_mask"))
    return Delivered(len(batch["input_ids"]), *(int(mask.sum()) for mask in masks))


CONTESTANTS: dict[str, Callable[[Path], Generator[Delivered]]] = {
    "megamm": megamm_batches,
    "megamm-processes": partial(megamm_batches, decoders="processes"),
    "webdataset": webdataset_batches,
    "litdata": litdata_batches,
    "mosaic": mosaic_batches,
}


def main() -> None:
    """Answer each number on standard input with what was delivered; libraries may print, so the answers keep their own descriptor."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    batches = CONTESTANTS[sys.argv[1]](Path(sys.argv[2]))
    next(batches)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        delivered = Delivered()
        while delivered.samples < int(line):
            delivered.add(next(batches))
        print(json.dumps(asdict(delivered)), file=answers, flush=True)
    batches.close()
    # Worker processes of some libraries outlive an orderly exit.
    os._exit(0)


if __name__ == "__main__":
    main()
