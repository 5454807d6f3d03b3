"""The field's own libraries, imported when a metric first needs one."""

from __future__ import annotations

import importlib
from types import ModuleType

from megamm.core.errors import MegaMMError


def library(module: str) -> ModuleType:
    """Import a module of the extra `evaluation`.

    Raises:
        MegaMMError: It is not installed. A metric is never left out of a report for that.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MegaMMError(f"a metric needs {module}, and {error.name} is not installed; pip install 'megamm[evaluation]'") from error
