"""What a shard is called and where it lies: names in recipes, places of shards, places of their sidecars."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import braceexpand

from megamm.core.errors import ConfigError
from megamm.core.files import digest_text

MAX_SHARDS = 1_000_000
"""More names than this in one brace range are a slip of the pen."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_MAGIC = re.compile(r"[*?\[]")
_WEB = re.compile(r"https?:", re.IGNORECASE)
_SIDECAR = re.compile(r"\..*|.*\.index|.*\.(lengths|catalogue)-[0-9a-f]{16}|lengths-[0-9a-f]{16}\.npy")


@dataclass(frozen=True, slots=True, order=True)
class RemoteShard:
    """A shard behind a URL.

    Attributes:
        url: Its whole address; may hold a query that nobody else should see, so print the shard instead.
        folder: Local folder of its sidecars, shared by the shards that lie beside it.
    """

    url: str
    folder: Path

    @classmethod
    def at(cls, url: str, sidecars: Path) -> RemoteShard:
        """The shard at `url`, its sidecars in a folder of `sidecars` that belongs to that place alone.

        The folder carries a digest of all of the URL but the file's name, because equal names of other places, schemes or
        queries are other shards.
        """
        parts = urlsplit(url)
        place = parts.path.rpartition("/")[0]
        digest = digest_text("\n".join((parts.scheme, parts.netloc, place, parts.query)))
        label = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{parts.hostname}{place}").strip("-.")[-80:]
        return cls(url, sidecars / f"{label}-{digest[:16]}")

    @property
    def name(self) -> str:
        """The file's name."""
        return urlsplit(self.url).path.rpartition("/")[2]

    def beside(self, ending: str) -> str:
        """Address of the file of the same name with `ending` appended."""
        parts = urlsplit(self.url)
        return parts._replace(path=parts.path + ending).geturl()

    def __str__(self) -> str:
        return public_url(self.url)


Shard = Path | RemoteShard
"""A local file, or a file behind a URL."""


def sidecar_path(shard: Shard, ending: str) -> Path:
    """Where a sidecar of a shard lies: beside a local shard, in the sidecar folder of a remote one."""
    return shard.folder / (shard.name + ending) if isinstance(shard, RemoteShard) else shard.with_name(shard.name + ending)


def public_url(url: str) -> str:
    """A URL without its query, which may be a signature."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def is_url(pattern: str) -> bool:
    """Whether a pattern names remote shards."""
    return "://" in pattern


def has_magic(pattern: str) -> bool:
    """Whether a pattern is a glob; what looks like one in a web address is its query or its host."""
    return _MAGIC.search(pattern) is not None and not _WEB.match(pattern)


def is_sidecar(name: str) -> bool:
    """Whether a file's name is one that we give to what lies beside shards, or to a file being written."""
    return _SIDECAR.fullmatch(name) is not None


def rooted(pattern: str, root: Path) -> str:
    """A pattern of a recipe with `root` in front; URLs and absolute paths stay as they are."""
    return pattern if is_url(pattern) else str(root / pattern)


def expand(pattern: str) -> Iterator[str]:
    """The paths, URLs and globs that a pattern with WebDataset's brace ranges stands for.

    Raises:
        ConfigError: The pattern is none that shards can be read from, or its braces are no ranges.
    """
    _check(pattern)
    try:
        # Counted before they are written out: that would take all memory.
        num_names = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
        names = list(islice(braceexpand(pattern, escape=False), MAX_SHARDS + 1)) if num_names <= MAX_SHARDS else []
    except ValueError:
        raise ConfigError(f"shards {_printable(pattern)}: a brace has no partner; write ranges as {{00000..00099}}") from None
    if not 0 < len(names) <= MAX_SHARDS:
        raise ConfigError(f"shards {_printable(pattern)}: the ranges name more than {MAX_SHARDS:,} shards; shorten them")
    for name in names:
        if re.search(r"[{}]", name):
            raise ConfigError(f"shards {_printable(pattern)}: the braces are no range; write {{00000..00099}} or {{a,b}}")
        yield name


def _check(pattern: str) -> None:
    shown = _printable(pattern)
    if not is_url(pattern):
        if match := _SCHEME.match(pattern):
            raise ConfigError(f"shards {shown}: {match[0]!r} is never run or read; name a URL (https://, s3://) or a path (./{shown})")
        return
    try:
        parts = urlsplit(pattern)
    except ValueError:
        raise ConfigError(f"shards {shown}: this is no URL; write SCHEME://HOST/PATH.tar") from None
    is_web = parts.scheme in ("http", "https")
    # Addresses of hosts and queries may hold colons too.
    if "::" in (parts.path if is_web else pattern):
        raise ConfigError(f"shards {shown}: chained URLs are not read; name the object itself")
    if "@" in parts.netloc:
        raise ConfigError(f"shards {shown}: a URL must not hold a name or a password; put credentials into the environment")
    if parts.scheme in ("file", "local"):
        raise ConfigError(f"shards {shown}: name local shards by their path")
    if not parts.netloc or not parts.path.strip("/") or parts.path.endswith("/"):
        raise ConfigError(f"shards {shown}: the URL names no file; write SCHEME://HOST/PATH.tar")
    if is_web:
        if has_magic(parts.path):
            raise ConfigError(f"shards {shown}: a web server lists no files; write a range such as {{00000..00099}}")
    elif "?" in pattern and not has_magic(pattern.replace("?", "")):
        raise ConfigError(f"shards {shown}: an object's URL has no query; write * where a glob is meant")


def _printable(pattern: str) -> str:
    """A pattern for messages, without what may be secret."""
    if not is_url(pattern):
        return pattern
    return re.sub(r"//[^/@]*@", "//", pattern.partition("?")[0].partition("#")[0])
