"""Memory of the loader among bombs and before a slow consumer: what it holds must stay under `data.prefetch_bytes`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import webdataset
from PIL import Image

from benchmarks.corpus import BATCH, MODEL, Corpus
from benchmarks.memory import PeakMemory
from benchmarks.race import CHECKOUT
from benchmarks.results import Row
from megamm.config import Dataset
from megamm.data.loading.loader import StepLoader
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import ensure_lengths
from megamm.data.shards.index import write_index

PREFETCH_BYTES = 512 << 20
_BOMB_SIDE = 12_000
_BOMB_SECONDS = 1_200
_NUM_BOMBS = 16


def bounds_rows(corpus: Corpus, *, num_steps: int) -> list[Row]:
    """Run the loader in a process of its own, a consumer that takes a step every quarter of a second."""
    write_bombs(corpus)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.bounds", str(corpus.folder), str(num_steps)]
    found = json.loads(subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    bound = PREFETCH_BYTES / 1e6
    peer = f"prefetch_bytes {bound:.0f} MB; {found['num_bombs']} bombs met, {num_steps} steps to a consumer that takes one in 0.25 s"
    return [Row("memory of the loader above its start", found["added_mb"], "MB", f"<= {bound:.0f}", None, peer)]


def write_bombs(corpus: Corpus) -> Path:
    """A shard of small files that decode to hundreds of megabytes, their lengths planned like others'."""
    tar = corpus.folder / "bombs-00000.tar"
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("1", (_BOMB_SIDE, _BOMB_SIDE)).save(picture, "PNG")
    soundfile.write(sound, np.zeros(_BOMB_SECONDS * 16_000, dtype=np.int16), 16_000, format="FLAC")
    members = {"image": ("0.png", picture.getvalue()), "audio": ("0.flac", sound.getvalue())}
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        for number in range(_NUM_BOMBS):
            kind = ("image", "audio")[number % 2]
            suffix, content = members[kind]
            question = {"role": "user", "content": [{"type": kind, "member": suffix}]}
            document = {"task": "description", "messages": [question, {"role": "assistant", "content": "a bomb"}]}
            writer.write({"__key__": f"bomb-{number:03}", "json": json.dumps(document).encode(), suffix: content})
    write_index(tar)
    ensure_lengths([tar], corpus.tokenizer, MediaRules.of(MODEL, corpus.data))
    return tar


def main() -> None:
    """Print the memory that the loader added at its peak, and how many bombs it met."""
    corpus, num_steps = Corpus(Path(sys.argv[1]), "", 0), int(sys.argv[2])
    data = corpus.data
    train = {**data.train, "bombs": Dataset("bombs-*.tar", weight=0.1)}
    data = replace(
        data,
        train=train,
        prefetch_bytes=PREFETCH_BYTES,
        prefetch_steps=1000,
        decode_workers=2,
        max_skipped_share=1.0,
        max_skipped_in_a_row=1000,
    )
    with StepLoader(corpus.plan(prefetch_steps=1)) as loader:
        next(loader)  # what the decoders load and compile once
    plan = DataPlan.open(data, BATCH, model=MODEL, tokenizer=corpus.tokenizer, seed=0)
    num_bombs = 0
    with PeakMemory() as memory, StepLoader(plan) as loader:
        for _ in range(num_steps):
            time.sleep(0.25)
            num_bombs += sum(entry.dataset == "bombs" for entry in next(loader).skipped)
    assert num_bombs, "no bomb was met; take more steps"
    print(json.dumps({"added_mb": memory.added_bytes / 1e6, "num_bombs": num_bombs}))


if __name__ == "__main__":
    main()
