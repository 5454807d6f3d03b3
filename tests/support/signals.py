"""Signals as programs of a terminal have them."""

import signal


def hear_interrupts() -> None:
    """`preexec_fn` of a child that ctrl-c is to reach: what runs in the background, tests too, ignores SIGINT, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
