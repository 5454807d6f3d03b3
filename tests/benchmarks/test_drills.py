"""The drill table: its judges notice what is lost, its rows are kept, and the short form of each drill loses nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.drills import chains, damage, kills, pickles, table
from benchmarks.drills.__main__ import DRILLS, MODULES, chosen, run_all, run_one
from benchmarks.drills.drill import Drill, Tally
from benchmarks.drills.ranks import Stuck, judged, run_ranks
from benchmarks.drills.saving import State, problem_with, save_alone, state_at
from benchmarks.drills.table import Outcome
from megamm.core.files import read_json

ROOT = Path(__file__).resolve().parents[2]
OWN = ("kills", "power", "damage", "foreign", "owners", "disks", "full_disk", "pickles", "chains")
OWN_FAULTS = [drill.fault for name in OWN for drill in MODULES[name].DRILLS]


def test_a_tally_counts_problems_and_shows_the_first():
    tally = Tally.of(["", "torn", "", "worse"], "how")
    assert (tally.tries, tally.survived, tally.lost, tally.note) == (4, 2, 2, "how; first loss: torn")
    assert Tally.of(["", ""]) == Tally(2, 2, 0)
    with pytest.raises(ValueError, match="are not 3 tries"):
        Tally(3, 1, 1)


def test_faults_have_names_of_their_own():
    assert len(DRILLS) == sum(len(module.DRILLS) for module in MODULES.values())


def test_drills_are_chosen_by_module_and_by_words():
    assert [drill.fault for drill in chosen(["kills"])] == [drill.fault for drill in kills.DRILLS]
    assert {drill.fault for drill in chosen(["bit flips", "pickles"])} == {damage.DRILLS[0].fault, *(one.fault for one in pickles.DRILLS)}
    assert chosen(None) == list(DRILLS.values())
    assert chosen(["no such fault"]) == []


def test_rows_are_written_as_they_come_and_replaced_alone(tmp_path, monkeypatch):
    """A run that is cut short keeps its rows and says so; `--only` puts a row in its place among those that are there."""
    seen = []

    def note(size, folder):
        seen.append(
            table.path_of(quick=True, folder=tmp_path).exists() and read_json(table.path_of(quick=True, folder=tmp_path))["command"]
        )
        return Tally.of([""])

    drills = [Drill("one", note), Drill("two", note), Drill("three", lambda size, folder: Tally.of(["lost"]), needs_engine=True)]
    monkeypatch.setattr("benchmarks.drills.__main__.DRILLS", {drill.fault: drill for drill in drills})
    run_all(drills, "quick", "run", folder=tmp_path, only=[])
    assert seen == [False, "run (cut short after 1 of 3 drills)"]
    again = [Drill("three", lambda size, folder: Tally.of(["", ""], "again"), needs_engine=True)]
    run_all(again, "quick", "run --quick", folder=tmp_path, only=["three"])
    rows, command = table.read(table.path_of(quick=True, folder=tmp_path))
    assert command == "run, then --only 'three'"
    assert [(fault, outcome.tally.tries, outcome.with_engine) for fault, outcome in rows.items()] == [
        ("one", 1, False),
        ("three", 2, True),
        ("two", 1, False),
    ]
    text = (tmp_path / "drills-quick.md").read_text()
    assert text.index("| one |") < text.index("| two |") < text.index("| three | 2 | 2 | 0 |")


def test_a_drill_that_fails_is_a_loss(capsys):
    def fail(size, folder):
        raise KeyError("planted")

    outcome = run_one(Drill("broken", fail), "quick")
    assert (outcome.tally.tries, outcome.tally.lost) == (1, 1)
    assert "KeyError: 'planted'" in outcome.tally.note


def test_a_drill_that_was_not_tried_holds_nothing(tmp_path):
    path = table.write(
        {"a": Outcome(Tally(0, 0, 0, "not allowed"), 0.1), "b": Outcome(Tally(2, 2, 0), 0.2)}, "run", quick=True, folder=tmp_path
    )
    assert [(row["value"], row["holds"]) for row in read_json(path)["rows"]] == [("not tried", False), (0, True)]


def test_ranks_agree_die_and_hang_alone():
    ended = run_ranks(lambda world: world.rank if world.rank else os.kill(os.getpid(), 9), 2)
    assert [(one.result, one.status) for one in ended] == [(None, -9), (1, 0)]
    (ended,) = run_ranks(lambda world: 1 // 0, 1)
    assert ended.error.startswith("ZeroDivisionError")
    with pytest.raises(Stuck):
        run_ranks(lambda world: os.read(os.pipe()[0], 1), 1, timeout_seconds=0.5)
    assert [problem.startswith("ZeroDivisionError") for problem in judged(lambda world: 1 // 0, 2)] == [True, True]


def test_a_state_that_is_another_one_is_noticed(tmp_path):
    state = state_at(10)
    folder = save_alone(tmp_path / "run", state, 3)
    assert problem_with(folder, state, num_ranks=2) == ""
    changed = {**state.tensors, "exp_avg/scale": state.tensors["exp_avg/scale"] + 1}
    assert "exp_avg/scale is not what was saved" in problem_with(folder, State(10, changed, state.data_state, state.ledger))
    assert "the ledger" in problem_with(folder, State(10, state.tensors, state.data_state, []))
    assert "holds step 10" in problem_with(folder, state_at(20))


@pytest.mark.parametrize("harm", damage.HARMS)
def test_every_harm_changes_a_file(harm):
    content, rng = bytes(range(1, 200)), random.Random(1)
    change, _ = damage.HARMS[harm]
    assert all(change(content, rng) != content for _ in range(20))


def test_damage_that_nobody_did_is_no_survival(tmp_path, monkeypatch):
    """A judge that is shown a whole checkpoint calls the try lost."""
    monkeypatch.setattr(damage, "_apply", lambda change, path, rng: None)
    tally = damage.harm_checkpoint("bit flips", "quick", tmp_path)
    assert tally.lost == tally.tries > 0 and "verified as if it were whole" in tally.note


def test_every_trap_works_where_it_is_loaded(tmp_path):
    canary = tmp_path / "canary"
    for name, trap in pickles.traps(canary, tmp_path).items():
        assert pickles._works(trap, name, canary, tmp_path), name


def test_a_chain_that_begins_anew_at_a_hop_is_lost(tmp_path, monkeypatch):
    tokenizer = chains._tokenizer(tmp_path)
    assert chains._planned_problem(1, tokenizer) == ""
    monkeypatch.setattr(chains, "restarted", lambda plan, saved, leg: plan.start())
    assert "are not those of the unbroken run" in chains._planned_problem(1, tokenizer)


def test_a_chain_whose_ranks_take_each_others_slices_is_lost(tmp_path, monkeypatch):
    tokenizer, updated = chains._tokenizer(tmp_path), chains._updated
    monkeypatch.setattr(chains, "_updated", lambda own, keys, rank, num_ranks: updated(own, keys, 0, num_ranks))
    assert "is not what was saved" in chains._planned_problem(1, tokenizer)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, Outcome]:
    """The short form of all drills without ranks of the engine, through the command."""
    folder = tmp_path_factory.mktemp("drills")
    command = [sys.executable, "-m", "benchmarks.drills", "--quick", "--output", str(folder), "--only", *OWN]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows, _ = table.read(table.path_of(quick=True, folder=folder))
    assert rows, ended.stderr
    return rows


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_the_short_form_loses_nothing(quick, fault):
    tally = quick[fault].tally
    if not tally.tries:
        pytest.skip(tally.note)
    assert tally.lost == 0, tally.note
