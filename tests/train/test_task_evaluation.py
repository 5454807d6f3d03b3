"""Tasks asked of a model whose weights are split over two ranks: the answers of `megamm evaluate`, and training goes on as without them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamm.config import Recipe, Tokenizer, to_dict
from megamm.core.files import write_json
from megamm.data.shards.index import write_index
from megamm.evaluation import evaluate
from megamm.evaluation.held_out import list_places, read_samples
from megamm.evaluation.judge import judge
from megamm.evaluation.lockstep import judge_in_step
from megamm.evaluation.records import Answered
from megamm.telemetry.whereabouts import Whereabouts
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable
from megamm.train.run_folder import RunFolder
from megamm.train.task_evaluation import TaskEvaluation, task_values
from tests.support.ranks import run_ranks
from tests.support.runs import make_data, recipe_over
from tests.support.shards import as_files, chat, jpeg, text_document, write_tar
from tests.support.tiny_run import SENTENCES, random_model

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEGS = {
    "tokens": ("--engine.precision=fp32",),
    "head": ("--engine.precision=fp32", f'--model.head={{kind="linear",labels={json.dumps(LABELS)}}}'),
}
NUM_SAMPLES, BATCH_SIZE = 5, 2


def held_out_recipe(root: Path, leg: str) -> Recipe:
    """Pictures, sounds and texts to be asked about; more new tokens than any answer takes."""
    kinds = ("pictures",) if leg == "head" else ("pictures", "sounds", "texts")
    held_out = ",".join(f'{kind}={{shards="{kind}/{"test" if kind == "pictures" else "train"}-*.tar"}}' for kind in kinds)
    train = ['--data.train={pictures={shards="pictures/train-*.tar"}}'] if leg == "head" else []
    return recipe_over(
        root,
        *train,
        f"--data.held_out={{{held_out}}}",
        "--evaluation.tasks_every=1",
        f"--evaluation.tasks_samples={NUM_SAMPLES}",
        f"--evaluation.tasks_batch_size={BATCH_SIZE}",
        "--evaluation.tasks_max_new_tokens=8",
        "--loss.task_weights={}",
        "--optim.lr=1e-2",
        "--schedule.warmup_steps=0",
        *LEGS[leg],
    )


class Kept:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.shown: list[str] = []
        self.shows = True

    def numbers(self, step: int, values: dict[str, Any]) -> None:
        self.values |= values

    def show(self, step: int, name: str, content: Any) -> None:
        self.shown.append(f"{type(content).__name__} {name}")


def on_ranks(root: str, output: str) -> dict[str, Any]:
    """On each rank: both legs of training, then samples put to a model in step."""
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=120)
    facts: dict[str, Any] = {leg: train_and_ask(held_out_recipe(Path(root), leg), Path(output) / leg, world) for leg in LEGS}
    facts["in_step"] = ask_in_step(Path(root), Path(output), world)
    distributed.stop()
    return facts


def train_and_ask(recipe: Recipe, run: Path, world: Any) -> dict[str, Any]:
    """A few steps, a checkpoint, tasks, two steps; then the last two once more from the checkpoint without tasks."""
    from megamm.checkpoint.commit import Progress
    from megamm.checkpoint.load import load
    from megamm.engine.distributed import barrier
    from megamm.train.build import build_trainer, load_tokenizer
    from megamm.train.data import TrainingData
    from megamm.train.step import count, train_step
    from tests.support.checkpoints import save

    data = TrainingData.open(recipe, load_tokenizer(recipe), world)
    with data.loader(data.plan.start(), world) as loader:
        steps = [next(loader) for _ in range(4)]
    tasks = TaskEvaluation.open(recipe, RunFolder(run), data.plan.tokenizer, world)
    trainer = build_trainer(recipe, data.plan.tokenizer, world)
    facts = {"datasets": tuple(data.plan.datasets), "tasks": data.tasks, "waited_seconds": 0.0, "flops": 0, "failed": False}

    def losses(some: list[Any]) -> list[float]:
        counts = [count(one.micro_batches, skipped=[], stop_requested=False, world=world, **facts) for one in some]
        both = zip(some, counts, strict=True)
        return [train_step(trainer, one.micro_batches, total, world=world, tasks=data.tasks).loss for one, total in both]

    # Often enough that answers differ.
    losses(steps[:2] * 6)
    if world.is_main:
        run.mkdir()
    barrier()
    progress = Progress(step=2, fingerprints={"tokenizer": data.plan.tokenizer.fingerprint})
    saved = save(run / "checkpoints", trainer.engine, world, progress)
    journal, before = Kept(), random_digest()
    tasks.run(trainer.engine, 2, where=Whereabouts(), journal=journal)
    is_training, after = trainer.engine.module.training, random_digest()
    with_tasks = losses(steps[2:])
    load(saved, trainer.engine, world)
    without = losses(steps[2:])
    trainer.engine.close()
    told = {"values": journal.values, "shown": journal.shown, "is_training": is_training, "drew": before != after}
    return told | {"with": with_tasks, "without": without}


def random_digest() -> str:
    """Of the state that everything random in training draws from."""
    states = torch.get_rng_state().numpy().tobytes() + np.random.get_state()[1].tobytes()
    return hashlib.sha256(states).hexdigest()


def ask_in_step(root: Path, output: Path, world: Any) -> dict[str, Any]:
    """Every way of judging, with more on one rank than on the other; how many forwards each took."""
    loaded = items_model(output / f"items{world.rank}")
    forwards = []
    loaded.model.register_forward_pre_hook(lambda module, args, kwargs: forwards.append(1), with_kwargs=True)
    places = list_places({name: str(root / "ways" / f"{name}.tar") for name in ("items", "texts", "labels")})
    own = places[:-1] if world.is_main else places[-1:]
    found = judge_in_step(loaded, read_samples(own), world=world, batch_size=2, max_new_tokens=4, moved=lambda: None)
    return {"num_forwards": len(forwards), "results": [without_place(one) for one in found]}


def items_model(folder: Path) -> Any:
    items = ItemTable(("cup", "hat", "lamp", "shoe"), ("",) * 4, np.array([[0, 0], [0, 1], [1, 0], [1, 2]], dtype=np.int32), 3)
    pieces = text.train(SENTENCES * 4, Tokenizer(text_size=320, item_levels=2, item_codes=3), folder / "tokenizer", items=items)
    return random_model(folder, pieces=pieces)


def without_place(result: Any) -> dict[str, Any]:
    """What was said of a sample, without the scores of its answer."""
    value = result.to_json()
    if "answer" in value:
        return {"key": value["key"], "text": value["answer"]["text"], "items": [item["id"] for item in value["answer"].get("items", [])]}
    return {"key": value["key"], "nats": value["nats"]}


def make_ways(folder: Path) -> None:
    def item(name: str) -> dict[str, str]:
        return {"type": "item", "id": name}

    def met(*names: str) -> dict[str, bytes]:
        turns = [{"role": "user", "content": [item(name) for name in names]}, {"role": "assistant", "content": [item("lamp")]}]
        return as_files({"task": "recommendation", "messages": turns})

    write_index(write_tar(folder / "items.tar", {"i0": met("cup"), "i1": met("hat", "cup", "shoe"), "i2": met("shoe")}))
    write_index(write_tar(folder / "texts.tar", {"t0": as_files(text_document("two is a number"))}))
    image = {"type": "image", "member": "0.png"}
    pictures = {f"p{n}": as_files(chat([image], "one"), _0_png=jpeg(20, 30, seed=n, format="PNG")) for n in range(4)}
    write_index(write_tar(folder / "labels.tar", pictures))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What both ranks did, the folder of the data and that of the runs."""
    root, output = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    make_data(root, num_each=10)
    make_ways(root / "ways")
    results = run_ranks(on_ranks, 2, str(root), str(output), timeout_seconds=400)
    for leg in LEGS:
        recipe = held_out_recipe(root, leg)
        write_json(output / leg / "config.json", to_dict(recipe))
        (output / leg / "tokenizer").symlink_to(root / "tokenizer")
    return results, root, output


@pytest.mark.distributed
@pytest.mark.parametrize("leg", LEGS)
def test_answers_are_those_of_an_evaluation_of_the_checkpoint(asked, leg):
    results, _, output = asked
    lines = (output / leg / "answers" / "step_00000002.jsonl").read_text().splitlines()
    report = evaluate(output / leg, max_samples=NUM_SAMPLES, batch_size=BATCH_SIZE, max_new_tokens=8, device="cpu")
    wanted = [json.dumps(record.to_json()) for record in report.records]
    assert [without_scores(json.loads(line)) for line in lines] == [without_scores(json.loads(line)) for line in wanted]
    assert leg == "tokens" or len({record.answer.text for record in report.records}) > 1
    assert len(lines) == (5 if leg == "head" else 15)
    values = results[0][leg]["values"]
    for row in report.rows:
        assert values[f"evaluation/{row.dataset}/{row.metric}"] == pytest.approx(row.value, rel=1e-4), row.metric
    assert values["evaluation/pictures/samples"] == 5 and results[1][leg]["values"] == {}


def without_scores(value: dict[str, Any]) -> dict[str, Any]:
    """Probabilities and likelihoods are rounded otherwise in other batches."""
    value = {**value, "answer": {**value.get("answer", {}), "labels": [], "probability": None}}
    return {name: round(content, 2) if name == "nats" else content for name, content in value.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("leg", LEGS)
def test_training_goes_on_as_if_nobody_had_asked(asked, leg):
    for rank in asked[0]:
        assert rank[leg]["with"] == rank[leg]["without"]
        assert rank[leg]["is_training"] and not rank[leg]["drew"]


@pytest.mark.distributed
def test_answers_can_be_looked_at_and_listened_to(asked):
    shown = asked[0][0]["tokens"]["shown"]
    assert "Picture evaluation/pictures/classification" in shown and "str evaluation/sounds/speech_recognition" in shown
    assert sum(one.startswith("Sound evaluation/sounds/speech_recognition/s") for one in shown) == 2
    assert asked[0][1]["tokens"]["shown"] == []


@pytest.mark.distributed
def test_ranks_with_unequal_shares_run_as_many_forwards(asked, tmp_path):
    results, root, _ = asked
    first, second = (rank["in_step"] for rank in results)
    assert first["num_forwards"] == second["num_forwards"] > 4
    places = list_places({name: str(root / "ways" / f"{name}.tar") for name in ("items", "texts", "labels")})
    alone = judge(items_model(tmp_path), read_samples(places), tasks=(), batch_size=2, max_new_tokens=4)
    # Sums in another order round otherwise.
    by_key = {
        one["key"]: one | ({"nats": pytest.approx(one["nats"], rel=1e-4)} if "nats" in one else {}) for one in map(without_place, alone)
    }
    assert {one["key"]: one for one in first["results"] + second["results"]} == by_key
    assert len(second["results"]) == 1


def test_values_name_the_task_where_a_dataset_has_several():
    def record(number: int, task: str, dataset: str = "x") -> Answered:
        from megamm.tasks.reply import Reply

        names = {"dataset": dataset, "task": task, "shard": "a.tar", "number": number, "key": f"k{number}"}
        return Answered(**names, reference=Reply("one"), answer=Reply("one"))

    values = task_values([record(0, "classification"), record(1, "matching"), record(0, "classification", "y")])
    assert values["evaluation/x/matching/accuracy"] == values["evaluation/y/accuracy"] == 1.0
    assert values["evaluation/x/classification/samples"] == 1 and "evaluation/x/accuracy" not in values


def test_a_task_without_figures_keeps_its_number_of_samples(caplog):
    from megamm.tasks.reply import Reply

    lone = Answered(dataset="x", task="detection", shard="a.tar", number=0, key="k", reference=Reply(), answer=Reply())
    assert task_values([lone]) == {"evaluation/x/samples": 1}
    assert "x/detection has no figures" in caplog.text
