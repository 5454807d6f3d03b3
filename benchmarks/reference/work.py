"""The work folder of a reference run, and the commands that fill it: each in a process of its own, each done once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reference.made_of import check_run, figures_digest, learned_digest
from megamm.config import load_recipe
from megamm.core.errors import ConfigError, MegaMMError
from megamm.core.files import read_json, write_json

LAUNCHER = Path(__file__).parents[2] / "launchers" / "local.sh"
_PRELOADED = ["megamm.cli", "megamm.train.pretrain", "megamm.evaluation.evaluate", "megamm.prepare.run", "megamm.prepare.tokenizer"]
_LAST_TOKENIZER_FILE = "vocabulary.json"

# What a quick run changes of any recipe: it goes the whole way and learns nothing.
_QUICK_TRAINING = {
    "train.steps": "2",
    "schedule.warmup_steps": "1",
    "schedule.decay_steps": "1",
    "data.window": "32",
    "data.schedule": "[]",
    "batch.global_rows": "2",
    "batch.micro_rows": "1",
    "batch.accumulation": "0",
    "checkpoint.every": "0",
    "evaluation.every": "0",
    "engine.activation_checkpointing": "none",
    "telemetry.tensorboard": "false",
}
_QUICK_EVALUATION = ("--max-samples", "2", "--max-new-tokens", "4")


@dataclass(frozen=True, slots=True)
class Work:
    """Where a reference run keeps everything, so that the same command goes on where the last one stopped.

    Attributes:
        folder: Shards, tokenizers, and a folder a training run with its evaluation.
        num_ranks: Processes of a training run and of an evaluation.
        end: `time.monotonic()` at which training stops, with a checkpoint.
        quick: A few steps on a share of the data, which shows that everything runs.
    """

    folder: Path
    num_ranks: int = 2
    end: float = float("inf")
    quick: bool = False

    @property
    def shards(self) -> Path:
        """A folder a set of `benchmarks.prepare_shared_data`."""
        return self.folder / "shards"

    def tokenizer(self, recipe: str) -> Path:
        """The tokenizer of a recipe."""
        return self.folder / "tokenizers" / Path(recipe).stem

    def run_folder(self, name: str) -> Path:
        """The run of a part."""
        return self.folder / name / "run"

    def report(self, name: str) -> Path:
        """The evaluation of a part."""
        return self.folder / name / "evaluation" / "report.json"

    def recipe_overrides(self, recipe: str) -> list[str]:
        """Words that put a recipe onto this folder's shards."""
        return ["--data.root", str(self.shards), "--tokenizer.folder", str(self.tokenizer(recipe))]

    def run(self, *words: object, num_ranks: int = 1) -> None:
        """Run one subcommand of `megamm`.

        Raises:
            MegaMMError: It failed; its own output says why.
        """
        texts = [str(word) for word in words]
        print(f"\n$ megamm {' '.join(texts)}", flush=True)
        code = _launched(texts, num_ranks) if num_ranks > 1 else _forked(texts)
        if code:
            raise MegaMMError(f"`megamm {texts[0]}` ended with code {code}; its output above says why")

    def make_tokenizer(self, recipe: str) -> None:
        """Make a recipe's tokenizer, once.

        Raises:
            ConfigError: It was learned by other settings or from other shards than the recipe has now.
        """
        folder, learned = self.tokenizer(recipe), self.tokenizer(recipe).with_suffix(".made_of.json")
        digest = learned_digest(load_recipe(recipe, self.recipe_overrides(recipe)))
        if not (folder / _LAST_TOKENIZER_FILE).is_file():
            self.run("tokenizer", recipe, *self.recipe_overrides(recipe))
            write_json(learned, {"digest": digest})
        elif not learned.is_file() or read_json(learned)["digest"] != digest:
            raise ConfigError(f"{folder} was learned from other shards or by other settings; remove {folder} to make it anew")

    def train(self, name: str, command: Sequence[object], overrides: Sequence[str] = ()) -> bool:
        """Train a part's run, or go on with it.

        Args:
            name: Of the part.
            command: `pretrain RECIPE` or `finetune SOURCE RECIPE`.
            overrides: Of the recipe, beside where its data lie.

        Returns:
            Whether it is done; False where the time was up.

        Raises:
            ConfigError: What is there is a run of another recipe, or from other weights.
            MegaMMError: Training failed.
        """
        run, recipe = self.run_folder(name), str(command[-1])
        changes = [*self.recipe_overrides(recipe), *overrides]
        if self.quick:
            changes += [word for key, value in _QUICK_TRAINING.items() for word in (f"--{key}", value)]
        check_run(run, recipe, changes, Path(str(command[1])) if command[0] == "finetune" else None)
        if (run / "DONE").is_file():
            return True
        self.make_tokenizer(recipe)
        words = [*command, "--run", run, *changes]
        seconds_left = self.end - time.monotonic()
        if seconds_left < 1:
            return False
        if seconds_left < float("inf"):
            words += ["--max-seconds", int(seconds_left)]
        began = time.monotonic()
        try:
            self.run(*words, num_ranks=self.num_ranks)
        finally:
            # Also what was interrupted has cost its time.
            write_json(self._seconds(name), {"seconds": (self.seconds(name) or 0.0) + time.monotonic() - began})
        return (run / "DONE").is_file()

    def seconds(self, name: str) -> float | None:
        """Wall time of a part's training, all commands together, with what starting them took; None where none ran here."""
        path = self._seconds(name)
        return read_json(path)["seconds"] if path.is_file() else None

    def _seconds(self, name: str) -> Path:
        return self.folder / name / "seconds.json"

    def evaluate(self, name: str, *words: str) -> None:
        """Evaluate a part's finished run, once for what its figures depend on: its weights, the held-out shards, the options.

        Args:
            name: Of the part.
            words: Options of `megamm evaluate`.

        Raises:
            MegaMMError: The evaluation failed.
        """
        run, report = self.run_folder(name), self.report(name)
        # Of an option that is given twice the last one counts.
        options = [*words, *(_QUICK_EVALUATION if self.quick else ())]
        # Beside the folder of the evaluation, which takes no files of others.
        made_of, digest = self.folder / name / "evaluation_made_of.json", figures_digest(run, options)
        if report.is_file() and made_of.is_file() and read_json(made_of)["digest"] == digest:
            return
        # Until the new ones are there, the table is to say that there are none.
        report.unlink(missing_ok=True)
        self.run("evaluate", run, "--output", report.parent, *options, num_ranks=self.num_ranks)
        write_json(made_of, {"digest": digest})


def _forked(words: Sequence[str]) -> int:
    """Run a command in a process that has imported already what commands import, and is ended with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    child = context.Process(target=_command, args=(list(words),))
    child.start()
    try:
        child.join()
    finally:
        if child.is_alive():
            # A run that is told so commits a checkpoint first.
            child.terminate()
            child.join()
    return child.exitcode or 0


def _command(words: list[str]) -> None:
    from megamm.cli import main

    sys.exit(main(words))


def _launched(words: Sequence[str], num_ranks: int) -> int:
    """Run a command on several ranks, which are ended with this process."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    child = subprocess.Popen([LAUNCHER, str(num_ranks), "megamm", *words], env=environment)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
