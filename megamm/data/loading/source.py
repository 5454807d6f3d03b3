"""From a planned sample to its token sequence, or to the reason why it is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megamm.config import Augment
from megamm.core.types import Sample, TokenSequence
from megamm.data.ledger import BadSample, Skipped
from megamm.data.media.augment import Changes
from megamm.data.media.features import Footprint
from megamm.data.planning.rows import PlannedSample
from megamm.data.samples.datasets import ShardSet
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.hidden import masking_random
from megamm.data.samples.mapping import read_sample
from megamm.data.shards.reader import Reader, ShardPool


class Progress(Protocol):
    """Told what is being done with a sample, so that somebody else can see what does not end."""

    def reading(self, offset: int) -> None:
        """Bytes from `offset` of its shard on are being read; -1 for the shard's index."""
        ...

    def decoding(self) -> None:
        """Its bytes are there and are being decoded."""
        ...


class Unwatched:
    """Progress that nobody looks at."""

    def reading(self, offset: int) -> None:
        """See `Progress`."""

    def decoding(self) -> None:
        """See `Progress`."""


UNWATCHED = Unwatched()


@dataclass(frozen=True, slots=True)
class SampleName:
    """A sample in a rank's part of a step, for people.

    Attributes:
        dataset: Name of its dataset.
        shard: File name of its shard.
        key: Its key; `sample 17` where the shard's index is not open.
        micro_step: Of this rank, from 0.
        row: Of the micro-step, from 0.
    """

    dataset: str
    shard: str
    key: str
    micro_step: int
    row: int


class SampleSource:
    """Reads, checks, decodes and encodes samples. Used from many threads; keeps no state besides open files and maps.

    Attributes:
        datasets: By name.
        encoder: How samples become sequences.
        augment: Dataset name -> random changes of its samples; empty for none.
        seed: Of these changes.
    """

    def __init__(
        self,
        datasets: Mapping[str, ShardSet],
        encoder: SampleEncoder,
        reader: Reader,
        *,
        augment: Mapping[str, Augment] | None = None,
        seed: int = 0,
    ) -> None:
        self.datasets, self.encoder = datasets, encoder
        self._augment, self._seed = augment or {}, seed
        self._pool = ShardPool(reader)

    def key(self, planned: PlannedSample) -> str:
        """`dataset/key` of a sample."""
        tar, number = self.datasets[planned.dataset].locate(planned.index)
        return f"{planned.dataset}/{self._pool.shard(tar).index.key(number)}"

    def name(self, planned: PlannedSample, micro_step: int, row: int) -> SampleName:
        """A sample at its place in a step. Opens no shard, so that it answers even where storage stands still."""
        tar, number = self.datasets[planned.dataset].locate(planned.index)
        shard = self._pool.opened(tar)
        return SampleName(planned.dataset, tar.name, shard.index.key(number) if shard else f"sample {number}", micro_step, row)

    def load(self, planned: PlannedSample, progress: Progress = UNWATCHED) -> TokenSequence | Skipped:
        """The sequence of a sample, exactly as long as it was planned, or the ledger's entry for it.

        Args:
            planned: The sample.
            progress: Told what is being done.

        Raises:
            DataError: The shard cannot be read: no reason to skip a sample, but to stop.
        """
        try:
            sample = self.read(planned, progress)
            progress.decoding()
            augment = self._augment.get(planned.dataset)
            changes = None if augment is None else Changes.at(augment, self._seed, planned.position)
            speed = 1.0 if augment is None else augment.audio_speeds[planned.variant]
            random = masking_random(self._seed, planned.position)
            sequence, size = self.encoder.encode(planned.dataset, sample, changes, speed=speed, random=random)
            expected = Footprint(planned.tokens, planned.patches, planned.frames)
            if size != expected:
                raise BadSample(f"takes {size}, planned {expected}; its media do not hold what their headers say")
            return sequence
        except BadSample as error:
            return self.skipped(planned, str(error))

    def read(self, planned: PlannedSample, progress: Progress = UNWATCHED) -> Sample:
        """A sample with its media, as the shard holds it.

        Args:
            planned: The sample.
            progress: Told what is being read.

        Raises:
            BadSample: Its bytes changed, or its document is not a sample.
            DataError: The shard cannot be read.
        """
        tar, number = self.datasets[planned.dataset].locate(planned.index)
        progress.reading(-1)
        shard = self._pool.shard(tar)
        progress.reading(shard.index.members(number)[0].offset)
        return read_sample(shard, number, self.datasets[planned.dataset].form)

    def skipped(self, planned: PlannedSample, reason: str) -> Skipped:
        """The ledger's entry for a sample."""
        tar, _ = self.datasets[planned.dataset].locate(planned.index)
        return Skipped(planned.position, planned.dataset, tar.name, self.key(planned).removeprefix(f"{planned.dataset}/"), reason)

    def close(self) -> None:
        """Release files and maps."""
        self._pool.close()
