"""Readers that do something to whoever reads, and a picture that takes long to decode: all real, in the process that is meant."""

from __future__ import annotations

import io
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from PIL import Image

from megamm.data.loading.decoders import DECODING, Watch
from megamm.data.loading.loader import StepLoader
from megamm.data.shards.index import write_index
from megamm.data.shards.reader import LocalReader
from tests.support.shards import as_files, chat, jpeg, write_tar

SLOW_KEY = "slow"


class Killing(LocalReader):
    """The process that reads from a shard whose path holds `name` is killed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __reduce__(self):
        return type(self), (self.name,)

    def read(self, tar, offset, size):
        if self.name in str(tar):
            self.act()
        return super().read(tar, offset, size)

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Stalling(Killing):
    """The storage does not answer."""

    def act(self) -> None:
        time.sleep(3600)


class Broken(Killing):
    """A bug."""

    def act(self) -> None:
        raise RuntimeError("broken reader")


class Failing(Killing):
    """The storage answers with an error."""

    def act(self) -> None:
        raise OSError(5, "Input/output error")


def write_slow_corpus(root: Path) -> None:
    """`slow/train-00000.tar`: small pictures, and one of 62 million pixels that takes most of a second to decode."""
    ask = {"type": "text", "text": "what is it?"}
    picture = chat([{"type": "image", "member": "0.jpg"}, ask], "the cat is number 1")
    samples = {f"s{number}": as_files(picture, _0_jpg=jpeg(16, 16, seed=number)) for number in range(20)}
    file = io.BytesIO()
    Image.new("RGB", (7900, 7900), (9, 90, 200)).save(file, "PNG", compress_level=1)
    large = chat([{"type": "image", "member": "0.png"}, ask], "the ship is number 2")
    samples[SLOW_KEY] = as_files(large, _0_png=file.getvalue())
    write_index(write_tar(root / "slow/train-00000.tar", samples))


def workers() -> list[psutil.Process]:
    """Decoder processes of this process."""
    return [child for child in psutil.Process().children() if any("decoder_worker" in part for part in child.cmdline())]


def boards(loader: StepLoader) -> list[tuple[int, Any]]:
    """Process id and board of each decoder process that runs now."""
    running = [keeper._worker for keeper in loader._decoders._keepers]
    return [(worker._process.pid, worker._board) for worker in running if worker is not None]


@contextmanager
def signalling(loader: StepLoader, number: int, *, times: int, min_requests: int = 1, seconds: float = 0.0) -> Iterator[list[int]]:
    """Send a signal to decoder processes that have been decoding one sample for `seconds`, each once, after `min_requests` of its own.

    Yields:
        The process ids that got it.
    """
    hit: list[int] = []
    watches: dict[int, Watch] = defaultdict(Watch)
    over = Event()

    def watch() -> None:
        while len(hit) < times and not over.is_set():
            for pid, board in boards(loader):
                request, _, phase, _ = place = board.look()
                lasted = watches[pid].look(place)
                if pid not in hit and request >= min_requests and phase == DECODING and lasted >= seconds:
                    os.kill(pid, number)
                    hit.append(pid)
            time.sleep(0.001)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()
