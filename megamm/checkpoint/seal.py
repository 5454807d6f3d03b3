"""JSON that carries a digest of itself, so that a flipped bit is found and never believed."""

from __future__ import annotations

import json
from typing import Any

from megamm.core.files import canonical_json, digest_text


def sealed(body: dict[str, Any]) -> str:
    """The text of a file that holds `body` and its digest."""
    return json.dumps(body | {"digest": digest_text(canonical_json(body))}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def opened(data: bytes) -> dict[str, Any]:
    """What was sealed.

    Raises:
        ValueError: It is not what `sealed` wrote, byte by byte.
    """
    text = data.decode("utf-8")
    try:
        body = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from None
    if not isinstance(body, dict) or "digest" not in body:
        raise ValueError("it holds no digest")
    body.pop("digest")
    if text != sealed(body):
        raise ValueError("its digest does not match")
    return body
