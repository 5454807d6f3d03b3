import os

import pytest

from megamm.engine import distributed


@pytest.fixture(scope="module")
def world():
    """A world of one rank in this process; the environment is as before afterwards."""
    before = dict(os.environ)
    yield distributed.start()
    distributed.stop()
    os.environ.clear()
    os.environ.update(before)
