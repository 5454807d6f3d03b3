import json

import pytest

from megamm.config import load_recipe, resumed_recipe, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import write_json
from megamm.telemetry.failures import record_stall
from megamm.telemetry.heartbeat import Heartbeats, beat
from megamm.telemetry.whereabouts import Whereabouts, Who
from megamm.train.run_folder import RunFolder, differences, environment


def started(path, overrides=()):
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", to_dict(load_recipe("tiny", overrides)))
    (path / "checkpoints" / "step_00000010").mkdir(parents=True)
    return RunFolder(path)


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunFolder(tmp_path).check(load_recipe("tiny"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_launcher_or_a_start_that_was_killed_left_does_not_hinder_the_next(tmp_path):
    who, where = Who(1, 0, 2), Whereabouts()
    Heartbeats(tmp_path).write(beat(who, where.place, 0, num_collectives=0))
    record_stall(tmp_path, who, {"step": 0, "phase": "start"}, message="nothing moves", beats=[], silent=[1])
    (tmp_path / "logs").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "heartbeats", "logs"]
    RunFolder(tmp_path).check(load_recipe("tiny"))


def test_a_run_that_never_committed_anything_takes_a_mended_recipe(tmp_path):
    folder = started(tmp_path)
    (folder.checkpoints / "step_00000010").rmdir()
    folder.check(load_recipe("tiny", ["--optim.lr=0.5"]))
    folder.check(load_recipe("tiny"), resume="never")
    mended = load_recipe("tiny", ["--optim.lr=0.5"])
    assert resumed_recipe(folder.config, mended, ()) == mended


def test_what_changes_the_computation_is_refused_by_name(tmp_path):
    folder = started(tmp_path)
    with pytest.raises(ConfigError, match=r"differs in optim\.lr"):
        folder.check(load_recipe("tiny", ["--optim.lr", "1e-4"]))


def test_what_only_changes_the_execution_may_change(tmp_path):
    folder = started(tmp_path)
    folder.check(load_recipe("tiny", ["--batch.micro_rows", "2", "--data.decode_workers", "3", "--telemetry.every", "5"]))


def test_the_mixture_may_change_and_other_data_when_asked(tmp_path):
    folder = started(tmp_path)
    schedule = "--data.schedule=[{step=20,weights={digits=2.0}}]"
    folder.check(load_recipe("tiny", ["--data.train.digits.weight", "3.5", schedule]))
    shards = load_recipe("tiny", ["--data.train.digits.shards", "other/*.tar", "--data.window", "64"])
    with pytest.raises(ConfigError, match=r"differs in data\.train\.digits\.shards, data\.window"):
        folder.check(shards)
    folder.check(shards, data_may_change=True)
    with pytest.raises(ConfigError, match=r"differs in optim\.lr"):
        folder.check(load_recipe("tiny", ["--optim.lr", "1e-4"]), data_may_change=True)


def test_markers_replace_each_other(tmp_path):
    folder = RunFolder(tmp_path)
    folder.stop.touch()
    folder.mark(folder.interrupted, step=3, reason="SIGTERM")
    assert json.loads(folder.interrupted.read_text()) == {"step": 3, "reason": "SIGTERM"}
    assert not folder.stop.exists()
    folder.mark(folder.done, step=9)
    assert folder.done.exists() and not folder.interrupted.exists()


def test_environment_holds_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    facts = environment()
    assert facts["versions"]["torch"] and facts["versions"]["megamm"] != "not installed"
    assert "secret-value" not in json.dumps(facts)


def test_differences_are_dotted():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c", "d"]
