"""What is kept of the code and the settings."""

import subprocess

import pytest

from megamm.core.errors import ConfigError
from megamm.submit.snapshot import Commit, commit_of, next_folder, recipe_word, take_snapshot


@pytest.fixture
def checkout(tmp_path):
    """A checkout of one file, committed."""
    home = tmp_path / "checkout"
    for part in ("megamm", "slurm", "launchers", "ds_configs"):
        (home / part).mkdir(parents=True)
        (home / part / "file").write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(home), *words], check=True)
    return home


def test_the_commit_of_a_checkout_and_how_the_code_differs(checkout, tmp_path):
    clean = commit_of(checkout)
    assert len(clean.name) == 40 and not clean.patch and not clean.is_modified
    # Outside of the code nothing counts.
    (checkout / "notes").write_text("mine\n")
    assert commit_of(checkout) == clean
    (checkout / "slurm" / "new.sh").write_text("new\n")
    assert commit_of(checkout) == Commit(clean.name, "", True)
    (checkout / "megamm" / "file").write_text("two\n")
    assert "-one\n+two" in commit_of(checkout).patch
    assert commit_of(tmp_path / "none") == Commit()


def test_numbers_of_submissions_go_on(tmp_path):
    folder = tmp_path / "submissions"
    assert next_folder(folder) == folder / "0001"
    (folder / "0009").mkdir(parents=True)
    (folder / ".0010.7.tmp").mkdir()
    assert next_folder(folder) == folder / "0010"


def test_a_snapshot_is_whole_or_not_there(plan, tmp_path, recipe):
    planned = plan("--optim.lr", "1e-3")
    folder = next_folder(planned.snapshots)
    take_snapshot(planned, folder)
    own = {path.name for path in folder.iterdir()}
    assert {"megamm", "slurm", "launchers", "ds_configs", "recipe.toml", "config.json"} <= own
    assert recipe_word(planned, folder) == str(folder / "recipe.toml") and (folder / "recipe.toml").read_text() == recipe.read_text()
    assert not list(folder.rglob("__pycache__")) and (folder / "megamm" / "recipes" / "tiny.toml").is_file()
    recipe.unlink()
    with pytest.raises(FileNotFoundError):
        take_snapshot(planned, next_folder(planned.snapshots))
    assert [path.name for path in (planned.run / "submissions").iterdir()] == ["0001"]


def test_two_submissions_at_one_moment_do_not_mix(plan):
    planned = plan()
    folder = next_folder(planned.snapshots)
    take_snapshot(planned, folder)
    with pytest.raises(ConfigError, match="another submission at this moment"):
        take_snapshot(planned, folder)


def test_a_shipped_recipe_is_named_as_the_snapshot_ships_it(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_word(plan(recipe="tiny"), tmp_path) == "tiny"
