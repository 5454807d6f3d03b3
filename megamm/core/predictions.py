"""What a model says of a picture, typed and in source coordinates; references come in the same types.

Coordinates are pixels of the source picture, half-open: `[x1, x2)`, `[y1, y2)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LIKELY = 0.5
"""Least probability of a label that is said where a sample may have any number of them."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label of the whole sample and how likely it is, in [0, 1]."""

    label: str
    score: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"label": self.label, "score": self.score}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LabelScore:
        """Read what `to_json` wrote."""
        return cls(value["label"], value["score"])


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled box.

    Attributes:
        label: What it holds.
        xyxy: Left, top, right, bottom in source pixels.
        score: Confidence in [0, 1]; 1 for a reference.
        is_crowd: Of a reference: it lies around many objects, and what is found in it is neither right nor wrong.
    """

    label: str
    xyxy: tuple[float, float, float, float]
    score: float = 1.0
    is_crowd: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        crowd = {"is_crowd": True} if self.is_crowd else {}
        return {"label": self.label, "xyxy": list(self.xyxy), "score": self.score} | crowd

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Box:
        """Read what `to_json` wrote."""
        return cls(value["label"], tuple(value["xyxy"]), value["score"], value.get("is_crowd", False))


@dataclass(frozen=True, slots=True)
class Instance:
    """A labelled set of pixels.

    Attributes:
        label: What it is.
        size: Height and width of the source picture in pixels.
        counts: Run lengths of 0, 1, 0, … down the columns, the first of them of 0 and maybe 0 (COCO's uncompressed RLE).
        score: Confidence in [0, 1]; 1 for a reference.
    """

    label: str
    size: tuple[int, int]
    counts: tuple[int, ...]
    score: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `size` and `counts` are an RLE that pycocotools reads."""
        return {"label": self.label, "size": list(self.size), "counts": list(self.counts), "score": self.score}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Instance:
        """Read what `to_json` wrote."""
        return cls(value["label"], tuple(value["size"]), tuple(value["counts"]), value["score"])


@dataclass(frozen=True, slots=True)
class RankedItem:
    """An item of a catalogue and how likely the model holds it: `log_probability` in nats, 0 for a reference."""

    id: str
    log_probability: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"id": self.id, "log_probability": self.log_probability}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RankedItem:
        """Read what `to_json` wrote."""
        return cls(value["id"], value["log_probability"])
