"""Command lines of `megamm` on several ranks, one after the other, which pay once for the seconds that imports take."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path

from megamm.cli import main
from megamm.core.env import leave_at_once
from tests.support.ranks import free_port, run_ranks

_PR_SET_PDEATHSIG = 1


def run_commands(folder: Path, num_ranks: int, commands: Sequence[Sequence[str]], *, timeout_seconds: float = 560.0) -> None:
    """Run the words of each command on ranks, from a folder; all must end in order.

    Every command has a process a rank of its own, forked from one that has imported what training needs and done nothing else.

    Args:
        folder: Where the commands run.
        num_ranks: Ranks of each.
        commands: Words after `megamm`.
        timeout_seconds: Longest time for all of them together.

    Raises:
        RanksFailed: One did not end in order, with the last lines of every rank's standard error.
    """
    ports = [free_port() for _ in commands]
    run_ranks(fork_each, num_ranks, str(folder), [list(words) for words in commands], ports, timeout_seconds=timeout_seconds)


def fork_each(folder: str, commands: list[list[str]], ports: list[int]) -> None:
    """On a rank: the commands, each in a fork."""
    import megamm.train.pretrain  # noqa: F401
    from megamm.engine.distributed import import_deepspeed

    import_deepspeed()
    os.chdir(folder)
    for words, port in zip(commands, ports, strict=True):
        # Of its own, because the last command's may still be in use.
        os.environ["MASTER_PORT"] = str(port)
        child = os.fork()
        if child == 0:
            _run(words)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code == 0, f"`megamm {' '.join(words)}` ended with {code}"


def _run(words: list[str]) -> None:
    """Be a command, whatever becomes of it, and end with the rank that it was forked from."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        leave_at_once(code)
