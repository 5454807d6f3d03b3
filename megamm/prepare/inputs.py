"""Files that samples are made of: found below a root, read, and named by what their first bytes say they are."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megamm.core.errors import ConfigError, DataError

_MAGIC = {
    "image": ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png")),
    "audio": ((b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"), (b"\xff\xfb", "mp3"), (b"\xff\xf3", "mp3"), (b"\xff\xf2", "mp3")),
}
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
_RIFF = {"image": ((b"WEBP", "webp"),), "audio": ((b"WAVE", "wav"),)}
_WANTED = {"image": "JPEG, PNG or WebP", "audio": "WAV, FLAC, OGG or MP3"}


def failure(error: OSError, told: Path | None = None) -> str:
    """What went wrong with which file, in a few words; without the file where it is `told`, which the message names already."""
    named = error.filename and error.filename != str(told)
    return f"{error.filename}: {error.strerror}" if named else error.strerror or str(error)


def existing_input(path: Path, *, folder: bool | None = None) -> Path:
    """`path`, which must be there.

    Args:
        path: What the user named.
        folder: Whether it must be a folder or must be a file; None for either.

    Raises:
        ConfigError: It is not there, or of the other kind.
    """
    if not path.exists():
        raise ConfigError(f"the input {path} does not exist; check the path")
    if folder is not None and path.is_dir() != folder:
        raise ConfigError(f"the input {path} is a {'file' if folder else 'folder'}, wanted is a {'folder' if folder else 'file'}")
    return path


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted by name within each folder; hidden ones are left out.

    Raises:
        OSError: A folder cannot be read.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(Path(entry.path))
        else:
            yield Path(entry.path)


def below(root: Path, name: str) -> Path:
    """The file `name` below `root`.

    Raises:
        DataError: The name leads out of the root.
    """
    top = os.path.normpath(root)
    path = os.path.normpath(os.path.join(top, name))  # noqa: PTH118, pathlib keeps '..'
    if path != top and not path.startswith(os.path.join(top, "")):  # noqa: PTH118
        raise DataError(f"{name!r} lies outside of {root}; name that folder with --root")
    return Path(path)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where that cannot be said, which is found out again when it is read."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def read_input(path: Path) -> bytes:
    """The bytes of a file that a record names.

    Raises:
        DataError: There is no such file, or nothing in it: the data is wrong, and the record can be skipped.
        OSError: It cannot be read: the machine is wrong, and nothing may be skipped for that.
    """
    try:
        # A pipe or a device would never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is no regular file")
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        if error.errno in _BAD_NAMES:
            raise DataError(f"there is no file {path} ({error.strerror})") from None
        raise
    if not content:
        raise DataError(f"the file {path} is empty")
    return content


def member(number: int, type_: str, content: bytes, name: str) -> str:
    """Member suffix of a picture or a sound, such as `0.jpg`, by what its bytes are and not by what its name says.

    Args:
        number: Of the member in its sample.
        type_: `image` or `audio`.
        content: The file.
        name: Of the file, for the error.

    Raises:
        DataError: It is of a kind that readers do not take.
    """
    kinds, start = _MAGIC[type_], content
    if content[:4] in (b"RIFF", b"RF64"):
        kinds, start = _RIFF[type_], content[8:12]
    ending = next((ending for magic, ending in kinds if start.startswith(magic)), None)
    if ending is None:
        raise DataError(f"{name} is no {_WANTED[type_]} file; convert it")
    return f"{number}.{ending}"
