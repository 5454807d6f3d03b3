from collections.abc import Iterator

import pytest

from tests.support.slurm import cluster as slurm


@pytest.fixture(scope="session")
def can_run_slurm() -> None:
    slurm.install()
    if reason := slurm.missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(can_run_slurm: None) -> Iterator[slurm.Cluster]:
    with slurm.Cluster() as running:
        yield running
