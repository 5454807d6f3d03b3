"""Labelled samples as a source of `prepare`, whose machinery writes them: planned, whole, indexed, journaled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from megamm.config import Reading
from megamm.core.errors import DataError
from megamm.data.shards.index import load_index, read_shard_facts
from megamm.data.shards.places import Shard
from megamm.data.shards.reader import ShardReader
from megamm.data.shards.remote import open_reader
from megamm.evaluation.held_out import Place
from megamm.labelling.answers import Labelled, label_type
from megamm.prepare.source import Draft, Listing, Record, Source
from megamm.tasks.template import parse_sample


@dataclass(frozen=True)
class Originals:
    """The shards that samples come from, by digest: what is written depends on what they hold, and not on where they lie.

    Attributes:
        shards: Digest -> shard.
        digests: Pattern and file name of a shard -> its digest.
    """

    shards: Mapping[str, Shard]
    digests: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, places: Iterable[Place]) -> Originals:
        """The shards of some places."""
        tars = {(place.dataset, place.tar.name): place.tar for place in places}
        digests = {name: read_shard_facts(tar).digest for name, tar in tars.items()}
        return cls({digests[name]: tar for name, tar in tars.items()}, digests)

    def __repr__(self) -> str:
        return f"Originals({sorted(self.shards)})"

    def reader(self, digest: str) -> ShardReader:
        """Reads the samples of a shard."""
        return _opened(self.shards[digest])


def labelled_source(kept: Iterable[Labelled], originals: Originals, step: int | None) -> Source:
    """What `prepare` writes: the samples as they were, with the model's label in the place of their own answer.

    Args:
        kept: The labels that count.
        originals: Where the samples lie.
        step: Of the checkpoint that labelled them; None for an exported folder.
    """
    records = [_record(one, originals) for one in kept]
    make = partial(_make, originals=originals, step=step)
    return Source(name="pseudo-label", help="samples that a model labelled", records=lambda: Listing(records, make))


def relabelled(document: Mapping[str, Any], task: str, label: str, *, confidence: float, step: int | None) -> dict[str, Any]:
    """The JSON of a sample with a label in the place of its answer, and in its metadata how sure who was of it."""
    messages = list(document["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    messages.append({"role": "assistant", "content": [{"type": label_type(task), "text": label}]})
    return {**document, "messages": messages, "confidence": confidence, "labelled_at_step": step}


def _make(record: Record, *, originals: Originals, step: int | None) -> Draft:
    digest, number, task, label, confidence = record.data
    shard = originals.reader(digest)
    files, where = shard.sample(number), f"{shard.tar.name} {record.key}"
    document = relabelled(json.loads(files["json"]), task, label, confidence=confidence, step=step)
    sample = parse_sample(record.key, document, where=where)
    named = {part.member for message in sample.messages for part in message.content if part.member}
    if missing := named - files.keys():
        raise DataError(f"{where}: member {min(missing)} is missing")
    return Draft(document, {suffix: files[suffix] for suffix in named})


def _record(one: Labelled, originals: Originals) -> Record:
    digest = originals.digests[one.dataset, one.shard]
    num_bytes = sum(member.size for member in originals.reader(digest).index.members(one.number))
    return Record(one.key, num_bytes, (digest, one.number, one.task, one.label, round(one.confidence, 4)))


@lru_cache(maxsize=64)
def _opened(tar: Shard) -> ShardReader:
    return ShardReader(tar, load_index(tar), open_reader(Reading()))
