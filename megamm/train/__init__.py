"""Pretraining: build, loop, step, schedule, interruption."""
