"""Metrics as plain functions of predictions and references. Imports no torch.

A file is a family. What the field has a library for, that library computes, imported on first use (`libraries`); everything that
is a mean, a ratio or a corpus metric over samples can be given a confidence interval (`bootstrap`).
"""
