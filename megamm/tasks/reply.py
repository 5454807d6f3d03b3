"""What an answer says: the stored one of a sample, or the tokens that a model gave, both in source coordinates.

Reading a model's tokens is the inverse of the layout of `megamm.tasks.template`. What does not follow that layout, such as a box of three
locations, is counted and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.geometry import PictureView, Shape
from megamm.core.masks import fill, run_lengths
from megamm.core.predictions import Box, Instance, LabelScore, RankedItem
from megamm.core.types import Part
from megamm.tokenizers.text import TextTokenizer
from megamm.tokenizers.vocabulary import Vocabulary

_KINDS = {"box_start": "box", "mask_start": "mask"}
_NUM_BOX_LOCATIONS = 4
_LEAST_MASK_LOCATIONS = 6


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer.

    Attributes:
        text: All of its text and labels, but for the labels of boxes and instances.
        boxes: In their order.
        instances: In their order.
        items: In their order, or best first.
        num_malformed: Boxes, instances and items that do not follow the layout.
        is_finished: False where it was cut off.
        is_finite: False where the model gave a token no finite probability, because its weights or activations overflow.
        labels: Every label that a head chose among with its score, the likeliest first; empty where tokens answered.
        probability: That the model chooses exactly these tokens, one after another, whatever follows them; None where the answer is
            not text alone, or was not chosen token by token.
    """

    text: str = ""
    boxes: tuple[Box, ...] = ()
    instances: tuple[Instance, ...] = ()
    items: tuple[RankedItem, ...] = ()
    num_malformed: int = 0
    is_finished: bool = True
    labels: tuple[LabelScore, ...] = ()
    is_finite: bool = True
    probability: float | None = None

    @property
    def has_finite_scores(self) -> bool:
        """Whether all that the model said of how sure it is are numbers."""
        scores = [one.score for one in (*self.boxes, *self.instances, *self.labels)]
        return self.is_finite and all(map(math.isfinite, [*scores, *(one.log_probability for one in self.items)]))

    def surer_than(self, least_score: float) -> Reply:
        """The same without boxes and instances of a lower score."""
        boxes, instances = (tuple(one for one in found if one.score >= least_score) for found in (self.boxes, self.instances))
        return replace(self, boxes=boxes, instances=instances)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is empty is left out."""
        lists = {name: [one.to_json() for one in getattr(self, name)] for name in _LISTS}
        counts = {"num_malformed": self.num_malformed} if self.num_malformed else {}
        ending = {} if self.is_finished else {"is_finished": False}
        sureness = {} if self.probability is None else {"probability": self.probability}
        return {"text": self.text} | {name: value for name, value in lists.items() if value} | counts | ending | sureness

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reply:
        """Read what `to_json` wrote."""
        lists = {name: tuple(kind.from_json(one) for one in value.get(name, ())) for name, kind in _LISTS.items()}
        plain = {"num_malformed": 0, "is_finished": True, "probability": None}
        return cls(value["text"], **lists, **{name: value.get(name, usual) for name, usual in plain.items()})


_LISTS = {"boxes": Box, "instances": Instance, "items": RankedItem, "labels": LabelScore}


def stored_reply(parts: Sequence[Part], masks: Mapping[str, np.ndarray]) -> Reply:
    """The answer that a sample holds.

    Args:
        parts: Of the assistant's message.
        masks: Member -> int[H, W], pixel value k for instance k, of every mask part.

    Raises:
        DataError: A mask is not there, or has an instance without a label.
    """
    # What stands around a label is lost where it is written in tokens, so that it tells nothing apart.
    boxes = [Box(box["label"].strip(), tuple(box["xyxy"])) for part in parts if part.type == "boxes" for box in part.data["boxes"]]
    instances = [one for part in parts if part.type == "mask" for one in _instances(part, masks)]
    items = tuple(RankedItem(part.data["id"]) for part in parts if part.type == "item")
    return Reply("".join(part.text for part in parts if part.type in ("text", "label")), tuple(boxes), tuple(instances), items)


def read_reply(
    token_ids: Sequence[int],
    tokenizer: TextTokenizer,
    view: PictureView | None = None,
    *,
    probabilities: Sequence[float] | None = None,
    is_finished: bool = True,
) -> Reply:
    """What a model's tokens say.

    A box's score is the probability of its label given its place times that of its place's least sure location.

    Args:
        token_ids: Without the token that ended them.
        tokenizer: Of the model.
        view: What it saw of the picture that boxes and instances lie in; None where it saw none, so that they mean nothing.
        probabilities: Of each token when it was chosen; None for 1.
        is_finished: Whether the model ended the answer.
    """
    chances = [1.0] * len(token_ids) if probabilities is None else list(probabilities)
    vocabulary, texts, shapes = tokenizer.vocabulary, [], {"box": [], "mask": []}
    items, num_malformed = _items(token_ids, chances, tokenizer)
    position = 0
    while position < len(token_ids):
        start = position
        kind = _kind(token_ids[start], vocabulary)
        position = next((i for i in range(start + 1, len(token_ids)) if _kind(token_ids[i], vocabulary)), len(token_ids))
        if kind is None:
            texts.append(tokenizer.decode(token_ids[start:position]))
            continue
        shape = _shape(token_ids[start:position], chances[start:position], kind, tokenizer)
        if shape is None or view is None:
            num_malformed += 1
        else:
            shapes[kind].append(shape)
    boxes = [] if view is None else [_box(shape, view) for shape in shapes["box"]]
    instances = [] if view is None else [_instance(shape, view) for shape in shapes["mask"]]
    # A box that was cut off on its way back to the source, or has no area there, is none.
    whole = [box for box in boxes if box.xyxy[0] < box.xyxy[2] and box.xyxy[1] < box.xyxy[3]]
    covering = [instance for instance in instances if sum(instance.counts[1::2])]
    num_malformed += len(boxes) - len(whole) + len(instances) - len(covering)
    is_finite = all(map(math.isfinite, chances))
    found = (tuple(whole), tuple(covering), tuple(items))
    probability = math.prod(chances) if probabilities and is_finite and not any(found) else None
    return Reply("".join(texts), *found, num_malformed, is_finished, is_finite=is_finite, probability=probability)


def _items(ids: Sequence[int], chances: Sequence[float], tokenizer: TextTokenizer) -> tuple[list[RankedItem], int]:
    """Items that stand in tokens, and how many runs of item tokens are none."""
    vocabulary, found, num_malformed = tokenizer.vocabulary, [], 0
    position = 0
    while position < len(ids):
        if vocabulary.describe(ids[position])[0] != "item":
            position += 1
            continue
        end = position + vocabulary.item_levels
        run = [token_id for token_id in ids[position:end] if vocabulary.describe(token_id)[0] == "item"]
        try:
            item = None if tokenizer.items is None else tokenizer.items.item_of(run, vocabulary)
        except DataError:
            item = None
        if item is None:
            num_malformed += 1
        else:
            found.append(RankedItem(item, float(np.log(chances[position:end]).sum())))
        position += max(len(run), 1)
    return found, num_malformed


def _kind(token_id: int, vocabulary: Vocabulary) -> str | None:
    """`box` or `mask` where a token begins one."""
    return next((kind for name, kind in _KINDS.items() if token_id == vocabulary.control_id(name)), None)


def _shape(ids: Sequence[int], chances: Sequence[float], kind: str, tokenizer: TextTokenizer) -> Shape | None:
    """A start token, locations, an end token and a label; None where it is something else."""
    vocabulary = tokenizer.vocabulary
    end = next((i for i, token_id in enumerate(ids) if token_id == vocabulary.control_id(f"{kind}_end")), None)
    if end is None:
        return None
    places = [vocabulary.describe(token_id) for token_id in ids[1:end]]
    wanted = len(places) == _NUM_BOX_LOCATIONS if kind == "box" else len(places) >= _LEAST_MASK_LOCATIONS and len(places) % 2 == 0
    label = tokenizer.decode(ids[end + 1 :]).strip()
    if not wanted or not label or any(block != "location" for block, _ in places):
        return None
    shares = [code / (vocabulary.location - 1) for _, code in places]
    points = tuple(zip(shares[::2], shares[1::2], strict=True))
    score = float(np.prod(chances[end + 1 :])) * min(chances[1:end])
    return Shape(label, points, score=score)


def _box(shape: Shape, view: PictureView) -> Box:
    corners = [view.source(point) for point in shape.points]
    (x1, y1), (x2, y2) = corners
    return Box(shape.label, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), shape.score)


def _instance(shape: Shape, view: PictureView) -> Instance:
    pixels = fill([view.source(point) for point in shape.points], view.width, view.height)
    return Instance(shape.label, (view.height, view.width), run_lengths(pixels), shape.score)


def _instances(part: Part, masks: Mapping[str, np.ndarray]) -> list[Instance]:
    if part.member not in masks:
        raise DataError(f"mask {part.member} is missing")
    values, labels = masks[part.member], part.data["labels"]
    if values.max(initial=0) > len(labels):
        raise DataError(f"mask {part.member} holds instance {values.max()}, and {len(labels)} labels; label every instance")
    # An instance that others hide wholly has no pixel, and is none.
    found = [(label.strip(), values == number) for number, label in enumerate(labels, 1)]
    return [Instance(label, values.shape, run_lengths(pixels)) for label, pixels in found if pixels.any()]
