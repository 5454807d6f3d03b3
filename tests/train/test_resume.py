"""Training 12 steps equals training 6, leaving, and training 6 more: through the launcher and the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megamm.checkpoint.manifest import read_manifest
from megamm.config import to_dict
from megamm.core.files import canonical_json, digest_text, read_json
from megamm.core.json_lines import read_json_lines
from megamm.evaluation import evaluate
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over

CHECKOUT = Path(__file__).resolve().parents[2]


def launch(folder: Path, num_ranks: int, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`megamm pretrain` over the data of `folder`, which must end in order."""
    command = [str(CHECKOUT / "launchers" / "local.sh"), str(num_ranks), "megamm", "pretrain", "recipe.toml", "--run", run, *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def train(folder: Path, num_ranks: int, run: str, *words: str) -> list[dict]:
    """The same; returns the run's metrics lines of training steps."""
    launch(folder, num_ranks, run, *words)
    return [line for line in read_json_lines(folder / run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, a recipe and an unbroken run of 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("resume")
    make_data(folder / "data")
    recipe = to_dict(recipe_over(folder / "data", "--evaluation.every=6", "--evaluation.rows=4", "--batch.micro_rows=1"))
    write_recipe(folder / "recipe.toml", recipe)
    # Asked about tasks on the way, which must change nothing: the others are not.
    train(folder, 2, "unbroken", "--evaluation.tasks_every=4", "--evaluation.tasks_max_new_tokens=4")
    train(folder, 2, "halves", "--stop-after", "6")
    return folder


@pytest.mark.distributed
@pytest.mark.integration
def test_a_start_that_is_there_already_trains_nothing_and_leaves_the_marker(folder):
    """First of all tests here. As after a kill between the last checkpoint and its marker."""
    run = folder / "halves"
    (run / "INTERRUPTED").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    told = launch(folder, 1, "halves", "--stop-after", "5").stderr
    assert told.count("nothing to train: the run is at step 6, and --stop-after 5 asks for no more") == 1
    assert json.loads((run / "INTERRUPTED").read_text()) == {"step": 6, "reason": "stop_after", "requeue": False}
    assert (run / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000006"]


@pytest.mark.distributed
@pytest.mark.integration
def test_half_and_half_equals_the_whole_bit_for_bit(folder):
    halves, unbroken = folder / "halves", folder / "unbroken"
    assert json.loads((halves / "INTERRUPTED").read_text())["step"] == 6
    resumed = train(folder, 2, "halves")
    whole = [line for line in read_json_lines(unbroken / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in resumed] == list(range(1, 13))
    for mine, theirs in zip(resumed, whole, strict=True):
        rates = [name for name in theirs if name.startswith("lr/")]
        assert len(rates) == 8
        for name in ("loss", "grad_norm", *rates, "sample_keys", "tokens", "tokens_total", "supervised_tokens"):
            assert mine[name] == theirs[name], f"step {mine['step']}: {name}"
    # Weights, moments and random states of both ranks: equal files have equal digests.
    mine, theirs = (read_manifest(run / "checkpoints" / "step_00000012") for run in (halves, unbroken))
    assert mine.files == theirs.files and {"rank_00000.safetensors", "rank_00001.safetensors"} <= set(mine.files)
    assert (halves / "DONE").is_file() and not (halves / "INTERRUPTED").exists()


@pytest.mark.distributed
@pytest.mark.integration
def test_tasks_are_asked_on_the_way_and_shown(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / "unbroken"
    asked = {line["step"]: line for line in read_json_lines(run / "metrics.jsonl") if "evaluation/pictures/accuracy" in line}
    assert list(asked) == [4, 8, 12] and {line["evaluation/pictures/samples"] for line in asked.values()} == {5}
    assert len((run / "answers" / "step_00000012.jsonl").read_text().splitlines()) == 5
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [one.step for one in events.Images("evaluation/pictures/classification")] == [4, 8, 12]
    assert [one.value for one in events.Scalars("evaluation/pictures/accuracy")] == pytest.approx(
        [line["evaluation/pictures/accuracy"] for line in asked.values()]
    )
    # In bf16, with the batches of two ranks; the report's are those of one.
    report = evaluate(run, batch_size=16, max_new_tokens=4, device="cpu")
    said = [json.loads(line)["answer"]["text"] for line in (run / "answers" / "step_00000012.jsonl").read_text().splitlines()]
    equal = sum(one == record.answer.text for one, record in zip(said, report.records, strict=True))
    assert equal >= len(said) - 1


@pytest.mark.distributed
@pytest.mark.integration
def test_another_number_of_ranks_goes_on_with_the_same_samples(folder):
    whole = [line for line in read_json_lines(folder / "unbroken" / "metrics.jsonl") if "loss" in line]
    source = folder / "halves" / "checkpoints" / "step_00000006"
    # A run of its own that starts from the other run's checkpoint, on one rank with another accumulation.
    lines = train(folder, 1, "single", "--resume", str(source), "--batch.micro_rows", "3")
    assert [line["step"] for line in lines] == list(range(7, 13))
    for mine, theirs in zip(lines, whole[6:], strict=True):
        assert mine["sample_keys"] == theirs["sample_keys"] and mine["tokens_total"] == theirs["tokens_total"]
        # bf16 rounds activations to 8 bits; the micro-batches differ, so sums are rounded in another order.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-3)


@pytest.mark.distributed
@pytest.mark.integration
def test_what_a_run_leaves_behind(folder):
    run = folder / "unbroken"
    names = {path.name for path in run.iterdir()}
    assert {
        "config.json",
        "ds_config.json",
        "environment.json",
        "tokenizer",
        "metrics.jsonl",
        "data_positions.jsonl",
        "tensorboard",
        "logs",
        "checkpoints",
    } <= names
    logged = {name for line in read_json_lines(run / "metrics.jsonl") for name in line}
    wanted = {"grad_norm", "lr/text", "tokens_per_second", "supervised_tokens_per_second", "padding_share", "data_wait_share", "memory_gib"}
    assert wanted | {"skipped_samples", "loss/classification", "loss/speech_recognition", "loss/text"} <= logged
    held_out = [line for line in read_json_lines(run / "metrics.jsonl") if "held_out/loss" in line]
    assert [line["step"] for line in held_out] == [6, 12]
    fingerprints = read_manifest(run / "checkpoints" / "step_00000012").fingerprints
    assert fingerprints.keys() == {"config", "model", "tokenizer"}
    assert fingerprints["config"] == digest_text(canonical_json(read_json(run / "config.json")))
    settings = json.loads((run / "ds_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3 and settings["bf16"]["enabled"] and "auto" not in json.dumps(settings)


@pytest.mark.distributed
@pytest.mark.integration
def test_a_finished_run_is_left_alone(folder):
    before = (folder / "unbroken" / "metrics.jsonl").read_bytes()
    train(folder, 1, "unbroken")
    assert (folder / "unbroken" / "metrics.jsonl").read_bytes() == before
