"""Batch scripts as sbatch reads them."""

from pathlib import Path

from megamm.submit.script import directive_problems, directives, syntax_problems

HEAD = "#!/usr/bin/env bash\n#SBATCH --nodes=2 --time=1:00:00\n\n# why\n#SBATCH --comment='a b' # more\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(text)
    return path


def test_directives_are_those_before_the_first_command(tmp_path):
    script = written(tmp_path, f"{HEAD}set -u\n#SBATCH --nodes=9\n")
    assert directives(script) == ["--nodes=2", "--time=1:00:00", "--comment=a b"]


def test_a_directive_after_the_first_command_is_named_with_its_line(tmp_path):
    assert list(directive_problems(written(tmp_path, f"{HEAD}set -u\n"))) == []
    (told,) = directive_problems(written(tmp_path, f"{HEAD}set -u\n#SBATCH --nodes=9\n"))
    assert told.startswith(f"{tmp_path / 'job.sh'}:7: ") and "'#SBATCH --nodes=9'" in told and "(line 6)" in told


def test_what_bash_cannot_read_is_told_as_bash_does(tmp_path):
    (told,) = syntax_problems([written(tmp_path, f"{HEAD}if true; then\n")])
    assert "job.sh: line" in told and "syntax error" in told


def test_our_own_scripts_pass():
    scripts = sorted((Path(__file__).parents[2] / "slurm").glob("*.sh"))
    assert scripts and not list(syntax_problems(scripts)) and not [told for script in scripts for told in directive_problems(script)]
