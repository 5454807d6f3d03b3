"""Sources that take their time, fail or die, to see what the machinery makes of it; importable by worker processes."""

from __future__ import annotations

import os
import signal
import time

from megamm.core.errors import DataError
from megamm.prepare.source import Draft, Listing, Record, Source

NUM_RECORDS = 30
BAD = 17


def _source(name: str, make) -> Source:
    records = [Record(f"key-{number:03}", 1, number) for number in range(NUM_RECORDS)]
    return Source(name, "records that all have a text", lambda: Listing(records, make))


def _text(record: Record) -> Draft:
    message = {"role": "assistant", "content": f"number {record.data} " * 600}
    return Draft({"task": "text", "messages": [message]})


def _slowly(record: Record) -> Draft:
    time.sleep(0.02)
    return _text(record)


def _die(record: Record) -> Draft:
    if record.data == BAD:
        os.kill(os.getpid(), signal.SIGKILL)
    return _text(record)


def _fail_to_read(record: Record) -> Draft:
    if record.data == BAD:
        raise OSError(5, "Input/output error", "a.jpg")
    return _text(record)


def _have_a_bug(record: Record) -> Draft:
    if record.data == BAD:
        raise ZeroDivisionError("a bug")
    return _text(record)


def _refuse(record: Record) -> Draft:
    if record.data == BAD:
        raise DataError("quoting \ud800 what is no text")
    return _text(record)


SLOW = _source("slow", _slowly)
DEADLY = _source("deadly", _die)
UNREADABLE = _source("unreadable", _fail_to_read)
BUGGY = _source("buggy", _have_a_bug)
PICKY = _source("picky", _refuse)
