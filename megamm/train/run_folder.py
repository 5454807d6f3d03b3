"""The folder of one run: archived recipe, markers, logs, checkpoints.

config.json origin.json ds_config.json environment.json tokenizer/ metrics.jsonl tensorboard/ answers/ logs/ checkpoints/
INTERRUPTED or DONE when the last process left in order, STOP when a user asks for it
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from megamm.config import Recipe, load_resolved, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import digest_file, write_json, write_text
from megamm.telemetry import failures, heartbeat

# What a resume may change without changing what was computed so far.
_MAY_CHANGE = (
    "batch.micro_rows",
    "batch.accumulation",
    "checkpoint.",
    "data.decode",
    "data.max_skipped_",
    "data.prefetch_",
    "data.reading.",
    "data.root",
    "description",
    "engine.activation_checkpointing",
    "engine.overrides",
    "engine.preset",
    "preflight.",
    "evaluation.",
    "loss.chunk_tokens",
    "spike.",
    "telemetry.",
    "tokenizer.folder",
    "train.stop_margin_seconds",
)
# The mixture may change at any step: the data plan keeps the history of its weights.
_MIXTURE = re.compile(r"data\.train\.[^.]+\.weight|data\.schedule")
_PACKAGES = ("megamm", "torch", "deepspeed", "transformers", "webdataset", "safetensors", "tokenizers", "numpy")


class RunFolder:
    """Paths and markers of one run.

    Args:
        path: The folder; `create` or `resume` decides what it may hold.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.origin = path / "origin.json"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.answers = path / "answers"
        self.stop = path / "STOP"
        self.interrupted = path / "INTERRUPTED"
        self.done = path / "DONE"

    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    def has_checkpoints(self) -> bool:
        """Whether anything was ever committed here, damaged or not."""
        return any(self.checkpoints.glob("step_*"))

    def check(self, recipe: Recipe, *, resume: str = "auto", data_may_change: bool = False) -> None:
        """Refuse a folder that holds something else, a run of another recipe, or any run where `resume` is `never`.

        Args:
            recipe: What to go on with.
            resume: Of the command.
            data_may_change: Whether all settings of the data may differ (the data plan records it).

        Raises:
            ConfigError: The folder is not empty and not a run, its recipe differs in a key that changes the computation, or
                there is something to resume and it must not be.
        """
        if not self.is_run():
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"{self.path} is a file; name a folder with --run")
            # What a launcher, or a start that was cut off, leaves behind.
            watched = {heartbeat.FOLDER, failures.FOLDER}
            own = {"logs", "submissions", "STOP", self.tokenizer.name, self.origin.name, "ds_config.json", "environment.json", *watched}
            if self.path.exists() and any(entry.name not in own and not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty and holds no run; name an empty folder with --run")
            return
        if not self.has_checkpoints():
            # Its first start came to nothing: there is nothing to go on with, and the recipe may be mended.
            return
        if resume == "never":
            raise ConfigError(f"{self.path} holds a run and --resume never would overwrite it; name an empty folder with --run")
        found = differences(to_dict(load_resolved(self.config)), to_dict(recipe))
        changed = [key for key in found if not (_may_change(key) or (data_may_change and _is_data(key)))]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run whose recipe differs in {', '.join(changed[:4])}{' …' if len(changed) > 4 else ''}; "
                "drop the override to resume it, or start a new run with another --run"
            )

    def archive(self, recipe: Recipe, ds_config: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
        """Write the resolved recipe, DeepSpeed's merged config, the environment, the tokenizer and the run's origin (rank 0 only)."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.has_checkpoints() and Path(recipe.tokenizer.folder).is_dir():
            shutil.rmtree(self.tokenizer, ignore_errors=True)
        _copy_folder(Path(recipe.tokenizer.folder), self.tokenizer)
        write_json(self.path / "ds_config.json", ds_config)
        write_json(self.path / "environment.json", environment())
        self.origin.unlink(missing_ok=True)
        if origin is not None:
            write_json(self.origin, origin)
        # Last, because its presence says that this folder is a run.
        write_json(self.config, to_dict(recipe))

    def mark(self, marker: Path, **facts: Any) -> None:
        """Leave `marker` (INTERRUPTED or DONE) with its facts as JSON, and take the other one and STOP away."""
        write_text(marker, json.dumps(facts, sort_keys=True) + "\n")
        for other in (self.interrupted, self.done, self.stop):
            if other != marker:
                other.unlink(missing_ok=True)

    def begin(self) -> None:
        """Take INTERRUPTED away: from here on the run is under way. STOP stays until it was obeyed."""
        self.interrupted.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions and machine of this process, without secrets: no environment variables are copied but the launcher's."""
    launcher = ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "num_cpus": os.cpu_count(),
        "versions": versions,
        "launcher": {name: os.environ[name] for name in launcher if name in os.environ},
    }


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested tables."""
    keys = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            keys.append(f"{prefix}{name}")
    return keys


def _may_change(key: str) -> bool:
    return key.startswith(_MAY_CHANGE) or _MIXTURE.fullmatch(key) is not None


def _is_data(key: str) -> bool:
    return key.startswith("data.") or key == "batch.row_tokens"


def _copy_folder(source: Path, target: Path) -> None:
    if target.is_dir():
        # A run is complete in itself: where the source is gone, the archived tokenizer serves.
        for path in sorted(source.iterdir()) if source.is_dir() else ():
            if path.is_file() and (not (target / path.name).is_file() or digest_file(target / path.name) != digest_file(path)):
                raise ConfigError(f"{path} differs from the tokenizer archived in {target}; a run keeps its tokenizer, start a new --run")
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(target)
