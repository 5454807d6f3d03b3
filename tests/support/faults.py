"""File systems that fail, die or dawdle at a chosen operation of the real commit layer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megamm.checkpoint.io import Io

Reached = Callable[[int, str, Path], None]
"""(number of the operation from 0, its name, what it works on)."""


class WatchedIo(Io):
    """Calls `before` and `after` with every operation; the operations are the real ones."""

    def __init__(self, before: Reached | None = None, after: Reached | None = None):
        self._before = before
        self._after = after
        self._num_begun = 0

    @contextmanager
    def create(self, path) -> Iterator:
        with self._around("create", path), super().create(path) as file:
            yield file

    def write(self, file, block):
        with self._around("write", Path(file.name)):
            super().write(file, block)

    def sync(self, file):
        with self._around("sync", Path(file.name)):
            super().sync(file)

    def make_folder(self, path):
        with self._around("make_folder", path):
            super().make_folder(path)

    def sync_folder(self, path):
        with self._around("sync_folder", path):
            super().sync_folder(path)

    def rename(self, source, target):
        with self._around("rename", source):
            super().rename(source, target)

    def point(self, link, name):
        with self._around("point", link):
            super().point(link, name)

    def remove_folder(self, path):
        with self._around("remove_folder", path):
            super().remove_folder(path)

    @contextmanager
    def _around(self, name: str, path: Path) -> Iterator[int]:
        number = self._num_begun
        self._num_begun += 1
        if self._before is not None:
            self._before(number, name, path)
        yield number
        if self._after is not None:
            self._after(number, name, path)


class KilledIo(WatchedIo):
    """The process dies of SIGKILL before operation `at`, after it, or in the middle of it where it writes."""

    def __init__(self, at: int, moment: str):
        def die_if(now: str) -> Reached:
            return lambda number, name, path: die() if (number, now) == (at, moment) else None

        super().__init__(die_if("before"), die_if("after"))
        self._dies_within = at if moment == "middle" else -1

    def write(self, file, block):
        with self._around("write", Path(file.name)) as number:
            if number == self._dies_within:
                file.write(memoryview(block)[: len(block) // 2])
                die()
            Io.write(self, file, block)


def recording(operations: list[tuple[str, str]]) -> WatchedIo:
    """Notes every operation and the name it works on."""
    return WatchedIo(lambda number, name, path: operations.append((name, path.name)))


def failing(at: int, error_number: int) -> WatchedIo:
    """Operation `at` fails with that errno; later ones work."""

    def before(number: int, name: str, path: Path) -> None:
        if number == at:
            raise OSError(error_number, os.strerror(error_number), str(path))

    return WatchedIo(before)


class Broken(WatchedIo):
    """Operations of one name fail with `error_number` while it is not None."""

    def __init__(self, name: str, error_number: int | None = None):
        self._name = name
        self.error_number = error_number
        super().__init__(self._fail)

    def _fail(self, number: int, name: str, path: Path) -> None:
        if name == self._name and self.error_number is not None:
            raise OSError(self.error_number, os.strerror(self.error_number), str(path))


def slow(seconds: float) -> WatchedIo:
    """Every write begins that much later."""
    return WatchedIo(lambda number, name, path: time.sleep(seconds) if name == "write" else None)


def die() -> None:
    """End as a power cut would: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
