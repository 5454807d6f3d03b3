from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

from megamm.config import Data, Dataset
from megamm.data.shards.index import write_index
from megamm.train.data import plan_all_lengths
from tests.support import tiny_run
from tests.support.shards import as_files, text_document, write_tar


def test_more_shards_than_a_process_may_hold_open(tmp_path):
    num_shards = 40
    for shard in range(num_shards):
        write_index(write_tar(tmp_path / f"text-{shard:05}.tar", {"a": as_files(text_document("say one"))}))
    tokenizer = tiny_run.tokenizer(tmp_path / "tokenizer")
    recipe = replace(tiny_run.recipe(), data=Data(root=str(tmp_path), train={"text": Dataset("text-*.tar")}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + num_shards // 2, hard))
    try:
        (line,) = plan_all_lengths(recipe, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert line.startswith(f"train: text: {num_shards} samples, ") and line.endswith("planned now: 40")
