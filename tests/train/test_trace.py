"""What `data report` and `data trace` say of a run folder, against what real loaders delivered at several world sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megamm.checkpoint.manifest import DATA_STATE, LEDGER, MANIFEST, Manifest, rank_file, step_folder
from megamm.checkpoint.shards import write_file
from megamm.cli import main
from megamm.config import to_dict
from megamm.core.errors import ConfigError, DataError
from megamm.core.files import canonical_json, write_json
from megamm.core.json_lines import JsonLines
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.plan import DataPlan
from megamm.tokenizers.text import TextTokenizer
from megamm.train.data import plan_all_lengths
from megamm.train.data_report import read_report
from megamm.train.positions import FILE, PositionLog, Scale, sample_keys_digest
from megamm.train.skipped import SkippedLog, cut_back_skipped, read_skipped
from megamm.train.trace import trace_step
from tests.support.runs import corrupt_pictures, make_data, recipe_over

NUM_STEPS = 13
WORLD_SIZES = (1, 2, 3, 5)
EXCLUDED = "texts/t003"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as two ranks leave it after 13 steps: positions, skipped samples, digests; some pictures are rotten."""
    folder = tmp_path_factory.mktemp("run")
    make_data(folder / "data")
    corrupt_pictures(folder / "data" / "pictures" / "train-00000.tar")
    recipe = recipe_over(folder / "data", "--batch.micro_rows=1", "--train.steps=40")
    tokenizer = TextTokenizer.load(Path(recipe.tokenizer.folder))
    list(plan_all_lengths(recipe, tokenizer))
    shutil.copytree(recipe.tokenizer.folder, folder / "tokenizer")
    write_json(folder / "config.json", to_dict(recipe))
    plan = open_plan(recipe, tokenizer)
    start = plan.start().excluding([EXCLUDED])
    positions, metrics = PositionLog(folder, start, Scale(2, 1, 3)), JsonLines(folder / "metrics.jsonl")
    for rank in range(2):
        skipped = SkippedLog(folder / "logs", rank)
        with StepLoader(plan, rank=rank, world_size=2, state=start) as loader:
            for _ in range(NUM_STEPS):
                step = next(loader)
                skipped.write(step.step, step.skipped)
                if rank == 0:
                    positions.write(step.state)
                    metrics.write({"step": step.step, "loss": 1.5, "sample_keys": sample_keys_digest(step.keys)})
        skipped.close()
    positions.close()
    metrics.close()
    return folder


def open_plan(recipe, tokenizer) -> DataPlan:
    return DataPlan.open(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer, seed=recipe.seed)


@pytest.fixture(scope="module")
def delivered(run):
    """World size -> step -> rank -> the step of a real loader, beside the position that a run noted nothing about."""
    recipe = recipe_over(run / "data", "--batch.micro_rows=1", "--train.steps=40")
    plan = open_plan(recipe, TextTokenizer.load(run / "tokenizer"))
    found = {}
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            with StepLoader(plan, rank=rank, world_size=world_size, state=plan.start().excluding([EXCLUDED])) as loader:
                for number in range(1, NUM_STEPS + 1):
                    found[world_size, number, rank] = next(loader)
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_trace_of_every_step_is_what_the_loaders_delivered(run, delivered, world_size):
    for step in range(1, NUM_STEPS + 1):
        trace = trace_step(run, step, world_size=world_size)
        assert trace.sample_keys == trace.logged["sample_keys"] == sample_keys_digest(delivered[world_size, step, 0].keys)
        for rank in range(world_size):
            data = delivered[world_size, step, rank]
            mine = trace.of_rank(rank)
            for micro_step, batch in enumerate(data.micro_batches):
                for row, keys in enumerate(batch.keys):
                    traced = [one for one in mine.samples if (one.micro_step, one.row) == (micro_step, row)]
                    assert [f"{one.dataset}/{one.key}" for one in traced if not one.skipped] == keys
                    planned = [one for one in mine.rows if (one.micro_step, one.row) == (micro_step, row)]
                    sizes = [(len(traced), sum(one.tokens for one in traced))] if traced else []
                    assert [(one.samples, one.tokens) for one in planned] == sizes
            skipped = {(one.position, one.dataset, one.shard, one.key, one.skipped) for one in mine.samples if one.skipped}
            assert skipped == {(one.position, one.dataset, one.shard, one.key, one.reason) for one in data.skipped}


def test_without_a_world_size_the_trace_is_of_the_runs_own(run):
    trace = trace_step(run, 12)
    assert trace.scale == Scale(2, 1, 3) and {one.rank for one in trace.samples} == {0, 1}
    assert trace_step(run, 12, world_size=4).scale == Scale(4, 1, 2)


def test_steps_to_come_are_planned_and_said_to_be_unlogged(run):
    assert trace_step(run, 40).logged == {}
    assert "the run logged nothing yet" in trace_step(run, 40).lines()[0]
    for step in (0, 41):
        with pytest.raises(ConfigError, match=r"is not a step of .* 1 to 40"):
            trace_step(run, step)


def test_trace_refuses_ranks_and_places_that_are_not_there(run, tmp_path):
    with pytest.raises(ConfigError, match="--rank 2: the step is dealt to 2 ranks"):
        trace_step(run, 3).of_rank(2)
    with pytest.raises(ConfigError, match="less than one row a rank"):
        trace_step(run, 3, world_size=7)
    for world_size in (0, -2):
        with pytest.raises(ConfigError, match=f"--world-size {world_size}: give at least 1 rank"):
            trace_step(run, 3, world_size=world_size)
    late = shutil.copytree(run, tmp_path / "late", ignore=shutil.ignore_patterns("data"))
    lines = (late / FILE).read_text().splitlines()
    (late / FILE).write_text(lines[1].replace("}", "}", 1)[:-1] + ', "scale": {"world_size": 2, "micro_rows": 1, "accumulation": 3}}\n')
    assert trace_step(late, 11).sample_keys == trace_step(run, 11).sample_keys
    with pytest.raises(DataError, match="begins after step 10: ask for a later step"):
        trace_step(late, 10)
    (late / FILE).unlink()
    with pytest.raises(DataError, match=f"has no {FILE}"):
        trace_step(late, 11)


def test_trace_refuses_other_data_than_the_run_had(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("data"))
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "seed": config["seed"] + 1})
    with pytest.raises(DataError, match="planned from other data or settings"):
        trace_step(other, 3)


def test_report_counts_by_dataset_and_reason(run):
    report = read_report(run)
    counts = {(dataset, reason.split()[-1]): num for dataset, reason, num in report.counts()}
    assert set(counts) == {("pictures", "indexed"), ("texts", "excluded")}
    assert sum(counts.values()) == len(report.entries) == len({entry.position for entry in report.entries})
    assert [entry.position for entry in report.entries] == sorted(report.steps)
    lines = report.lines(max_entries=2)
    assert "no checkpoint yet" in lines[0] and any("the last 2 of them" in line for line in lines)


def test_report_says_a_line_of_each_accepted_change_and_what_it_gave_up(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("data"))
    recipe = recipe_over(run / "data", "--batch.micro_rows=1", "--train.steps=40")
    tokenizer = TextTokenizer.load(run / "tokenizer")
    plans = [open_plan(dataclasses.replace(recipe, seed=seed), tokenizer) for seed in range(3)]
    state = plans[0].next_step(plans[0].start()).state
    between = plans[1].resume(state, accept_change=True)
    state = plans[2].resume(between, accept_change=True)
    folder = copy / "checkpoints" / step_folder(1)
    folder.mkdir(parents=True)
    texts = {DATA_STATE: canonical_json(state.to_json()).encode(), LEDGER: b"", rank_file(0): b"", rank_file(1): b""}
    files = {name: write_file(folder / name, [text]) for name, text in texts.items()}
    manifest = Manifest(step=1, world_size=2, files=files, parameters=(), engine={})
    write_file(folder / MANIFEST, [manifest.to_text().encode()])
    report = read_report(copy)
    assert report.step == 1 and report.changes == state.changes and len(report.changes) == 2
    first, second = state.changes
    assert first.left_row, "the first change falls into the middle of a window"
    lines = report.lines()[1:3]
    assert f"the window at {first.left_position} was given up from row {first.left_row} on: seed" in lines[0]
    assert f"from position {second.position} on, no row was given up: seed" in lines[1]
    assert [one["left_row"] for one in report.to_json()["changes"]] == [first.left_row, 0]


def test_the_commands_print_tables_and_json(run, capsys):
    assert main(["data", "report", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(one["samples"] for one in printed["counts"]) == len(printed["entries"]) and printed["entries"][0]["step"] >= 1
    assert main(["data", "report", str(run)]) == 0
    assert "changed since they were indexed" in capsys.readouterr().out
    assert main(["data", "trace", str(run), "--step", "5", "--rank", "1", "--json"]) == 0
    trace = trace_step(run, 5).of_rank(1)
    assert json.loads(capsys.readouterr().out)["samples"] == [dataclasses.asdict(one) for one in trace.samples]
    assert main(["data", "trace", str(run), "--step", "5"]) == 0
    assert "as the run logged" in capsys.readouterr().out
    assert main(["data", "report", str(run / "logs")]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_what_comes_after_the_resumed_step_is_dropped_even_torn(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("data"))
    with (copy / "logs" / "skipped.rank_00000.jsonl").open("a") as file:
        file.write('{"step": 99, "posi')
    kept = [one for one in read_skipped(copy / "logs") if one.step <= 6]
    cut_back_skipped(copy / "logs", 6)
    assert read_skipped(copy / "logs") == kept and 0 < len(kept) < len(read_skipped(run / "logs"))


def test_a_resumed_run_goes_on_with_its_own_scale(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("data"))
    plan = open_plan(recipe_over(run / "data", "--batch.micro_rows=1", "--train.steps=40"), TextTokenizer.load(run / "tokenizer"))
    state = plan.start()
    for _ in range(10):
        state = plan.next_step(state).state
    PositionLog(copy, state, Scale(3, 1, 2)).close()
    assert [json.loads(line)["step"] for line in (copy / FILE).read_text().splitlines()] == [0, 10]
    assert trace_step(copy, 10).scale.world_size == 2 and trace_step(copy, 11).scale == Scale(3, 1, 2)
    assert trace_step(copy, 11).sample_keys == trace_step(run, 11).sample_keys
