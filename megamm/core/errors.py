"""The error hierarchy: every message names the thing, its value and the fix."""


class MegaMMError(Exception):
    """Base of all errors that the command line prints as one line.

    Attributes:
        on_all_ranks: Every rank raises it, so that it is enough when one of them prints it.
        may_pass: The same may work later or on another machine, so that a scheduler may try again; without it somebody has to mend what
            the message names.
    """

    on_all_ranks = False
    may_pass = False


def may_pass(error: Exception) -> bool:
    """Whether trying again may help. What is none of ours is a crash, and a crash is more often a machine's fault than a run's."""
    return error.may_pass if isinstance(error, MegaMMError) else True


class ConfigError(MegaMMError):
    """A recipe, an override or a command line that cannot be run."""


class DataError(MegaMMError):
    """A shard, an index or a sample that is not what it was said to be; names shard and key."""


class UnreachableData(DataError):
    """Data that could not be read although nothing says that they are gone: their file system, server or network failed for too long."""

    may_pass = True


class CheckpointError(MegaMMError):
    """A checkpoint that is missing, damaged or of another model."""


class ExportError(MegaMMError):
    """A folder that cannot be exported or does not match what was trained."""
