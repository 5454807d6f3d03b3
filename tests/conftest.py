"""A test that was left out is no test: where `MEGAMM_REQUIRE` names a marker, skipping one of its tests is a failure.

Set it to what a machine must be able to run (`MEGAMM_REQUIRE=slurm make test`); without it a skip says in one line what is missing.

Tests on real data find it by `MEGAMM_DATA`, or at `../shared/data` beside the checkout; set it to nothing to leave them out.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure() -> None:
    """Before tests are collected: some are left out by what is set here."""
    if _SHARED_DATA.is_dir():
        os.environ.setdefault("MEGAMM_DATA", str(_SHARED_DATA))


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
