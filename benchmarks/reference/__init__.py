"""The reference run: one model of at most 30 M parameters on all of the real test data, and what is set beside it (`docs/reference.md`)."""
