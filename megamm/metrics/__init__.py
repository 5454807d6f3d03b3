"""Metrics as plain functions of predictions and references. Imports no torch."""
