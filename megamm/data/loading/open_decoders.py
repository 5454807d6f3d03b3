"""The decoders that a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from megamm.config import Augment, Data
from megamm.data.loading.arena import SampleBytes
from megamm.data.loading.decoder_processes import ProcessDecoders
from megamm.data.loading.decoder_worker import WorkerSpec
from megamm.data.loading.decoders import Decoders, Patience, ThreadDecoders
from megamm.data.loading.source import SampleSource
from megamm.data.samples.datasets import ShardSet
from megamm.data.samples.encode import SampleEncoder
from megamm.data.shards.reader import Reader

_READ_SECONDS = 60.0
_ARENA_PARTS = 4


def open_decoders(
    data: Data,
    datasets: Mapping[str, ShardSet],
    encoder: SampleEncoder,
    *,
    augment: Mapping[str, Augment] | None = None,
    seed: int = 0,
    reader: Reader | None = None,
    kind: str | None = None,
    num_workers: int | None = None,
) -> tuple[SampleSource, Decoders]:
    """Start decoders, and open a source in this process that knows what they read.

    Args:
        data: The recipe's settings.
        datasets: By name.
        encoder: How samples become sequences.
        augment: Dataset name -> random changes of its samples; None for none.
        seed: Of these changes.
        reader: Where bytes come from; what `data.reading` says by default.
        kind: In place of `data.decoders`.
        num_workers: In place of `data.decode_workers`.

    Raises:
        ConfigError: Processes were asked for where there cannot be any.
    """
    # Planned lengths may be larger than memory, and decoding does not need them.
    light = {
        name: replace(dataset, lengths=np.empty((0, *dataset.lengths.shape[1:]), dtype=np.int32)) for name, dataset in datasets.items()
    }
    spec = WorkerSpec(light, encoder, data.reading, reader, augment or {}, seed)
    source, num_workers = spec.open(), num_workers or data.decode_workers
    patience = patience_of(data)
    if (kind or data.decoders) == "threads":
        return source, ThreadDecoders(source, num_workers, patience)
    # The rest is for batches; rows become part of one soon after they were decoded.
    arena_bytes = data.prefetch_bytes // _ARENA_PARTS
    return source, ProcessDecoders(source, spec, num_workers, patience, arena_bytes=arena_bytes, sizes=SampleBytes.of(encoder.rules))


def patience_of(data: Data) -> Patience:
    """How long decoding and reading may take.

    Remote reads have limits of their own and end by themselves, with the retries that they are allowed; what is still reading
    long after that (or a local file system that does not answer) has stalled.
    """
    retried = 2 * (1 + data.reading.retries) * data.reading.timeout_seconds
    return Patience(decode_seconds=data.decode_timeout_seconds, read_seconds=_READ_SECONDS + retried)
