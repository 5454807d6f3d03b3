"""A consumer that lets a loader run ahead as far as it may: `python -m tests.support.slow_consumer ROOT TOKENIZER KIND PREFETCH_BYTES`."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil

from megamm.config import AudioFeatures, Batching, Data, Dataset, ImageFeatures, Model, Tower
from megamm.data.loading.collate import batch_bytes
from megamm.data.loading.loader import StepLoader
from megamm.data.media.decode import image_input
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import ensure_lengths
from megamm.tokenizers.text import TextTokenizer
from tests.support.decoding import workers
from tests.support.shards import jpeg

MODEL = Model(
    text=Tower("qwen3"),
    vision=Tower("siglip2_vision_model"),
    image_features=ImageFeatures(patch_size=16, max_patches=256),
    audio_features=AudioFeatures(),
)


def main(root: str, tokenizer_folder: str, kind: str, prefetch_bytes: str) -> None:
    tokenizer, rules = TextTokenizer.load(Path(tokenizer_folder)), MediaRules.of(MODEL, Data())
    ensure_lengths(sorted(Path(root).glob("*.tar")), tokenizer, rules)
    data = Data(root=root, train={"pictures": Dataset("*.tar")}, window=64, row_patches=4096, decoders=kind)
    data = replace(data, prefetch_steps=40, prefetch_bytes=int(prefetch_bytes))
    plan = DataPlan.open(data, Batching(row_tokens=5000, global_rows=1), model=MODEL, tokenizer=tokenizer, seed=1)
    image_input(jpeg(300, 300), MODEL.image_features)  # what is imported once
    process, peak, over = psutil.Process(), [0, 0], threading.Event()
    base = process.memory_info().rss

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], process.memory_info().rss - base)
            peak[1] = max([peak[1], *(worker.memory_info().rss - worker.memory_info().shared for worker in workers())])
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with StepLoader(plan) as loader:
        for _ in range(4):
            step = next(loader)
            time.sleep(1.0)
        num_waiting = len(loader._ready)
    over.set()
    watcher.join()
    step_bytes = sum(map(batch_bytes, step.micro_batches))
    print(json.dumps({"peak": peak[0], "worker_peak": peak[1], "step_bytes": step_bytes, "num_waiting": num_waiting}))


if __name__ == "__main__":
    main(*sys.argv[1:])
