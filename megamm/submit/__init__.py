"""Runs handed to a cluster's scheduler: checked before, from a snapshot of code and settings. Imports no torch."""
