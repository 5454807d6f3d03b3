"""`python -m megamm.cli`."""

from megamm.cli import run

run()
