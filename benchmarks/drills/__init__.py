"""Faults put to checkpoints and runs on purpose, again and again, and what came of each."""
