"""The file operations of a commit, one method each: tests fail or kill a save at any of them, on the real commit layer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TypeAlias

Buffer: TypeAlias = "bytes | memoryview"


class Io:
    """What a commit asks of the file system. Errors are the kernel's."""

    @contextmanager
    def create(self, path: Path) -> Iterator[FileIO]:
        """Open a new file for unbuffered writing, so that a full disk is noticed at the write that met it."""
        with FileIO(path, "wb") as file:
            yield file

    def write(self, file: FileIO, block: Buffer) -> None:
        """Write all of `block`; one call of the kernel may take a part."""
        rest = memoryview(block).cast("B")
        while rest:
            rest = rest[file.write(rest) :]

    def sync(self, file: FileIO) -> None:
        """Wait until the file's bytes are on the disk. After an error they count as lost: Linux reports it once only."""
        os.fsync(file.fileno())

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents, where another rank did not; wait until the names of the parents are on the disk.

        The folder's own name is its maker's to sync, once it has the one that counts.
        """
        missing = [folder for folder in path.parents if not folder.is_dir()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            self.sync_folder(folder.parent)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a file system, in one step. A folder never replaces one that holds files."""
        source.rename(target)

    def point(self, link: Path, name: str) -> None:
        """Make `link` a symbolic link to its neighbour `name`, in one step."""
        draft = link.with_name(f".{link.name}.tmp")
        draft.unlink(missing_ok=True)
        draft.symlink_to(name)
        draft.replace(link)

    def remove_folder(self, path: Path) -> None:
        """Delete a folder with what it holds."""
        shutil.rmtree(path)


LOCAL = Io()
"""The file system as it is; it holds no state."""
