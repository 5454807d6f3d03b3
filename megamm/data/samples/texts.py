"""JSON and text members of samples, read within limits."""

from __future__ import annotations

import json
import re
from typing import Any

from megamm.config import Limits
from megamm.data.ledger import BadSample

# Ends at the end of the text where a string is not closed: no input makes it start over.
_JSON_STRING = re.compile(rb'"[^"]*(?:"|\Z)')


def read_json_object(content: bytes, limits: Limits, where: str) -> dict[str, Any]:
    """Parse a JSON member, whose objects and lists are counted before any is built.

    Args:
        content: UTF-8, with or without a byte order mark.
        limits: Bytes and values.
        where: For the error.

    Raises:
        BadSample: Too large, not JSON in UTF-8, or not an object.
    """
    if len(content) > limits.text_bytes:
        raise BadSample(f"{where}: {len(content)} bytes of JSON, data.limits.text_bytes is {limits.text_bytes}")
    num_values = content.count(b"{") + content.count(b"[")
    if num_values > limits.values:
        # Texts hold brackets too: count again without them before refusing.
        bare = _JSON_STRING.sub(b"", content.replace(b"\\\\", b"").replace(b'\\"', b""))
        if (num_values := bare.count(b"{") + bare.count(b"[")) > limits.values:
            raise BadSample(f"{where}: {num_values} objects and lists in JSON, data.limits.values is {limits.values}")
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: not JSON in UTF-8 ({error})") from None
    if not isinstance(document, dict):
        raise BadSample(f"{where}: {type(document).__name__}, not a JSON object")
    return document


def read_text(content: bytes, where: str) -> str:
    """Decode a text member: UTF-8, with or without a byte order mark.

    Raises:
        BadSample: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"{where} is not UTF-8 ({error.reason} at byte {error.start})") from None


def text_field(document: dict[str, Any], fields: tuple[str, ...], where: str) -> str:
    """The text, or the whole number in digits, that `fields` lead to.

    Raises:
        BadSample: There is no such field, or it is of another type.
    """
    value: Any = document
    for name in fields:
        if not isinstance(value, dict) or name not in value:
            raise BadSample(f"{where} has no field {'.'.join(fields)}")
        value = value[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadSample(f"{where}: field {'.'.join(fields)} is {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadSample(f"{where}: field {'.'.join(fields)} holds half of a surrogate pair") from None
    return value
