"""However a program ends, no decoder process, no shared memory and no thread outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megamm.config import Data
from megamm.data.media.features import MediaRules
from megamm.data.samples.lengths import ensure_lengths
from tests.data.conftest import MODEL
from tests.support.decoding import write_slow_corpus

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    """Start the program over a corpus; returns the process after its first line, with that line's facts."""
    root = tmp_path_factory.mktemp("exits")
    write_slow_corpus(root)
    ensure_lengths(sorted(root.glob("*/*.tar")), tokenizer, MediaRules.of(replace(MODEL, audio=None), Data()))
    folder = write_tokenizer(tmp_path_factory.mktemp("exits-tokenizer"))

    def start_(kind, end):
        command = [sys.executable, "-m", "tests.support.decoder_program", str(root), str(folder), kind, end]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return process, json.loads(line)

    return start_


def write_tokenizer(folder):
    from megamm.config import Tokenizer
    from megamm.tokenizers import text

    # The session's tokenizer again: equal texts give an equal one.
    texts = [f"the {word} is number {number}" for number in range(100) for word in ("cat", "dog", "ship", "seven", "plain words")]
    text.train(texts, Tokenizer(text_size=320, location_bins=0), folder)
    return folder


def gone(pids, seconds=5.0):
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.02)
    return []


def shared_files():
    """Names below /dev/shm such as shared memories of Python have; semaphores of other programs come and go there meanwhile."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "pym-", "megamm"))}  # noqa: PTH208


@pytest.mark.integration
@pytest.mark.parametrize(
    ("end", "signals", "code"),
    [
        ("close", (), 0),
        ("nothing", (), 0),
        ("error inside", (), 1),
        ("error", (), 1),
        ("os._exit", (), 0),
        ("stalled", (), 0),
        ("wait", (signal.SIGINT,), -signal.SIGINT),
        ("wait", (signal.SIGTERM,), -signal.SIGTERM),
        ("wait", (signal.SIGKILL,), -signal.SIGKILL),
    ],
)
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_nothing_outlives_a_program(start, kind, end, signals, code):
    before = shared_files()
    process, facts = start(kind, end)
    try:
        assert len(facts["workers"]) == (2 if kind == "processes" else 0) and not facts["mapped"]
        for number in signals:
            process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == code, errors
        assert gone(facts["workers"]) == []
        assert "resource_tracker" not in errors and "leaked" not in errors
        assert ("Traceback" in errors) == ("error" in end or signal.SIGINT in signals), errors
        assert shared_files() <= before
    finally:
        process.kill()
        process.communicate()


@pytest.mark.integration
def test_a_killed_decoder_leaves_nothing_and_its_program_goes_on(start):
    process, facts = start("processes", "wait")
    os.kill(facts["workers"][0], signal.SIGKILL)
    assert gone(facts["workers"][:1]) == []
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert gone(facts["workers"]) == []
