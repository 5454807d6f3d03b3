"""The table of fault classes: what is tried, and how much of it a quick run tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import archive, disk, names, pictures, reading, serving, sidecars, sounds, texts, workers
from benchmarks.faults.case import Case


@dataclass(frozen=True)
class Fault:
    """One class.

    Attributes:
        name: In the table.
        cases: Makes the cases; receives the path of the canary, a file that only code out of the data would make.
        every: A quick run tries each so-manieth case; 0 leaves the class out.
        peer: False where webdataset has nothing that could be damaged.
    """

    name: str
    cases: Callable[[Path], Iterator[Case]]
    every: int = 1
    peer: bool = True


FAULTS = (
    Fault("tar cut at every offset, before indexing", archive.cut_before, every=211),
    Fault("tar cut at every offset, after indexing", archive.cut_after, every=211),
    Fault("tar cut or gone while read", archive.cut_while_read),
    Fault("every header bit, before indexing", archive.header_bits_before, every=307),
    Fault("every header bit, after indexing", archive.header_bits_after, every=307),
    Fault("payload bits, before indexing", archive.payload_bits_before, every=103),
    Fault("every payload bit, after indexing", archive.payload_bits_after, every=307),
    Fault("holes of zeros, before indexing", archive.holes_before, every=5),
    Fault("holes of zeros, after indexing", archive.holes_after, every=5),
    Fault("noise, lost and repeated blocks", archive.garbage),
    Fault("same-size replacement after indexing", archive.replaced),
    Fault("duplicate, split and missing members", names.keys),
    Fault("names that readers split in their own way", names.spellings),
    Fault("`..`, absolute and unprintable names", names.paths),
    Fault("links, devices, pipes, folders", names.kinds),
    Fault("long names (GNU, PAX)", names.long_names),
    Fault("absurd sizes in headers", names.sizes),
    Fault("index: every cut", sidecars.index_cuts, every=43, peer=False),
    Fault("index: bits of every byte", sidecars.index_bits, every=101, peer=False),
    Fault("index: swapped, stale, missing", sidecars.index_swaps, peer=False),
    Fault("lengths: every cut", sidecars.lengths_cuts, every=43, peer=False),
    Fault("lengths: bits of every byte", sidecars.lengths_bits, every=101, peer=False),
    Fault("lengths: swapped, stale, missing", sidecars.lengths_swaps, peer=False),
    Fault("joined lengths: bits and cuts", sidecars.joined_lengths, every=17, peer=False),
    Fault("catalogue: damaged, stale", sidecars.catalogues, every=4, peer=False),
    Fault("pictures: odd but whole", pictures.odd_pictures),
    Fault("pictures: cut, empty, beyond limits", pictures.broken_pictures),
    Fault("pictures: bombs", pictures.picture_bombs, every=5),
    Fault("sounds: odd but whole", sounds.odd_sounds),
    Fault("sounds: empty, NaN, cut, too long", sounds.useless_sounds),
    Fault("sounds: wrong rates and lengths", sounds.stated_sounds),
    Fault("sounds: bombs", sounds.sound_bombs, every=0),
    Fault("documents: not UTF-8, not JSON, deep", texts.broken_documents),
    Fault("documents: 100 MB", texts.large_documents, every=3),
    Fault("compressed members and shards", texts.compressed_members, every=3),
    Fault("pickles", texts.pickles),
    Fault("`pipe:` and names like commands", texts.commands),
    Fault("I/O errors, once", reading.errors_once),
    Fault("I/O errors, always", reading.errors_always, every=0),
    Fault("short reads", reading.short_reads),
    Fault("wrong bytes", reading.wrong_reads),
    Fault("web server: errors once", serving.errors_once, every=4),
    Fault("web server: errors always", serving.errors_always, every=4),
    Fault("web server: lies", serving.lies, every=3),
    Fault("disk full: index and lengths", disk.sidecars, every=4, peer=False),
    Fault("disk full: new shard", disk.shards, every=4, peer=False),
    Fault("disk full: cache", disk.cache, every=2, peer=False),
    Fault("decoder process killed", workers.killed, every=4, peer=False),
    Fault("decoder process stopped", workers.stopped, every=0, peer=False),
    Fault("a stall of 2 s", reading.short_stall, every=0),
    Fault("a stall of 60 s", reading.long_stall, every=0),
)
