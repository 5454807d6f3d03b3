"""`MEGAMM_REQUIRE` turns skips into failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import pytest

@pytest.mark.slurm
@pytest.mark.skip(reason="by mark")
def test_marked(): ...

@pytest.fixture
def cluster():
    pytest.skip("no cluster here")

@pytest.mark.slurm
def test_through_a_fixture(cluster): ...

@pytest.mark.slurm
def test_that_runs(): ...

def test_of_no_marker():
    pytest.skip("not asked for")
"""


@pytest.mark.parametrize(("required", "outcomes"), [("", "1 passed, 3 skipped"), ("gpu,slurm", "1 passed, 1 skipped, 2 errors")])
def test_a_skip_of_what_is_required_is_a_failure(tmp_path: Path, required: str, outcomes: str):
    (tmp_path / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slurm: Slurm\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    result = subprocess.run(command, env=os.environ | {"MEGAMM_REQUIRE": required}, capture_output=True, text=True, check=False)
    summary = result.stdout.splitlines()[-1]
    assert sorted(summary.partition(" in ")[0].split(", ")) == sorted(outcomes.split(", "))
    assert ("no cluster here (MEGAMM_REQUIRE=slurm" in result.stdout) == bool(required)
