"""`megamm checkpoint ...` as an operator types it."""

import json

import pytest

from megamm.cli import main
from megamm.config import load_recipe, to_dict
from megamm.core.files import write_json
from tests.support.checkpoints import some_tensors, write_checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / "run" / "checkpoints", step, some_tensors())
    write_json(tmp_path / "run" / "config.json", to_dict(load_recipe("tiny", ["--checkpoint.keep_last", "2"])))
    return tmp_path / "run"


def said(capsys, *words, code=0):
    assert main(["checkpoint", *map(str, words)]) == code
    out = capsys.readouterr()
    return out.out.splitlines() if code == 0 else out.err.strip()


def test_list_show_and_verify(run, capsys):
    folder = run / "checkpoints"
    assert [line.split()[0] for line in said(capsys, "list", run)] == ["step_00000010", "step_00000020", "step_00000030"]
    assert [entry["step"] for entry in json.loads("\n".join(said(capsys, "list", run, "--json")))] == [10, 20, 30]
    assert json.loads("\n".join(said(capsys, "show", folder / "step_00000020")))["data_state"] == {"row": 3}
    assert len(said(capsys, "verify", *sorted(folder.iterdir()))) == 3
    (folder / "step_00000020" / "data_state.json").write_text("{}")
    assert "data_state.json" in said(capsys, "verify", *sorted(folder.iterdir()), code=1)
    (folder / "step_00000030" / "ledger.jsonl").unlink()
    problems = said(capsys, "verify", *sorted(folder.iterdir()), code=1)
    assert len(problems.splitlines()) == 2 and "step_00000020" in problems and "step_00000030" in problems, "each is looked at"
    assert "data_state.json" in said(capsys, "list", run, "--verify")[1]


def test_prune_keeps_what_the_recipe_says_or_less(run, capsys):
    assert said(capsys, "prune", run) == ["deleted step_00000010"]
    assert said(capsys, "prune", run, "--keep-last", "1") == ["deleted step_00000020"]
    assert "--keep-last 1 or more" in said(capsys, "prune", run, "--keep-last", "0", code=1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000030"]


def test_reshard(run, tmp_path, capsys):
    source, target = run / "checkpoints" / "step_00000030", tmp_path / "other" / "checkpoints"
    assert said(capsys, "reshard", source, "--ranks", "3", "--output", target) == [str(target / "step_00000030")]
    assert "written by 3 ranks" in said(capsys, "verify", target / "step_00000030")[0]
    assert "holds step_00000030 already" in said(capsys, "reshard", source, "--ranks", "3", "--output", target, code=1)
    assert "give 1 or more" in said(capsys, "reshard", source, "--ranks", "0", "--output", target, code=1)
