"""The error hierarchy: every message names the thing, its value and the fix."""


class MegaMMError(Exception):
    """Base of all errors that the command line prints as one line.

    Attributes:
        on_all_ranks: Every rank raises it, so that it is enough when one of them prints it.
    """

    on_all_ranks = False


class ConfigError(MegaMMError):
    """A recipe, an override or a command line that cannot be run."""


class DataError(MegaMMError):
    """A shard, an index or a sample that is not what it was said to be; names shard and key."""


class CheckpointError(MegaMMError):
    """A checkpoint that is missing, damaged or of another model."""


class ExportError(MegaMMError):
    """A folder that cannot be exported or does not match what was trained."""
