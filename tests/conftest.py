"""A test that was left out is no test: where `MEGAMM_REQUIRE` names a marker, skipping one of its tests is a failure.

Set it to what a machine must be able to run (`MEGAMM_REQUIRE=slurm make test`); without it a skip says in one line what is missing.

`-n 2` shares test files out to two processes, the long ones first; all that need a Slurm go to one, because two clusters on two cores
are late for each other.

Tests on real data find it by `MEGAMM_DATA`, or at `../shared/data` beside the checkout; set it to nothing to leave them out.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

_TESTS = Path(__file__).resolve().parent
_SLURM = _TESTS / "slurm"
_SHARED_DATA = _TESTS.parents[1] / "shared" / "data"


def pytest_configure() -> None:
    """Before tests are collected: some are left out by what is set here."""
    if _SHARED_DATA.is_dir():
        os.environ.setdefault("MEGAMM_DATA", str(_SHARED_DATA))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process waits for a long file at the end; within a file the order stays."""

    long = {item.path for item in items if {"distributed", "slow"} & {marker.name for marker in item.iter_markers()}}
    items.sort(key=lambda item: (not item.path.is_relative_to(_SLURM), item.path not in long, item.path.as_posix()))


class _ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """A file stays in one process, for the sake of what its tests share."""
    config.option.loadscopereorder = False
    return _ByFile(config, log)


@pytest.fixture(scope="module")
def world() -> Generator[Any, None, None]:
    """A world of one rank in this process; the environment is as before afterwards."""
    # Most tests need no torch.
    from megamm.engine import distributed

    before = dict(os.environ)
    yield distributed.start()
    distributed.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    required = set(filter(None, os.environ.get("MEGAMM_REQUIRE", "").split(",")))
    markers = sorted(required & {marker.name for marker in item.iter_markers()})
    if report.skipped and markers and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (MEGAMM_REQUIRE={','.join(markers)}: tests marked so must run here)"
    return report
