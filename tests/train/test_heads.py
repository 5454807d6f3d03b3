"""Heads under ZeRO-3, from real shards: two ranks equal one, the loss falls, a resume is exact, and the run answers."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megamm.config import Recipe, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import write_json
from megamm.core.types import Sample
from megamm.data.samples.mapping import OWN_FORM, read_sample
from megamm.data.shards.index import load_index, write_index
from megamm.data.shards.reader import LocalReader, ShardReader
from megamm.inference.heads import predict
from megamm.inference.load import load_model
from tests.support.ranks import run_ranks
from tests.support.recipes import write_recipe
from tests.support.runs import WORDS, make_data, recipe_over
from tests.support.shards import as_files, chat, flac, write_tar

HEADS = {
    "linear": '{kind="linear",labels=["left","right"]}',
    "detector": '{kind="detector",labels=["left","right"],hidden_size=16,num_heads=2,num_queries=4,num_layers=1}',
    "cells": '{kind="detector",labels=["left","right"],states="vision",queries="cells",hidden_size=16,num_layers=1}',
    "towers": '{kind="linear",labels=["left","right"],states="towers",hidden_layers=1,hidden_size=16}',
    "segmenter": '{kind="segmenter",labels=["left","right"],states="vision",hidden_size=8,num_layers=1}',
    "ctc": f'{{kind="ctc",labels={json.dumps(sorted(set("".join(WORDS))))},states="audio",hidden_size=16}}',
    "masked": '{kind="masked",states="towers",mask_share=0.5}',
}
ANSWERING = tuple(name for name in HEADS if name != "masked")
SAVED_STEP = 5
# The first test waits for what all heads do on one rank and on two.
pytestmark = pytest.mark.timeout(900)
CHECKOUT = Path(__file__).resolve().parents[2]


def make_head_data(root: Path) -> None:
    """Pictures of one or two squares, or none, with their sides as labels, boxes and masks; a label that no head knows; spoken words."""
    make_data(root, num_each=5)
    kinds: dict[str, dict[str, Any]] = {name: {} for name in HEADS}
    for number in range(16):
        name = f"p{number:03d}"
        boxes = [("left", [2, 4, 12, 14]), ("right", [18, 2, 30, 14])][number % 2 : 1 + number % 3]
        values = np.zeros((16, 32), np.uint8)
        for instance, (_, (x1, y1, x2, y2)) in enumerate(boxes, 1):
            values[y1:y2, x1:x2] = instance
        picture = _png(np.where(values[..., None] > 0, 255, 40).repeat(3, axis=2).astype(np.uint8))
        ask = [{"type": "image", "member": "0.png"}, {"type": "text", "text": "which digit is it?"}]
        side = "elsewhere" if number == 5 else ("left", "right")[number % 2]
        kinds["linear"][name] = as_files(chat(ask, side), _0_png=picture)
        found = {"type": "boxes", "image": 0, "boxes": [{"label": label, "xyxy": xyxy} for label, xyxy in boxes]}
        kinds["detector"][name] = as_files(chat(ask, "") | {"messages": _turns(ask, found)}, _0_png=picture)
        kinds["cells"][name] = kinds["detector"][name]
        mask = {"type": "mask", "image": 0, "member": "1.png", "labels": [label for label, _ in boxes]}
        kinds["segmenter"][name] = as_files(chat(ask, "") | {"messages": _turns(ask, mask)}, _0_png=picture, _1_png=_png(values))
        spoken = [{"type": "audio", "member": "0.flac"}]
        sound = flac(9000 + 500 * (number % 5), seed=number)
        kinds["ctc"][name] = as_files(chat(spoken, WORDS[number % 10], task="speech_recognition"), _0_flac=sound)
        # One of three samples lacks the picture, one the sound, so that some micro-steps have nothing for a tower.
        both = {"_0_png": picture, "_0_flac": sound}
        lacking = (ask[1:] + spoken, ask, ask + spoken)[number % 3]
        kinds["towers"][name] = as_files(chat(lacking, ("left", "right")[number % 2]), **{key: both[key] for key in _named(lacking)})
        # Pictures and sounds fall unevenly on ranks and micro-steps, and answers are nobody's business.
        kinds["masked"][name] = kinds["linear"][name] if number % 3 else kinds["ctc"][name]
    for kind, samples in kinds.items():
        write_index(write_tar(root / kind / "train-00000.tar", samples))


def _named(parts: list[dict]) -> list[str]:
    return [f"_{part['member'].replace('.', '_')}" for part in parts if "member" in part]


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    return file.getvalue()


def _turns(question: list[dict], answer: dict) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": [answer]}]


def head_recipe(root: Path, name: str) -> Recipe:
    """Five rows a step, two at once: some slots are empty, so some micro-steps have nothing for the head."""
    return recipe_over(
        root,
        f'--data.train={{{name}={{shards="{name}/train-*.tar"}}}}',
        "--data.held_out={}",
        "--loss.task_weights={}",
        f"--model.head={HEADS[name]}",
        "--engine.precision=fp32",
        "--optim.max_grad_norm=0",
        # One looks at the decoder, which takes no such strides.
        f"--optim.lr={1e-3 if name == 'linear' else 1e-2}",
        "--schedule.warmup_steps=0",
        "--batch.row_tokens=64",
        "--batch.global_rows=5",
        "--batch.micro_rows=2",
    )


def on_ranks(root: str, output: str) -> dict[str, Any]:
    """On each rank: the first step of every head; on two ranks a small run of each as well."""
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=300)
    facts = {name: train_head(head_recipe(Path(root), name), Path(output) / name, world) for name in HEADS}
    distributed.stop()
    return facts


def train_head(recipe: Recipe, run: Path, world: Any) -> dict[str, Any]:
    """Train on one step's data again and again, and its second half once more from a checkpoint; keep the first gradients."""
    from deepspeed.utils import safe_get_full_grad

    from megamm.checkpoint.commit import Progress
    from megamm.checkpoint.load import load
    from megamm.train.build import build_trainer, load_tokenizer
    from megamm.train.data import TrainingData
    from megamm.train.step import count, train_step
    from tests.support.checkpoints import save

    data = TrainingData.open(recipe, load_tokenizer(recipe), world)
    with data.loader(data.plan.start(), world) as loader:
        step = next(loader)
    trainer = build_trainer(recipe, data.plan.tokenizer, world)
    facts = {"datasets": tuple(data.plan.datasets), "tasks": data.tasks, "waited_seconds": 0.0, "flops": 0, "failed": False}
    counts = count(step.micro_batches, skipped=[], stop_requested=False, world=world, **facts)
    gradients: dict[str, torch.Tensor] = {}
    apply = trainer.engine.step

    def step_keeping_gradients() -> bool:
        gradients.update({name: safe_get_full_grad(param) for name, param in trainer.engine.module.named_parameters()})
        trainer.engine.step = apply
        return apply()

    def losses(num_steps: int) -> list[float]:
        return [train_step(trainer, step.micro_batches, counts, world=world, tasks=data.tasks).loss for _ in range(num_steps)]

    trainer.engine.step = step_keeping_gradients
    found: dict[str, Any] = {"keys": step.keys, "first": losses(1)}
    if world.is_main:
        run.mkdir()
        save_file(gradients, run / "gradients.safetensors")
    if world.size > 1:
        found["first"] += losses(SAVED_STEP - 1)
        folder = save(
            run / "checkpoints",
            trainer.engine,
            world,
            Progress(step=SAVED_STEP, fingerprints={"tokenizer": data.plan.tokenizer.fingerprint}),
        )
        found["second"] = losses(SAVED_STEP)
        load(folder, trainer.engine, world)
        found["again"] = losses(SAVED_STEP)
    trainer.engine.close()
    return found | {"num_samples": counts.num_supervised, "own_samples": sum(int((one.weights > 0).sum()) for one in step.micro_batches)}


def launch(folder: Path, num_ranks: int, *words: str) -> None:
    """One command on ranks, from a folder, which must end in order."""
    command = [str(CHECKOUT / "launchers" / "local.sh"), str(num_ranks), "megamm", *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=580)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What both worlds did, and the folder of the runs."""
    root = tmp_path_factory.mktemp("heads")
    make_head_data(root)
    results = {}
    for world_size in (1, 2):
        output = tmp_path_factory.mktemp(f"world{world_size}")
        results[world_size] = run_ranks(on_ranks, world_size, str(root), str(output), timeout_seconds=400), output
    for name in HEADS:
        run = results[2][1] / name
        write_json(run / "config.json", to_dict(head_recipe(root, name)))
        shutil.copytree(root / "tokenizer", run / "tokenizer")
    return results, root


@pytest.mark.distributed
@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_equal_one(trained, name):
    ((one,), folder_one), (two, folder_two) = trained[0][1], trained[0][2]
    assert one[name]["keys"] == two[0][name]["keys"] and one[name]["num_samples"] == two[1][name]["num_samples"]
    # Boxes, pixels and characters are divided unevenly: means over each rank's own would not agree.
    assert two[0][name]["own_samples"] != two[1][name]["own_samples"]
    assert two[0][name]["first"] == two[1][name]["first"] and two[0][name]["first"][0] == pytest.approx(one[name]["first"][0], rel=1e-5)
    first, second = (load_file(folder / name / "gradients.safetensors") for folder in (folder_one, folder_two))
    assert first.keys() == second.keys() and any(key.startswith("head.") and gradient.any() for key, gradient in first.items())
    for key, gradient in first.items():
        torch.testing.assert_close(second[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.distributed
def test_a_label_outside_the_set_is_skipped(trained):
    (one,), _ = trained[0][1]
    assert "linear/p005" not in one["linear"]["keys"] and len(one["linear"]["keys"]) > 8


@pytest.mark.distributed
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_falls_and_a_resume_is_exact(trained, name):
    for rank in trained[0][2][0]:
        assert rank[name]["again"] == rank[name]["second"]
        assert rank[name]["second"][-1] < 0.9 * rank[name]["first"][0]


@contextmanager
def samples_of(tar: Path) -> Iterator[list[Sample]]:
    reader = LocalReader()
    index = load_index(tar)
    shard = ShardReader(tar, index, reader)
    yield [read_sample(shard, number, OWN_FORM, media=True) for number in range(index.num_samples)]
    reader.close()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ANSWERING)
def test_the_run_answers_in_types_of_its_task(trained, name):
    loaded = load_model(trained[0][2][1] / name, device="cpu")
    with samples_of(trained[1] / name / "train-00000.tar") as samples:
        together, alone = predict(loaded, samples[:5]), predict(loaded, samples[:5], batch_size=1)
    assert len(together) == 5
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text and len(one.boxes) == len(other.boxes)
        assert [label.label for label in one.labels] == [label.label for label in other.labels]
        if name in ("linear", "towers"):
            assert one.text in ("left", "right") and len(one.labels) == 2
        for box in one.boxes:
            assert box.label in ("left", "right") and 0 <= box.xyxy[0] < box.xyxy[2] <= 32 and 0 <= box.xyxy[1] < box.xyxy[3] <= 16
        assert all(instance.size == (16, 32) for instance in one.instances)


@pytest.mark.distributed
def test_a_run_that_filled_in_answers_nothing_and_says_so(trained):
    loaded = load_model(trained[0][2][1] / "masked", device="cpu")
    with (
        samples_of(trained[1] / "linear" / "train-00000.tar") as samples,
        pytest.raises(ConfigError, match="answers nothing"),
    ):
        predict(loaded, samples[:2])


@pytest.mark.distributed
@pytest.mark.integration
def test_finetune_trains_a_head_on_weights_of_a_run_that_had_another(trained):
    run, root = trained[0][2][1] / "masked", trained[1]
    table = to_dict(head_recipe(root, "linear"))
    del table["model"]["head"]
    write_recipe(root / "recipe.toml", table)
    words = ["--head", "linear", '--model.head.labels=["left","right"]', "--model.text.trainable=false", "--model.vision.trainable=false"]
    launch(root, 1, "finetune", str(run), "recipe.toml", "--run", "probe", "--train.steps=2", *words)
    before, after = load_model(run, device="cpu").model, load_model(root / "probe", device="cpu").model
    assert after.head.settings.kind == "linear" and before.head.settings.kind == "masked"
    assert torch.equal(
        before.model.vision_tower.embeddings.patch_embedding.weight, after.model.vision_tower.embeddings.patch_embedding.weight
    )
    skipped = (root / "probe" / "logs" / "skipped.rank_00000.jsonl").read_text()
    assert "'elsewhere' is not among the 2 of model.head.labels" in skipped
