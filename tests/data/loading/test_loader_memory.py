"""What a loader holds stays below `data.prefetch_bytes`, however slow its consumer is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.config import Tokenizer
from megamm.data.shards.index import write_index
from megamm.tokenizers import text
from tests.support.shards import as_files, chat, jpeg, write_tar

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    ask = [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "what is it?"}]
    samples = {f"p{number}": as_files(chat(ask, "seven"), _0_jpg=jpeg(300, 260 + number, seed=number)) for number in range(64)}
    write_index(write_tar(folder / "train-00000.tar", samples))
    text.train(["what is it? seven", "the number seven"] * 40, Tokenizer(text_size=280, location_bins=0), folder / "tokenizer")
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_peak_memory_stays_below_the_bound_under_a_slow_consumer(pictures, kind):
    bound = 100 * MIB
    command = [sys.executable, "-m", "tests.support.slow_consumer", str(pictures), str(pictures / "tokenizer"), kind, str(bound)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(result.stdout)
    # Room for several steps of twelve megabytes, far from the forty that might be decoded ahead.
    assert found["step_bytes"] > 11 * MIB and 2 <= found["num_waiting"] <= bound // found["step_bytes"]
    # The step in the consumer's hands is its own; code and allocator take a little.
    assert found["peak"] <= bound + found["step_bytes"] + 40 * MIB, found
    assert found["worker_peak"] <= 120 * MIB, found
