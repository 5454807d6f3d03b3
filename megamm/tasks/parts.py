"""The parts of a message, read strictly: what each type holds, and nothing else.

| type | fields | what it is |
|---|---|---|
| `text`, `label` | `text` | characters |
| `image`, `audio` | `member` | a picture or a sound of the sample |
| `boxes` | `image`, `boxes` | labelled boxes `{"label", "xyxy"}` in a picture of the chat |
| `mask` | `image`, `member`, `labels` | a PNG whose pixel value k is instance k of a picture, 0 none; `labels[k - 1]` names it |
| `item` | `id`, maybe `text` | something a user met, with its description |

A picture may have no box and no instance. `image` counts the chat's pictures from 0. Coordinates are source pixels, half-open:
`[x1, x2)`, `[y1, y2)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megamm.core.errors import DataError
from megamm.core.types import Part

_MOST_PIXELS = 2**53
"""Whole numbers beyond it are no coordinates, and no float is exact there."""
_MEMBER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def parse_part(value: Any, what: str, where: str) -> Part:
    """Read one element of a message's `content`.

    Args:
        value: The parsed JSON.
        what: Which element, for the error.
        where: Shard and key, for the error.

    Raises:
        DataError: Something is missing, unknown or of another type; names `where` and `what`.
    """
    fields = json_object(value, what, where)
    type_name = string(fields, "type", what, where)
    if type_name not in _PARTS:
        raise DataError(f"{where}: {what} has type {type_name!r}; part types are {', '.join(_PARTS)}")
    names, read = _PARTS[type_name]
    only(fields, ("type", *names), what, where)
    return read(type_name, fields, what, where)


def json_object(value: Any, what: str, where: str) -> Mapping[str, Any]:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {what} is {type(value).__name__}, not a JSON object")
    return value


def only(fields: Mapping[str, Any], known: Sequence[str], what: str, where: str) -> None:
    """Refuse fields that are not `known`."""
    if unknown := sorted(set(fields) - set(known)):
        raise DataError(f"{where}: {what} has unknown fields {', '.join(unknown)}; it takes {', '.join(known)}")


def filled_list(fields: Mapping[str, Any], name: str, what: str, where: str) -> list[Any]:
    """The list `name`, which must hold something."""
    value = _present(fields, name, what, where)
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {name} of {what} is {str(value)[:80]!r}, not a list with something in it")
    return value


def string(fields: Mapping[str, Any], name: str, what: str, where: str) -> str:
    """The string `name`, which must hold something and be encodable as UTF-8."""
    value = _present(fields, name, what, where)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {name} of {what} is {str(value)[:80]!r}, not a string with something in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} of {what} holds half of a surrogate pair; write it as UTF-8 or as a whole \\u pair") from None
    return value


def _any_list(fields: Mapping[str, Any], name: str, what: str, where: str) -> list[Any]:
    value = _present(fields, name, what, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} of {what} is {str(value)[:80]!r}, not a list")
    return value


def _present(fields: Mapping[str, Any], name: str, what: str, where: str) -> Any:
    if name not in fields:
        raise DataError(f"{where}: {what} has no {name}")
    return fields[name]


def _text(type_name: str, fields: Mapping[str, Any], what: str, where: str) -> Part:
    return Part(type_name, text=string(fields, "text", what, where))


def _medium(type_name: str, fields: Mapping[str, Any], what: str, where: str) -> Part:
    return Part(type_name, member=_member(fields, what, where))


def _boxes(type_name: str, fields: Mapping[str, Any], what: str, where: str) -> Part:
    boxes = _any_list(fields, "boxes", what, where)
    read = [_box(box, f"box {index} of {what}", where) for index, box in enumerate(boxes)]
    return Part(type_name, data={"image": _image(fields, what, where), "boxes": read})


def _box(value: Any, what: str, where: str) -> dict[str, Any]:
    fields = json_object(value, what, where)
    only(fields, ("label", "xyxy"), what, where)
    corners = _present(fields, "xyxy", what, where)
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_coordinate, corners)):
        raise DataError(f"{where}: xyxy of {what} is {str(corners)[:80]!r}, not four numbers of at least 0")
    x1, y1, x2, y2 = corners
    if x1 >= x2 or y1 >= y2:
        raise DataError(f"{where}: xyxy of {what} is {corners}, which has no area; write [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return {"label": _label(fields, what, where), "xyxy": corners}


def _label(fields: Mapping[str, Any], what: str, where: str) -> str:
    label = string(fields, "label", what, where)
    if not label.strip():
        raise DataError(f"{where}: label of {what} is blank; give it a name")
    return label


def _mask(type_name: str, fields: Mapping[str, Any], what: str, where: str) -> Part:
    labels = _any_list(fields, "labels", what, where)
    read = [_label({"label": label}, f"instance {index} of {what}", where) for index, label in enumerate(labels, 1)]
    member = _member(fields, what, where)
    if not member.endswith(".png"):
        raise DataError(f"{where}: {what} names member {member!r}; a mask is a PNG")
    return Part(type_name, member=member, data={"image": _image(fields, what, where), "labels": read})


def _item(type_name: str, fields: Mapping[str, Any], what: str, where: str) -> Part:
    text = string(fields, "text", what, where) if "text" in fields else ""
    return Part(type_name, text=text, data={"id": string(fields, "id", what, where)})


def _member(fields: Mapping[str, Any], what: str, where: str) -> str:
    member = string(fields, "member", what, where)
    if not _MEMBER.fullmatch(member):
        raise DataError(f"{where}: {what} names member {member!r}; a member is the suffix after the key, such as 0.png")
    return member


def _image(fields: Mapping[str, Any], what: str, where: str) -> int:
    image = _present(fields, "image", what, where)
    if type(image) is not int or image < 0:
        raise DataError(f"{where}: image of {what} is {str(image)[:80]!r}, not the number of a picture of the chat, counted from 0")
    return image


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _MOST_PIXELS


_Read = Callable[[str, Mapping[str, Any], str, str], Part]

_PARTS: dict[str, tuple[tuple[str, ...], _Read]] = {
    "text": (("text",), _text),
    "label": (("text",), _text),
    "image": (("member",), _medium),
    "audio": (("member",), _medium),
    "boxes": (("image", "boxes"), _boxes),
    "mask": (("image", "member", "labels"), _mask),
    "item": (("id", "text"), _item),
}
"""Part type -> its fields besides `type`, and how they are read."""
