"""Types, errors, environment, logging and atomic files. Imports no torch, so that a login node starts at once."""
