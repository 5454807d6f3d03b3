"""Labelled samples as a source of `prepare`, whose machinery writes them: planned, whole, indexed, journaled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from megamm.config import Reading
from megamm.core.errors import DataError
from megamm.data.shards.index import read_shard_facts
from megamm.data.shards.places import Shard
from megamm.data.shards.reader import ShardPool, ShardReader
from megamm.data.shards.remote import open_reader
from megamm.evaluation.held_out import Place
from megamm.labelling.answers import Labelled, label_type
from megamm.prepare.names import plain_key
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
        """The shards of some places.

        Raises:
            DataError: Two of them hold the same bytes, so that each of their samples would be written twice.
        """
        tars = {(place.dataset, place.tar.name): place.tar for place in places}
        digests = {name: read_shard_facts(tar).digest for name, tar in tars.items()}
        shards: dict[str, Shard] = {}
        for name, tar in tars.items():
            if (other := shards.setdefault(digests[name], tar)) is not tar:
                raise DataError(f"--data names {other} and {tar}, which hold the same samples; name them once")
        return cls(shards, digests)

    def __repr__(self) -> str:
        return f"Originals({sorted(self.shards)})"

    def reader(self, digest: str) -> ShardReader:
        """Reads the samples of a shard."""
        return _pool().shard(self.shards[digest])


@dataclass(frozen=True, slots=True)
class Labeller:
    """The model that labels.

    Attributes:
        step: Of its checkpoint; None for an exported folder.
        contents: What tells its weights from others; an output that begins with them is no other model's.
    """

    step: int | None
    contents: str


def labelled_source(answers: Sequence[Labelled], threshold: float, originals: Originals, *, labeller: Labeller) -> Source:
    """What `prepare` writes: the samples as they were, with the model's label in the place of their own answer.

    A key that several samples have is told apart by the digests of their shards, whichever of them are kept.

    Args:
        answers: What the model said of all samples.
        threshold: Least confidence of a label that counts.
        originals: Where the samples lie.
        labeller: Who said it.
    """
    counts = Counter(one.key for one in answers)
    records = [_record(one, originals, counts[one.key] > 1) for one in answers if one.label and one.confidence >= threshold]
    make = partial(_make, originals=originals, labeller=labeller)
    return Source(name="pseudo-label", help="samples that a model labelled", records=lambda: Listing(records, make))


def relabelled(document: Mapping[str, Any], task: str, label: str, *, confidence: float, step: int | None) -> dict[str, Any]:
    """The JSON of a sample with a label in the place of its answer, and in its metadata how sure who was of it."""
    messages = list(document["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    messages.append({"role": "assistant", "content": [{"type": label_type(task), "text": label}]})
    return {**document, "messages": messages, "confidence": confidence, "labelled_at_step": step}


def _make(record: Record, *, originals: Originals, labeller: Labeller) -> Draft:
    digest, number, task, label, confidence = record.data
    shard = originals.reader(digest)
    files, where = shard.sample(number), f"{shard.tar.name} {shard.index.key(number)}"
    document = relabelled(json.loads(files["json"]), task, label, confidence=confidence, step=labeller.step)
    sample = parse_sample(record.key, document, where=where)
    named = {part.member for message in sample.messages for part in message.content if part.member}
    if missing := named - files.keys():
        raise DataError(f"{where}: member {min(missing)} is missing")
    return Draft(document, {suffix: files[suffix] for suffix in named})


def _record(one: Labelled, originals: Originals, is_shared: bool) -> Record:
    digest = originals.digests[one.dataset, one.shard]
    num_bytes = sum(member.size for member in originals.reader(digest).index.members(one.number))
    key = plain_key(f"{digest[:16]}/{one.key}" if is_shared else one.key)
    return Record(key, num_bytes, (digest, one.number, one.task, one.label, round(one.confidence, 4)))


@lru_cache(maxsize=1)
def _pool() -> ShardPool:
    """One in each process that writes: samples are written in another order than they lie in, so many shards are open at once."""
    return ShardPool(open_reader(Reading()))
