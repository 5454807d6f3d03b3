"""The data layer against its goals and its peers, in one run: `python -m benchmarks.data [--quick]`.

What is compared is taken in turns within this run; a row is the median of the turns with their quartiles. `docs/benchmarks.md` says what
each row means and how the peers are set up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bounds import bounds_rows
from benchmarks.bytes_only import bytes_only_rows
from benchmarks.corpus import make_corpus
from benchmarks.decoding import decoding_rows, peer_versions
from benchmarks.planning import planning_rows
from benchmarks.results import Row, write
from benchmarks.scale import scale_rows
from benchmarks.step_time import make_tiny, step_time_rows

COMMAND = "python -m benchmarks.data"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        num_shards: Shards of the corpus.
        samples_a_shard: Samples of each.
        read_rounds: Turns of each reader, bytes only.
        decode_rounds: Turns of each loader, full decode.
        plan_rounds: Plans.
        plan_steps: Steps of each.
        large_shards: Shards that are opened at once.
        bound_steps: Steps of the slow consumer.
        tiny_blocks: Blocks of training steps of each kind.
        tiny_steps: Steps of a block.
        tiny_sounds: Whether `tiny` trains on its speech too, which takes longest to prepare.
    """

    num_shards: int = 8
    samples_a_shard: int = 64
    read_rounds: int = 21
    decode_rounds: int = 7
    plan_rounds: int = 9
    plan_steps: int = 24
    large_shards: int = 10_000
    bound_steps: int = 40
    tiny_blocks: int = 9
    tiny_steps: int = 20
    tiny_sounds: bool = True


FULL = Effort()
QUICK = Effort(
    num_shards=2,
    samples_a_shard=32,
    read_rounds=5,
    decode_rounds=2,
    plan_rounds=2,
    plan_steps=6,
    large_shards=1_000,
    bound_steps=8,
    tiny_blocks=2,
    tiny_steps=4,
    tiny_sounds=False,
)


def main() -> int:
    """Measure everything, write the result and print it; 1 where a goal is missed (a quick run misses none)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same rows from little data in a minute; written beside the result")
    quick = parser.parse_args().quick
    versions = peer_versions()
    rows = measure(QUICK if quick else FULL, versions)
    path = write("data", f"{COMMAND} --quick" if quick else COMMAND, rows, versions=versions, quick=quick)
    print(path.with_suffix(".md").read_text())
    return int(not quick and any(row.holds is False for row in rows))


def measure(effort: Effort, versions: dict[str, str]) -> list[Row]:
    """All rows; what is being measured is told on standard error."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "samples").mkdir()
        with _told("corpus"):
            corpus = make_corpus(root / "samples", num_shards=effort.num_shards, samples_a_shard=effort.samples_a_shard)
        with _told("bytes only"):
            rows += bytes_only_rows(corpus, num_rounds=effort.read_rounds)
        with _told("full decode"):
            rows += decoding_rows(corpus, num_rounds=effort.decode_rounds, versions=versions)
        with _told("planning"):
            rows += planning_rows(num_rounds=effort.plan_rounds, num_steps=effort.plan_steps)
        with _told("a billion samples"):
            rows += scale_rows(num_shards=effort.large_shards)
        with _told("bounds"):
            rows += bounds_rows(corpus, num_steps=effort.bound_steps)
        with _told("step time"):
            tiny = make_tiny(root, with_sounds=effort.tiny_sounds)
            rows += step_time_rows(tiny, num_blocks=effort.tiny_blocks, block_steps=effort.tiny_steps)
    return rows


@contextmanager
def _told(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
