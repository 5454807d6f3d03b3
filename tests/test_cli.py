"""The command line as a user meets it, most of all where something is wrong: one line, a code that is not 0, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.cli import COMMANDS, main
from megamm.config import to_dict
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over


@pytest.fixture
def data(tmp_path):
    make_data(tmp_path / "data", num_each=6)
    return tmp_path / "data"


@pytest.fixture
def recipe_file(data):
    return write_recipe(data.parent / "mine.toml", to_dict(recipe_over(data)))


def fails(capsys, *words: str) -> str:
    """Run a command that must fail; returns its one line."""
    assert main(list(words)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("megamm: "), lines
    return lines[0]


def megamm(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own (those that start the engine)."""
    command = [sys.executable, "-m", "megamm.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([*command.words, "--help"])
        assert left.value.code == 0
        assert command.help.split(".")[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["recipes", "tyni"], 1), (["trian"], 2)])
def test_a_rank_ends_with_its_code_whatever_taking_the_interpreter_apart_would_do(words, code):
    program = "import atexit, os, sys; atexit.register(os.abort); sys.argv[0] = 'megamm'; from megamm.cli import run; run()"
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # What is said has to come out of its buffer first.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    as_rank, alone = (
        subprocess.run([sys.executable, "-c", program, *words], env=environment | more, capture_output=True, check=False, timeout=120)
        for more in (rank, {})
    )
    assert (as_rank.returncode, alone.returncode) == (code, -signal.SIGABRT)
    assert as_rank.stdout.startswith(b"megamm ") == (code == 0) and as_rank.stderr.startswith(b"megamm: ") == (code != 0)


def test_unknown_command_and_missing_argument_are_usage_errors():
    for words in (["trian"], ["pretrain"], []):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2


def test_words_that_do_not_parse_are_one_line_that_names_the_help(capsys):
    cases = {
        ("data", "indx"): "see `megamm data --help`",
        ("data", "index", "x.tar", "--workers", "0"): "'0' is not a whole number of at least 1; see `megamm data index --help`",
        ("prepare", "text", "x", "--output", "y", "--part", "z"): "see `megamm prepare text --help`",
    }
    for words, told in cases.items():
        with pytest.raises(SystemExit) as left:
            main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and line.startswith("megamm: ") and line.endswith(told)


def test_a_misspelt_option_is_not_taken_for_a_key_of_the_recipe(capsys):
    for words in (["--exlude", "keys.txt"], ["--exlude"], ["--exlude=keys.txt"]):
        assert "--exlude is no option of `megamm pretrain`; did you mean 'exclude'?" in fails(capsys, "pretrain", "tiny", *words)
    assert "did you mean 'accept-data-change'?" in fails(capsys, "pretrain", "tiny", "--accept-data-changes", "--optim.lr", "1")


def test_unknown_key_suggests_the_right_one(capsys):
    assert "did you mean 'lr'" in fails(capsys, "pretrain", "tiny", "--optim.lrr", "3e-4")


def test_wrong_type_names_key_and_value(capsys):
    line = fails(capsys, "pretrain", "tiny", "--train.steps", "many")
    assert "train.steps" in line and '"many"' in line


def test_argument_of_no_command_is_refused(capsys, recipe_file):
    assert "'--shard'" in fails(capsys, "data", "verify", "x.tar", "--shard")


def test_missing_shards_are_named(capsys, recipe_file):
    line = fails(capsys, "data", "plan-lengths", str(recipe_file), '--data.train.texts.shards="none/*.tar"')
    assert "texts" in line and "none/*.tar" in line


def test_missing_tokenizer_says_which_command_makes_it(capsys, recipe_file, data):
    shutil.rmtree(data / "tokenizer")
    assert "megamm tokenizer" in fails(capsys, "data", "plan-lengths", str(recipe_file))


def test_shard_that_changed_since_it_was_indexed(capsys, recipe_file, data):
    tar = data / "texts" / "train-00000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(10240))
    line = fails(capsys, "data", "plan-lengths", str(recipe_file))
    assert "texts/train-00000.tar" in line and "changed" in line and "megamm data index" in line


def test_changed_byte_is_found_by_verify(capsys, data):
    tar = data / "texts" / "train-00000.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert "train-00000.tar" in fails(capsys, "data", "verify", str(tar))


def test_evaluating_nothing_is_an_error(capsys, tmp_path):
    assert str(tmp_path / "nowhere") in fails(capsys, "evaluate", str(tmp_path / "nowhere"))
    line = fails(capsys, "evaluate", str(tmp_path), "--shards", "x=a-*.tar", "--shards", "x=b-*.tar")
    assert "--shards names x twice" in line
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--robustness", "--changes", "blur"])


@pytest.mark.integration
def test_impossible_batch_is_explained_before_anything_is_written(recipe_file):
    words = ("pretrain", str(recipe_file), "--run", "run", "--batch.accumulation", "4", "--batch.micro_rows", "4")
    line = last_line(megamm(recipe_file.parent, *words))
    assert "global_rows=6" in line and "micro_rows 4 × accumulation 4 × world 1 = 16" in line
    assert not (recipe_file.parent / "run").exists()


@pytest.mark.integration
def test_output_folder_with_other_things_is_left_alone(recipe_file):
    run = recipe_file.parent / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("x")
    assert "is not empty and holds no run" in last_line(megamm(recipe_file.parent, "pretrain", str(recipe_file), "--run", "run"))
    assert [path.name for path in run.iterdir()] == ["thesis.tex"]


@pytest.mark.integration
def test_one_run_and_everything_that_must_not_happen_to_it(recipe_file):
    """Train two steps, then: another recipe on it, a checkpoint of another model, changed data, a damaged checkpoint."""
    folder, words = recipe_file.parent, ("pretrain", str(recipe_file))
    done = megamm(folder, *words, "--run", "run", "--stop-after", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = folder / "run" / "checkpoints" / "step_00000002"
    manifest = (checkpoint / "manifest.json").read_bytes()

    assert "differs in optim.lr" in last_line(megamm(folder, *words, "--run", "run", "--optim.lr", "1e-5"))
    assert "--resume never" in last_line(megamm(folder, *words, "--run", "run", "--resume", "never"))

    wider = "--model.text.config.intermediate_size=64"
    line = last_line(megamm(folder, *words, "--run", "other", "--resume", str(checkpoint), wider))
    assert "another model" in line and "mlp" in line

    line = last_line(megamm(folder, *words, "--run", "seeded", "--resume", str(checkpoint), "--seed", "8"))
    assert "seed was 7, is 8" in line

    (folder / "taken").mkdir()
    (folder / "taken" / "x").touch()
    assert "taken" in last_line(megamm(folder, "export", "run", "--output", "taken"))
    assert [path.name for path in (folder / "taken").iterdir()] == ["x"]

    shard = checkpoint / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert "damaged" in last_line(megamm(folder, *words, "--run", "run"))
    assert (checkpoint / "manifest.json").read_bytes() == manifest
    assert json.loads((folder / "run" / "INTERRUPTED").read_text())["step"] == 2


def test_verify_and_index_report_what_they_saw(capsys, data):
    tar = data / "texts" / "train-00000.tar"
    assert main(["data", "verify", str(tar)]) == 0 and main(["data", "index", str(tar)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tar}: 6 samples, digest ") and lines[1] == f"{tar}: 6 samples"
