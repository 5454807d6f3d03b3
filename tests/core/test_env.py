import subprocess
import sys

import pytest

from megamm.core.env import RankInfo, rank_info
from megamm.core.errors import ConfigError


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_ranks(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_this_is_the_only_process():
    assert rank_info() == RankInfo(0, 0, 1)


def test_ranks_are_read(no_ranks):
    set_ranks(no_ranks, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    assert rank_info() == RankInfo(5, 1, 8)


def test_half_a_launcher_is_refused(no_ranks):
    set_ranks(no_ranks, RANK="0", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="LOCAL_RANK not set"):
        rank_info()


def test_rank_beyond_the_world_is_refused(no_ranks):
    set_ranks(no_ranks, RANK="2", LOCAL_RANK="0", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="RANK=2 is not below WORLD_SIZE=2"):
        rank_info()


@pytest.mark.parametrize("module", ["megamm.core.types", "megamm.config", "megamm.core.logging", "megamm.cli"])
def test_a_login_node_starts_without_torch(module):
    code = f"import {module}, sys; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
