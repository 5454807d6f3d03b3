"""What became of a held-out sample, in memory and as a line of JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megamm.tasks.reply import Reply

Identity = tuple[str, str, int, str]
"""Dataset, shard, number in the shard, and what was done to the sample's media."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A sample that was looked at.

    Attributes:
        dataset: Name of its dataset.
        shard: File name of its shard.
        number: Its number in the shard.
        key: Its key.
        change: What was done to its media (`megamm.evaluation.changes`); empty for nothing.
    """

    dataset: str
    shard: str
    number: int
    key: str
    change: str = ""

    @property
    def identity(self) -> Identity:
        """What tells it from every other sample."""
        return self.dataset, self.shard, self.number, self.change

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, all that `result_from_json` needs."""
        return {"kind": _NAMES[type(self)]} | asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedSample(Result):
    """A sample that could not be evaluated, and why."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Result):
    """A sample that counts.

    Attributes:
        task: Name of its task.
        metadata: Further fields of the sample, for slices.
        media: Kinds of media that it shows, of `core.types.MEDIA_TYPES`.
    """

    task: str
    media: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Record):
    """A chat whose last answer the model gave anew.

    Attributes:
        reference: The stored answer.
        answer: The model's.
    """

    reference: Reply
    answer: Reply

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return Result.to_json(self) | {"reference": self.reference.to_json(), "answer": self.answer.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Record):
    """A document whose tokens the model predicted one by one.

    Attributes:
        nats: Sum of the negative log likelihoods.
        num_tokens: Supervised tokens.
        num_bytes: Length of the text in UTF-8.
        token_counts: Supervised token id -> how often.
    """

    nats: float
    num_tokens: int
    num_bytes: int
    token_counts: Mapping[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a sum that is no finite number is None."""
        return Result.to_json(self) | {"nats": self.nats if math.isfinite(self.nats) else None}


_CLASSES: dict[str, type[Result]] = {"skipped": SkippedSample, "answered": Answered, "scored": Scored}
_NAMES = {kind: name for name, kind in _CLASSES.items()}


def result_from_json(value: Mapping[str, Any]) -> Result:
    """Read what `Result.to_json` wrote."""
    fields = {name: content for name, content in value.items() if name != "kind"}
    kind = _CLASSES[value["kind"]]
    if "media" in fields:
        fields["media"] = tuple(fields["media"])
    if kind is Answered:
        fields |= {name: Reply.from_json(fields[name]) for name in ("reference", "answer")}
    if kind is Scored:
        fields["nats"] = math.nan if fields["nats"] is None else fields["nats"]
        fields["token_counts"] = {int(token_id): count for token_id, count in fields["token_counts"].items()}
    return kind(**fields)
