"""README's commands run, in its order, and the quick start runs the same ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text()
# What keeps the test short; the commands themselves stay as they are written.
SHORTER = {
    "pretrain": ["--train.steps", "4", "--schedule.warmup_steps", "1", "--checkpoint.every", "2", "--evaluation.every", "0"],
    "evaluate": ["--max-samples", "8"],
}


def commands() -> list[list[str]]:
    block = README.split("<!-- quickstart-commands -->")[1].split("\n\n")[0]
    return [shlex.split(line) for line in block.splitlines() if line.startswith("    ")]


def test_the_quick_start_runs_the_commands_that_readme_lists():
    source = (CHECKOUT / "launchers" / "quickstart.py").read_text()
    for words in commands():
        wanted = words[words.index("megamm") + 1]
        assert f'"{wanted}"' in source, wanted
    assert len(commands()) == 8


def test_make_knows_the_targets_that_readme_names():
    makefile = (CHECKOUT / "Makefile").read_text()
    targets = set(re.findall(r"^    make (\w+)", README, re.MULTILINE))
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_files_that_readme_links_to_are_there():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (CHECKOUT / link).is_file(), link
    assert len(README.splitlines()) <= 250


@pytest.mark.integration
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_readmes_commands_run_in_order(tmp_path):
    for words in commands():
        if words[0].startswith("launchers/"):
            words[0] = str(CHECKOUT / words[0])
        words += SHORTER.get(words[words.index("megamm") + 1], [])
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stderr[-3000:]}"
    report = json.loads((tmp_path / "runs" / "tiny" / "evaluation" / "report.json").read_text())
    assert {row["dataset"] for row in report["rows"]} == {"digits", "words"}
    assert (tmp_path / "export" / "model.safetensors").is_file()
    script = [sys.executable, str(CHECKOUT / "launchers" / "ask_export.py"), str(tmp_path / "export"), str(tmp_path / "data")]
    asked = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert "images: the exported model says" in asked.stdout and "modules of megamm that were imported: 0" in asked.stdout
    check_final_table(tmp_path)


def check_final_table(folder: Path) -> None:
    """The quick start's last step over real reports: an untrained model misses the accuracies and nothing else."""
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "unbroken")
    shutil.copytree(folder / "runs" / "tiny" / "evaluation", folder / "evaluation")
    start = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import quickstart; "
    code = start + "sys.exit(quickstart.table(pathlib.Path(sys.argv[2]), 2, 60.0))"
    words = [sys.executable, "-c", code, str(CHECKOUT / "launchers"), str(folder)]
    table = subprocess.run(words, capture_output=True, text=True, check=False)
    missed = [line for line in table.stdout.splitlines() if line.endswith("MISSED")]
    assert table.returncode == 1 and len(missed) == 2 and all("accuracy" in line for line in missed), table.stdout + table.stderr
