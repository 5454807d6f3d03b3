"""How long a checkpoint stops training, and how fast it is on the disk: `python -m benchmarks.checkpoint [--quick]`.

Two ranks hold one decoder under ZeRO-3 and save it in turns: behind training, while training waits, through DeepSpeed's own
`save_checkpoint`, and as one plain file a rank, written and synced. A figure of a turn is that of its slower rank.

DeepSpeed's save neither syncs what it wrote nor hashes it, reads nothing back and leaves random states out, so its time is also given
with its files synced. Goals compare with it as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Row, installed_versions, measured, write

COMMAND = "python -m benchmarks.checkpoint"
CHECKOUT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: the decoder's width and depth, turns, training steps beside which a save is written."""

    hidden_size: int = 768
    num_layers: int = 8
    num_turns: int = 5
    num_steps: int = 1


FULL = Effort()
QUICK = Effort(hidden_size=256, num_layers=4, num_turns=2, num_steps=2)


def main() -> int:
    """Measure, write the result and print it; 1 where a goal is missed (a quick run misses none)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same rows from a small model; written beside the result")
    quick = parser.parse_args().quick
    rows = rows_of(measure(QUICK if quick else FULL))
    versions = installed_versions(("torch", "deepspeed", "safetensors", "xxhash"))
    path = write("checkpoint", f"{COMMAND} --quick" if quick else COMMAND, rows, versions=versions, quick=quick)
    print(path.with_suffix(".md").read_text())
    return int(not quick and any(row.holds is False for row in rows))


def measure(effort: Effort) -> dict[str, Any]:
    """Start the ranks; what was measured, the slower rank a turn."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        ranks = {"WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", "from benchmarks.checkpoint import rank_main; rank_main()", folder, json.dumps(asdict(effort))]
        children = [
            subprocess.Popen(command, env=os.environ | ranks | settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=CHECKOUT)
            for rank in range(NUM_RANKS)
        ]
        if any([child.wait() for child in children]):
            raise SystemExit("a rank failed; its words are above")
        return json.loads((Path(folder) / "measured.json").read_text())


def rows_of(found: dict[str, Any]) -> list[Row]:
    """The table."""
    turns = found["turns"]
    mib = found["num_bytes"] / _MIB

    def all_of(name: str) -> list[float]:
        return [turn[name] for turn in turns]

    def ratios(name: str, peer: str) -> list[float]:
        return [turn[name] / turn[peer] for turn in turns]

    return [
        Row("size of the checkpoint", mib, "MiB", peer=f"{found['num_parameters'] / 1e6:.0f} M parameters, {NUM_RANKS} ranks"),
        Row("host memory held for snapshots", found["snapshot_bytes"] / _MIB, "MiB", peer="all ranks"),
        measured("DeepSpeed's save_checkpoint", all_of("deepspeed"), "s", peer="training waits; not synced, not hashed"),
        measured("DeepSpeed's save_checkpoint, its files synced", all_of("deepspeed_synced"), "s"),
        measured("save, training waits", all_of("waited"), "s", peer="synced, committed, read back"),
        measured("save behind training: stall", all_of("stall"), "s"),
        measured("stall / DeepSpeed's save", ratios("stall", "deepspeed"), "×", goal="<= 0.1", peer="DeepSpeed"),
        measured("training waits / DeepSpeed's save", ratios("waited", "deepspeed"), "×", peer="DeepSpeed"),
        measured("training waits / DeepSpeed's save, synced", ratios("waited", "deepspeed_synced"), "×", peer="DeepSpeed"),
        measured("save behind training: stall and slower steps", all_of("delay"), "s", peer="the same steps without a save"),
        measured("snapshot", [mib / 1024 / seconds for seconds in all_of("stall")], "GiB/s", peer="all ranks"),
        measured("plain write + fsync", [mib / seconds for seconds in all_of("plain")], "MiB/s"),
        measured("commit", [mib / seconds for seconds in all_of("commit")], "MiB/s", peer="from the snapshot to the rename"),
        measured("commit / plain write + fsync", ratios("plain", "commit"), "×", goal=">= 0.8", peer="plain write + fsync"),
    ]


def rank_main() -> None:
    """One rank; rank 0 writes what was measured."""
    from megamm.core.env import apply_defaults

    apply_defaults()
    from megamm.engine import distributed

    folder, effort = Path(sys.argv[1]), Effort(**json.loads(sys.argv[2]))
    world = distributed.start()
    found = _Measurement(folder, effort, world).run()
    if world.is_main:
        (folder / "measured.json").write_text(json.dumps(found))
    distributed.stop()


class _Measurement:
    """The turns of one rank. State: the engine and both savers."""

    def __init__(self, folder: Path, effort: Effort, world: Any):
        from megamm.checkpoint.saver import Saver
        from megamm.config.schema import Checkpointing

        self._folder = folder
        self._effort = effort
        self._world = world
        self._engine = _engine(effort, world.size)
        self._step()
        self._behind = Saver(folder / "behind", self._engine, world, Checkpointing(keep_last=1))
        self._waited = Saver(folder / "waited", self._engine, world, Checkpointing(keep_last=1, asynchronous=False))

    def run(self) -> dict[str, Any]:
        from megamm.engine import distributed, partitions

        num_parameters = sum(math.prod(facts.shape) for facts in partitions.parameter_table(self._engine))
        turns = [self._turn(number) for number in range(self._effort.num_turns + 1)][1:]
        snapshot_bytes = distributed.all_reduce_sum([float(self._behind.snapshot_bytes)])[0]
        return {"turns": turns, "num_bytes": snapshot_bytes, "snapshot_bytes": snapshot_bytes, "num_parameters": num_parameters}

    def _turn(self, number: int) -> dict[str, float]:
        """One of each, beginning with another one every time; the first turn of all is thrown away by `run`."""
        ways: list[Callable[[int], dict[str, float]]] = [self._plain, self._save_behind, self._save_waited, self._save_deepspeed]
        own: dict[str, float] = {}
        for way in ways[number % 4 :] + ways[: number % 4]:
            self._settle()
            own |= way(number + 1)
        # The slower rank of each.
        from megamm.engine.distributed import gather_json

        return {name: max(rank[name] for rank in gather_json(own)) for name in own}

    def _plain(self, number: int) -> dict[str, float]:
        path = self._folder / f"plain_{self._world.rank}"
        header, data = self._waited._snapshot.blocks()
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            file.write(header)
            for start in range(0, len(data), 4 * _MIB):
                file.write(data[start : start + 4 * _MIB])
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return {"plain": seconds}

    def _save_behind(self, number: int) -> dict[str, float]:
        from megamm.checkpoint.commit import Progress

        undisturbed = self._time_of(lambda: [self._step() for _ in range(self._effort.num_steps)]) / self._effort.num_steps
        num_steps = 0
        started = time.perf_counter()
        self._behind.save(Progress(number))
        stall = time.perf_counter() - started
        while self._behind.is_pending:
            self._step()
            self._behind.poll()
            num_steps += 1
        return {"stall": stall, "delay": time.perf_counter() - started - num_steps * undisturbed}

    def _save_waited(self, number: int) -> dict[str, float]:
        from megamm.checkpoint.commit import Progress

        seconds = self._time_of(lambda: self._waited.save(Progress(number)))
        (outcome,) = self._waited.poll()
        return {"waited": seconds, "commit": outcome.commit_seconds}

    def _save_deepspeed(self, number: int) -> dict[str, float]:
        folder = self._folder / "deepspeed"
        seconds = self._time_of(lambda: self._engine.deepspeed.save_checkpoint(str(folder), tag=str(number)))
        syncing = self._time_of(lambda: self._sync_files(folder))
        self._settle()
        if self._world.is_main:
            shutil.rmtree(folder)
        return {"deepspeed": seconds, "deepspeed_synced": seconds + syncing}

    def _sync_files(self, folder: Path) -> None:
        """This rank's share of what all ranks wrote."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files[self._world.rank :: self._world.size]:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _settle(self) -> None:
        """Nothing that one way left to be written is charged to the next."""
        from megamm.engine.distributed import barrier

        barrier()
        os.sync()
        barrier()

    @staticmethod
    def _time_of(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def _step(self) -> None:
        import torch

        ids = torch.arange(32)[None] % 100 + self._world.rank
        loss = self._engine(input_ids=ids, labels=ids, use_cache=False).loss
        self._engine.backward(loss, 1.0)
        self._engine.step()


def _engine(effort: Effort, world_size: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megamm.config.schema import Batching, Engine, Optimizer
    from megamm.engine import runtime, settings, weights

    width = effort.hidden_size
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=effort.num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
    )
    ds_config = settings.deepspeed_config(Engine(), batch=Batching(), optim=Optimizer(), world_size=world_size, accumulation=1)
    model = weights.partitioned(lambda: Qwen3ForCausalLM(config), ds_config, seed=0).train()
    groups = [{"params": list(model.parameters()), "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}]
    return runtime.initialize(model, ds_config, groups, lambda step: 1.0)


if __name__ == "__main__":
    sys.exit(main())
