from collections.abc import Iterator

import pytest

from tests.support.slurm import packages
from tests.support.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def can_run_slurm() -> None:
    packages.install()
    if reason := packages.missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(can_run_slurm: None) -> Iterator[Cluster]:
    with Cluster() as running:
        yield running
