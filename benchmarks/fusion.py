"""Concatenation of pooled features against the transformer's joint sequence, on the same pairs and budget.

    MEGAMM_DATA=… python -m benchmarks.fusion [--quick]

One start learns pictured and spoken digits by themselves; from it each way of fusing them learns questions that need both. A run is
done once: the same command goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.reference.parts import tables
from benchmarks.reference.shares import make_shards
from benchmarks.reference.work import Work
from benchmarks.results import Row
from megamm.core.env import apply_defaults
from megamm.core.errors import MegaMMError
from megamm.core.files import read_json

NAME = "fusion"
RECIPE = str(Path(__file__).with_suffix(".toml"))
START_SETS = ("mnist12k", "fsdd")
_STEPS = 480
# A quarter of the start's: at its own, 480 steps left the joint sequence at chance.
_LR = 5e-4
_TEST_SAMPLES = 1000
_LONGEST_ANSWER = 16


@dataclass(frozen=True, slots=True)
class Question:
    """A question about pairs.

    Attributes:
        set: Of `benchmarks.prepare_shared_data`.
        task: Its task.
        metric: The figure that is compared.
        labels: All answers.
        chance: What the best answer without looking scores.
    """

    set: str
    task: str
    metric: str
    labels: tuple[str, ...]
    chance: float


@dataclass(frozen=True, slots=True)
class Way:
    """A way to fuse.

    Attributes:
        row: What it is called.
        head: Settings of the head that answers; empty where tokens do.
        model: Overrides of the recipe beside it.
        parts: The parts of the model that an answer comes from.
    """

    row: str
    head: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("model", "head")


QUESTIONS = (
    Question("digit_matching", "matching", "accuracy", ("yes", "no"), 0.5),
    Question("digit_sums", "question_answering", "exact_match", tuple(str(one) for one in range(19)), 0.1),
)
_TOWERS = ("model.vision_tower", "model.audio_tower", "head")
WAYS = {
    "tokens": Way("joint sequence, answer in tokens"),
    "last": Way("joint sequence, linear head on the decoder's last state", {"states": "decoder", "pool": "last"}),
    "linear": Way("pooled towers side by side, linear head", {"states": "towers"}, {"model.text.trainable": False}, _TOWERS),
    "hidden": Way(
        "pooled towers side by side, head with one hidden layer",
        {"states": "towers", "hidden_layers": 1, "hidden_size": 256},
        {"model.text.trainable": False},
        _TOWERS,
    ),
}
ALONE = {"picture": {"image": "0.png"}, "sound": {"audio": "1.flac"}}
"""What is seen of a pair -> how a mapping names it."""


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate all, and write the table; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.fusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of each kind of run on a share of the data, below WORK/quick")
    parser.add_argument("--work", type=Path, default=Path("runs/fusion"), help="folder of all that is kept (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a training run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the table (default: %(default)s)")
    arguments = parser.parse_args(argv)
    # What is running here is told to stop, and commits a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    apply_defaults()
    try:
        if not os.environ.get("MEGAMM_DATA"):
            raise MegaMMError("MEGAMM_DATA is not set; point it at the folder of the real test data")
        folder = arguments.work / "quick" if arguments.quick else arguments.work
        work = Work(folder.absolute(), 1 if arguments.quick else arguments.ranks, quick=arguments.quick)
        rows = list(compare(work, Path(os.environ["MEGAMM_DATA"]).absolute()))
    except MegaMMError as error:
        print(f"benchmarks.fusion: {error}", file=sys.stderr)
        return 1
    command = f"python -m benchmarks.fusion{' --quick' if arguments.quick else ''}"
    path = results.write(NAME, command, rows, quick=arguments.quick, folder=arguments.results)
    print(f"\n{path.with_suffix('.md').read_text()}\n{path}")
    return 0


def compare(work: Work, data: Path) -> Iterator[Row]:
    """Do everything that is not done yet, and make the rows.

    Args:
        work: Where everything is kept.
        data: The folder of the real data.
    """
    questions = QUESTIONS[:1] if work.quick else QUESTIONS
    make_shards(work, data, [*START_SETS, *(question.set for question in questions)])
    _train(work, "start", ["pretrain", RECIPE])
    work.evaluate("start", *_bounds(work))
    yield from _start_rows(work)
    for question in questions:
        pairs = datasets_of(question)
        for name, way in WAYS.items():
            yield _row(work, question, f"{question.set}-{name}", way.row, way.parts, {**head_of(question, way), **way.model, **pairs})
    question = QUESTIONS[0]
    for name, member in ALONE.items():
        mapping = {"task": question.task, "prompt": "Is the spoken digit the pictured one?", "answer": "json:result", **member}
        way = f"{name} alone, answer in tokens"
        yield _row(work, question, f"{question.set}-{name}", way, ("model",), datasets_of(question, mapping))


def datasets_of(question: Question, mapping: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides that put a run onto the pairs of a question, or onto what a mapping shows of them."""
    shown = {} if mapping is None else {"mapping": mapping}
    return {
        "data.train": {"pairs": {"shards": f"{question.set}/train-*.tar", **shown}},
        "data.held_out": {"pairs": {"shards": f"{question.set}/test-*.tar", **shown}},
    }


def head_of(question: Question, way: Way) -> dict[str, Any]:
    """Overrides that put a way's head onto a question; none where tokens answer."""
    return {"model.head": {"kind": "linear", "labels": question.labels, **way.head}} if way.head else {}


def _row(work: Work, question: Question, name: str, way: str, parts: tuple[str, ...], overrides: Mapping[str, Any]) -> Row:
    """Train and evaluate a way to answer a question, and say how well it does."""
    changes = tables({**overrides, "train.steps": _STEPS, "optim.lr": _LR})
    _train(work, name, ["finetune", work.run_folder("start"), RECIPE], changes)
    work.evaluate(name, *_bounds(work))
    found = _figure(work, name, "pairs", question.metric)
    is_alone = way.partition(" ")[0] in ALONE
    beside = f"chance {question.chance:g}; {_interval(found)}; {num_parameters(work.run_folder(name), parts) / 1e6:.2f} M parameters answer"
    return Row(f"{question.set}: {way}", found["value"], "", "<= 0.55" if is_alone else "", None, beside)


def _train(work: Work, name: str, command: Sequence[object], overrides: Sequence[str] = ()) -> None:
    if not work.train(name, command, overrides):
        raise MegaMMError(f"{work.run_folder(name)} was stopped before its end; the same command goes on with it")


def _start_rows(work: Work) -> Iterator[Row]:
    for dataset, metric, row in (
        ("pictures", "accuracy", "the start: pictured digits"),
        ("sounds", "accuracy", "the start: spoken digits"),
    ):
        found = _figure(work, "start", dataset, metric)
        yield Row(f"{row}, {metric}", found["value"], peer=f"chance 0.1; {_interval(found)}")


def _figure(work: Work, name: str, dataset: str, metric: str) -> dict[str, Any]:
    """The row of an evaluation over all samples of a dataset."""
    rows = read_json(work.report(name))["rows"]
    return next(row for row in rows if (row["dataset"], row["metric"]) == (dataset, metric) and not row["slice"])


def _interval(found: Mapping[str, Any]) -> str:
    return f"95 % interval {found['low']:.3f} to {found['high']:.3f} of {found['samples']:,} samples"


def _bounds(work: Work) -> tuple[str, ...]:
    return ("--max-new-tokens", str(_LONGEST_ANSWER), *(() if work.quick else ("--max-samples", str(_TEST_SAMPLES))))


def num_parameters(run: Path, parts: tuple[str, ...]) -> int:
    """Parameters of some parts of a trained model, those that are shared once."""
    from megamm.inference import load_model

    model = load_model(run, device="cpu").model
    found = [model.get_submodule(part) for part in parts if part != "head" or model.head is not None]
    return sum({id(parameter): parameter.numel() for part in found for parameter in part.parameters()}.values())


if __name__ == "__main__":
    sys.exit(main())
