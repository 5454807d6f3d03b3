"""A program that loads batches and ends in one of many ways: `python -m tests.support.decoder_program ROOT TOKENIZER KIND END`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from megamm.config import Data, Dataset
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.plan import DataPlan
from megamm.tokenizers.text import TextTokenizer
from tests.data.conftest import BATCH, MODEL
from tests.support.decoding import Stalling, workers


def main(root: str, tokenizer: str, kind: str, end: str) -> None:
    data = Data(root=root, train={"slow": Dataset("slow/train-*.tar")}, window=32, row_patches=48, row_frames=400)
    data = replace(data, prefetch_steps=50, decoders=kind, decode_workers=2)
    # Whoever started the tests in the background has it ignored here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan = DataPlan.open(data, BATCH, model=replace(MODEL, audio=None), tokenizer=TextTokenizer.load(Path(tokenizer)), seed=5)
    if end == "stalled":
        # Nobody ever answers these reads; the program must end all the same.
        StepLoader(plan, reader=Stalling("slow"))
        time.sleep(3)
        report()
        sys.exit(0)
    loader = StepLoader(plan)
    next(loader)
    report()
    if end == "close":
        loader.close()
        loader.close()
    elif end == "error inside":
        with loader:
            raise ValueError("the step failed")
    elif end == "error":
        raise ValueError("the step failed")
    elif end == "os._exit":
        os._exit(0)
    elif end == "wait":
        time.sleep(60)


def report() -> None:
    """Tell who the decoders are, and which files below /dev/shm anybody has mapped."""
    everybody = [os.getpid(), *(worker.pid for worker in workers())]
    mapped = [line for pid in everybody for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line]
    print(json.dumps({"workers": everybody[1:], "mapped": mapped}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
