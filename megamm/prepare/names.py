"""Sample keys that every tar reader takes, made from names that people gave."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from megamm.core.files import digest_text

# A tar header holds names of up to 100 bytes; longer or other ones would need extension headers, which carry no fixed bytes.
MAX_NAME = 100
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
# WebDataset keeps names between double underscores for itself.
_RESERVED = re.compile(r"__[^/]*__(/|$)")
_MAX_PLAIN = 64


def is_key(key: str) -> bool:
    """Whether a key holds letters, digits, `_` and `-` only, with `/` between folders, and is not reserved."""
    return _KEY.fullmatch(key) is not None and _RESERVED.match(key) is None


def plain_key(name: str) -> str:
    """A key for a name: the name itself where it can be one, else what is left of it with a digest of the whole.

    Different names give different keys (as far as 64 bits tell them apart), and a name's key depends on no other name.
    """
    if is_key(name) and len(name) <= _MAX_PLAIN:
        return name
    kept = "/".join(filter(None, (re.sub(r"[^A-Za-z0-9-]+", "_", part).strip("_-") for part in name.split("/"))))
    kept = kept[: _MAX_PLAIN - 17].rstrip("/")
    return f"{kept}-{digest_text(name)[:16]}" if kept else digest_text(name)[:16]


def stems(paths: Sequence[str]) -> list[str]:
    """Paths without their endings, where that leaves them different from all others."""
    short = [path[: len(path) - len(PurePosixPath(path).suffix)] for path in paths]
    counts = Counter(short)
    return [stem if counts[stem] == 1 else path for stem, path in zip(short, paths, strict=True)]
