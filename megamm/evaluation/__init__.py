"""Tasks over held-out samples: what a checkpoint or an export can do, beside chance."""

from megamm.evaluation.evaluate import evaluate
from megamm.evaluation.report import Report

__all__ = ["Report", "evaluate"]
