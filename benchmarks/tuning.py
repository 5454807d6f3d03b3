"""One base, tuned to a task that it has not seen, by every method: `python -m benchmarks.tuning [--quick]`.

With `MEGAMM_DATA` naming the folder of real data, the base learns to read handwritten digits (mnist12k), and is tuned to digits that are
turned by 45 degrees, of which it gets ten each (mnist12k_askew). All methods take the same samples in the same order, for the same
number of steps, through the ordinary commands on two ranks of ZeRO-3; only the learning rate is each method's own. Quality is that of the
answers to the whole test split, beside that of the base as it was. A quick run takes the quick start's digits and texts in their place,
and one method.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.race import CHECKOUT
from benchmarks.results import Row, installed_versions, measured, write
from megamm.checkpoint.manifest import committed, read_manifest
from megamm.core.files import read_json
from megamm.core.json_lines import read_json_lines

COMMAND = "python -m benchmarks.tuning"
NUM_RANKS = 2
_MIB = 1 << 20
_RECIPE = Path(__file__).with_suffix(".toml")
_LAUNCH = (CHECKOUT / "launchers" / "local.sh", NUM_RANKS)
# bf16 weights; of what trains float32 masters, two moments and gradients, and where ranks are shared out two averages.
_BYTES = {"base": 2, "frozen": 2, "buffer": 4, "trainable": 18, "followed": 26}
_EVERYWHERE = '--adapter.targets=["text.*","vision.*","projector.*"]'
_DIGITS = "--model.head.labels=[" + ",".join(f'"{digit}"' for digit in range(10)) + "]"
_START = "import resource; from megamm.engine import distributed; import megamm.train.pretrain; distributed.start(); \
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); distributed.stop()"


@dataclass(frozen=True, slots=True)
class Method:
    """One way of tuning.

    Attributes:
        name: In the table.
        lr: Peak learning rate: the fewer weights move, the higher.
        overrides: What it sets in the recipe.
        has_base: Whether it starts from the base.
        steady: Beginnings of names of parameters whose learning rate is 0, so that they do not count as trained.
    """

    name: str
    lr: float
    overrides: tuple[str, ...] = ()
    has_base: bool = True
    steady: tuple[str, ...] = ()


METHODS = (
    Method("from scratch", 2e-3, has_base=False),
    Method("full", 1e-3),
    Method("decoder frozen, vision at half rate", 2e-3, ("--model.text.trainable=false", "--model.vision.lr_scale=0.5")),
    Method("LoRA", 4e-3, ("--adapter.method=lora", _EVERYWHERE)),
    Method("DoRA", 4e-3, ("--adapter.method=dora", _EVERYWHERE)),
    Method("AdaLoRA", 8e-3, ("--adapter.method=adalora", _EVERYWHERE, "--adapter.alpha=64.0")),
    Method("prefix", 5e-2, ("--adapter.method=prefix",)),
    Method("bottleneck", 4e-3, ("--adapter.method=bottleneck", '--adapter.targets=["text.*","vision.*"]', "--adapter.bottleneck_size=32")),
    Method(
        "linear head alone",
        2e-2,
        (
            "--model.head.kind=linear",
            _DIGITS,
            "--model.head.states=vision",
            "--model.text.trainable=false",
            "--model.vision.trainable=false",
            "--model.projector_lr_scale=0.0",
        ),
        steady=("model.vision_projector.",),
    ),
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is trained and asked.

    Attributes:
        sets: Dataset -> the words that prepare it; the last one is the task.
        base_steps: Of the base.
        steps: Of each method.
        methods: Names.
        max_samples: Of the test split; 0 for all.
    """

    sets: dict[str, tuple[str, ...]]
    base_steps: int
    steps: int
    methods: tuple[str, ...]
    max_samples: int = 0


_SHARED = (sys.executable, "-m", "benchmarks.prepare_shared_data", "--only")
_PREPARE = (sys.executable, "-m", "megamm.cli", "prepare")
FULL = Effort(
    sets={name: (*_SHARED, name) for name in ("mnist12k", "mnist12k_askew")},
    base_steps=300,
    steps=150,
    methods=tuple(method.name for method in METHODS),
)
QUICK = Effort(
    sets={"texts": (*_PREPARE, "digit_text"), "digits": (*_PREPARE, "digits")},
    base_steps=4,
    steps=6,
    methods=("AdaLoRA",),
    max_samples=20,
)


def main() -> int:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of one method on made data; written beside the result")
    quick = parser.parse_args().quick
    if not quick and not os.environ.get("MEGAMM_DATA"):
        parser.error("MEGAMM_DATA is not set; name the folder of real data, or take --quick")
    with tempfile.TemporaryDirectory(prefix="tuning-") as folder:
        rows = measure(QUICK if quick else FULL, Path(folder))
    versions = installed_versions(("torch", "deepspeed", "transformers"))
    path = write("tuning", f"{COMMAND} --quick" if quick else COMMAND, rows, versions=versions, quick=quick)
    print(path.with_suffix(".md").read_text())
    return 0


def measure(effort: Effort, folder: Path) -> list[Row]:
    """The rows, from data, runs and reports below `folder`."""
    *others, task = effort.sets
    for name, words in effort.sets.items():
        _run(*words, "--output", folder / "data" if words[: len(_SHARED)] == _SHARED else folder / "data" / name)
    _megamm("tokenizer", _RECIPE, *_paths(folder), *_datasets(effort.sets))
    start_kib = max(map(int, _run(*_LAUNCH, sys.executable, "-c", _START).split()))
    base = folder / "base"
    _megamm("pretrain", _RECIPE, "--run", base, *_paths(folder), *_datasets(others), *_words(_lengths(effort.base_steps)), ranks=True)
    limits = ("--max-new-tokens", 8, *(("--max-samples", effort.max_samples) if effort.max_samples else ()))
    _megamm("evaluate", base, "--shards", f"{task}={folder}/data/{task}/test-*.tar", *limits, ranks=True)
    rows = [_quality("no tuning", base)]
    for method in (one for one in METHODS if one.name in effort.methods):
        run = folder / method.name.replace(" ", "_").replace(",", "")
        seconds = _tune(method, effort, folder, task, run)
        _megamm("evaluate", run, *limits, ranks=True)
        rows += [_quality(method.name, run), *_costs(method, run, start_kib / 1024, seconds)]
    return rows


def _tune(method: Method, effort: Effort, folder: Path, task: str, run: Path) -> float:
    """Train a run by one method; seconds of the command."""
    settings = {
        **_lengths(effort.steps),
        "optim.lr": method.lr,
        "adapter.budget.warmup_steps": effort.steps // 5,
        "adapter.budget.final_steps": effort.steps // 3,
    }
    words = [*_datasets([task]), *_words(settings), *method.overrides]
    start = ("finetune", folder / "base") if method.has_base else ("pretrain",)
    began = time.monotonic()
    _megamm(*start, _RECIPE, "--run", run, *_paths(folder), *words, f"--data.held_out.{task}.shards={task}/test-*.tar", ranks=True)
    return time.monotonic() - began


def _quality(name: str, run: Path) -> Row:
    rows = read_json(run / "evaluation" / "report.json")["rows"]
    accuracy = next(row for row in rows if row["metric"] == "accuracy" and not row["slice"])
    told = f"{accuracy['samples']:,} held-out samples of {accuracy['dataset']}, 95 % interval; the best guess has {accuracy['chance']:.3f}"
    return Row(f"{name}: accuracy", accuracy["value"], "", "", (accuracy["low"], accuracy["high"]), told)


def _costs(method: Method, run: Path, start_mib: float, seconds: float) -> list[Row]:
    manifest = read_manifest(committed(run / "checkpoints")[-1][1])
    sizes = [
        (one.kind, math.prod(one.shape)) for one in manifest.parameters if one.kind != "buffer" and not one.name.startswith(method.steady)
    ]
    num_trained = sum(size for kind, size in sizes if kind in ("trainable", "followed"))
    state_bytes = sum(size * _BYTES[one.kind] for one in manifest.parameters for size in [math.prod(one.shape)])
    steps = [line for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]
    peak_mib = max(line["memory_gib"] for line in steps) * 1024 - start_mib
    # The first steps allocate and compile.
    step_seconds = [line["seconds"] for line in steps[len(steps) // 5 :]]
    return [
        Row(f"{method.name}: trained parameters", float(num_trained), peer=f"of {sum(size for _, size in sizes):,}"),
        Row(f"{method.name}: memory a rank", peak_mib, "MiB", peer="peak resident, above a rank without a model"),
        Row(f"{method.name}: state a rank", state_bytes / NUM_RANKS / _MIB, "MiB", peer="weights, masters, gradients, moments"),
        measured(f"{method.name}: step", step_seconds, "s", peer=f"wall, median; learning rate {method.lr:g}"),
        Row(f"{method.name}: training", seconds, "s", peer=f"wall, {len(steps)} steps, start and end of the command included"),
        Row(f"{method.name}: checkpoint", sum(one.num_bytes for one in manifest.files.values()) / _MIB, "MiB"),
    ]


def _paths(folder: Path) -> list[str]:
    return [f"--data.root={folder}/data", f"--tokenizer.folder={folder}/data/tokenizer"]


def _lengths(num_steps: int) -> dict[str, int]:
    return {"train.steps": num_steps, "schedule.warmup_steps": num_steps // 10}


def _words(settings: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def _datasets(names: Iterable[str]) -> list[str]:
    """Overrides that train on nothing else."""
    return [f"--data.train.{name}.shards={name}/train-*.tar" for name in names]


def _megamm(*words: object, ranks: bool = False) -> None:
    _run(*(_LAUNCH if ranks else ()), sys.executable, "-m", "megamm.cli", *words)


def _run(*words: object) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        SystemExit: It failed; its last lines are shown.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*map(str, words)], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {result.returncode}:\n{result.stderr[-3000:]}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
