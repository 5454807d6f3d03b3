"""Pictures with boxes or instance masks in COCO's format.

Boxes become `[x1, y1, x2, y2]` in source pixels, half-open. A box that has no area or lies outside of its picture is left out and
named; one that reaches beyond the edge is cut at it and named. Crowds (`iscrowd`) are regions of many objects and no answer to learn:
they are left out of the answer and kept beside the sample as `crowd`, because COCO's metric of boxes ignores what is found there.

Source: https://cocodataset.org/#format-data; masks are drawn by pycocotools, as the metric draws them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.errors import ConfigError, DataError
from megamm.core.masks import pixels_of
from megamm.prepare.inputs import below, existing_input, member, read_input, size_of
from megamm.prepare.names import plain_key
from megamm.prepare.pictures import instance_png, layers, plain_size
from megamm.prepare.source import PROMPT, ROOT, Draft, Listing, Option, Record, Source, one_of

_ROUNDING_PIXELS = 1e-3
_MOST_PIXELS = 2**53
_QUESTIONS = {"detection": "Find every object.", "segmentation": "Segment every object."}


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture of the file with its annotations, by value, so that a worker needs nothing else."""

    id: int | str
    file_name: str
    size: tuple[int, int]
    annotations: tuple[Mapping[str, Any], ...]


def _records(*, input: Path, answer: str, prompt: str, root: Path | None) -> Listing:
    """Every picture is a record, also one without any annotation.

    Raises:
        ConfigError: pycocotools is missing where masks are wanted.
        DataError: INPUT is not what COCO's format says.
    """
    task = {"boxes": "detection", "masks": "segmentation"}[answer]
    if answer == "masks":
        _pycocotools()
    root = existing_input(root or input.parent, folder=True)
    pictures, labels = _read(existing_input(input, folder=False))
    records = [Record(_key(one), _size(root, one.file_name), one, group=one.file_name) for one in pictures]
    return Listing(records, partial(_make, root=root, labels=labels, task=task, prompt=prompt or _QUESTIONS[task]))


def _read(path: Path) -> tuple[list[_Picture], dict[int, str]]:
    """Pictures in the order of the file, and the name of each category."""
    try:
        document = json.loads(path.read_bytes())
        labels = {category["id"]: category["name"] for category in document["categories"]}
        images = {image["id"]: image for image in document["images"]}
        found: dict[Any, list[Mapping[str, Any]]] = {id_: [] for id_ in images}
        for annotation in document["annotations"]:
            _check(annotation, labels, images, path)
            found[annotation["image_id"]].append(annotation)
        pictures = [_Picture(id_, one["file_name"], (one["width"], one["height"]), tuple(found[id_])) for id_, one in images.items()]
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"{path} is not JSON in COCO's format ({error}); name the file of annotations") from None
    except KeyError as error:
        raise DataError(f"{path} is not in COCO's format: no {error}; name the file of annotations") from None
    if len(images) < len(document["images"]):
        raise DataError(f"{path} holds {len(document['images']) - len(images)} pictures whose id occurs twice; give each its own")
    return pictures, labels


def _check(annotation: Mapping[str, Any], labels: Mapping[int, str], images: Mapping[Any, Any], path: Path) -> None:
    if annotation["category_id"] not in labels:
        raise DataError(f"{path}: annotation {annotation.get('id')} has category_id {annotation['category_id']}, which is no category")
    if annotation["image_id"] not in images:
        raise DataError(f"{path}: annotation {annotation.get('id')} has image_id {annotation['image_id']}, which is no image")


def _make(record: Record, *, root: Path, labels: Mapping[int, str], task: str, prompt: str) -> Draft:
    picture: _Picture = record.data
    content = read_input(below(root, picture.file_name))
    suffix = member(0, "image", content, picture.file_name)
    size = plain_size(content, picture.file_name)
    if size != picture.size:
        raise DataError(f"{picture.file_name} has {size[0]} x {size[1]} pixels, its entry says {picture.size[0]} x {picture.size[1]}")
    notes: list[str] = []
    crowd = [one for one in picture.annotations if one.get("iscrowd")]
    objects = [one for one in picture.annotations if not one.get("iscrowd")]
    members = {suffix: content}
    if task == "detection":
        answer = [{"type": "boxes", "image": 0, "boxes": _boxes(objects, size, labels, notes)}]
    else:
        answer, masks = _masks(objects, size, labels, notes)
        members |= masks
    question = [{"type": "image", "member": suffix}, {"type": "text", "text": prompt}]
    document = {
        "task": task,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "image_id": picture.id,
        "file": picture.file_name,
    }
    if crowd:
        notes.append(f"{len(crowd)} crowds are kept beside the answer")
        document["crowd"] = _boxes(crowd, size, labels, notes)
    return Draft(document, members, notes)


def _boxes(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], labels: Mapping[int, str], notes: list[str]
) -> list[dict[str, Any]]:
    found = []
    for annotation in annotations:
        label = labels[annotation["category_id"]]
        what = f"annotation {annotation.get('id')} ({label})"
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            notes.append(f"{what}: bbox {box} is not four numbers")
            continue
        x, y, width, height = box
        if width <= 0 or height <= 0:
            notes.append(f"{what}: bbox {box} has no area")
            continue
        if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
            notes.append(f"{what}: bbox {box} lies outside of {size[0]} x {size[1]} pixels")
            continue
        whole = [x, y, x + width, y + height]
        corners = [max(x, 0), max(y, 0), min(whole[2], size[0]), min(whole[3], size[1])]
        if any(abs(one - other) > _ROUNDING_PIXELS for one, other in zip(corners, whole, strict=True)):
            notes.append(f"{what}: bbox {box} is cut at the edge of {size[0]} x {size[1]} pixels")
        found.append({"label": label, "xyxy": corners})
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MOST_PIXELS < value < _MOST_PIXELS


def _masks(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], labels: Mapping[int, str], notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Mask parts and their members; instances that overlap come into several parts, so that none loses a pixel.

    Raises:
        DataError: There are instances, and none of them can be drawn: an empty mask would say that there are none.
    """
    masks, names, faults = [], [], []
    for annotation in annotations:
        label = labels[annotation["category_id"]]
        try:
            mask = _draw(annotation.get("segmentation"), size)
        except DataError as error:
            faults.append(f"annotation {annotation.get('id')} ({label}): {error}")
            continue
        masks.append(mask)
        names.append(label)
    if faults and not masks:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(f"none of its instances can be drawn: {faults[0]}{more}")
    notes += faults
    parts, members = [], {}
    for number, layer in enumerate(layers(masks) or [[]], 1):
        instances = np.zeros((size[1], size[0]), dtype=np.int32)
        for value, index in enumerate(layer, 1):
            instances[masks[index]] = value
        suffix = f"{number}.mask.png"
        members[suffix] = instance_png(instances)
        parts.append({"type": "mask", "image": 0, "member": suffix, "labels": [names[index] for index in layer]})
    return parts, members


def _draw(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """bool[H, W] of polygons, or of a run-length code.

    Raises:
        DataError: It is neither, or covers no pixel.
    """
    coder, (width, height) = _pycocotools(), size
    try:
        if isinstance(segmentation, list) and segmentation:
            polygons = [[float(value) for value in polygon] for polygon in segmentation]
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
                raise DataError("a polygon has fewer than three corners")
            code = coder.merge(coder.frPyObjects(polygons, height, width))
            mask = coder.decode(code).astype(bool)
        elif isinstance(segmentation, dict) and list(segmentation["size"]) == [height, width]:
            counts = segmentation["counts"]
            # pycocotools decodes runs of any length into memory that it never cleared.
            mask = pixels_of(_checked(_runs(counts) if isinstance(counts, str) else counts, width * height), (height, width))
        else:
            raise DataError(f"its segmentation is no polygons and no run-length code of {width} x {height} pixels")
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"its segmentation cannot be drawn ({error})") from None
    if not mask.any():
        raise DataError("its segmentation covers no pixel of the picture")
    return mask


def _checked(runs: Sequence[int], num_pixels: int) -> Sequence[int]:
    if not all(type(one) is int and one >= 0 for one in runs) or sum(runs) != num_pixels:
        raise DataError(f"its run lengths are not whole numbers that sum to {num_pixels}")
    return runs


def _runs(code: str) -> list[int]:
    """Run lengths of COCO's compressed code: five bits a character, the lowest first, a sixth where more follow; from the fourth run on
    the difference to the run two before.

    Source: pycocotools, `rleFrString`.
    """
    runs: list[int] = []
    value = shift = 0
    for character in code.encode("ascii"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift or any(not 48 <= character < 112 for character in code.encode("ascii")):
        raise DataError("its compressed run lengths are cut off or damaged")
    return runs


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ModuleNotFoundError:
        raise ConfigError("masks of the source coco need pycocotools; install it with `pip install 'megamm[prepare]'`") from None
    return mask


def _key(picture: _Picture) -> str:
    return plain_key(picture.file_name.rpartition(".")[0] or picture.file_name)


def _size(root: Path, name: str) -> int:
    try:
        return size_of(below(root, name))
    except DataError:
        return 0


SOURCE = Source(
    name="coco",
    help="pictures with boxes or instance masks, as COCO's JSON",
    records=_records,
    input="the JSON file of annotations",
    options=(
        Option(
            "answer",
            "what is asked for: boxes (default; task detection) or masks (segmentation)",
            one_of("boxes", "masks"),
            "boxes",
            "WHAT",
        ),
        PROMPT,
        ROOT,
    ),
)
