"""The modelling code as flat files, so that `trust_remote_code` runs it where megamm is not installed."""

from __future__ import annotations

import ast
import re
from importlib import resources
from pathlib import Path

from megamm.core.errors import ExportError
from megamm.core.files import write_text

ENTRY_MODULES = ("configuration_megamm", "modeling_megamm", "processing_megamm")
"""What `auto_map` names; the modules that they import follow by themselves."""

AUTO_MAP = {
    "AutoConfig": "configuration_megamm.MegaMMConfig",
    "AutoModel": "modeling_megamm.MegaMMModel",
    "AutoModelForCausalLM": "modeling_megamm.MegaMMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_megamm.MegaMMForConditionalGeneration",
    "AutoProcessor": "processing_megamm.MegaMMProcessor",
}

# Rooms whose modules are written to run alone; anything else of megamm must not leak into an export.
_EXPORTABLE = ("megamm.models", "megamm.core.lengths")
_IMPORT = re.compile(r"^(\s*)from (megamm\.models|megamm\.core)\.(\w+) import ", re.MULTILINE)


def flat_sources() -> dict[str, str]:
    """Source text by file name of the modelling code and of all that it imports from megamm.

    Imports of megamm become relative ones, because transformers puts the files side by side into a package of its own.

    Raises:
        ExportError: A module imports megamm in a way that would not work outside it.
    """
    sources: dict[str, str] = {}
    waiting = [f"megamm.models.{name}" for name in ENTRY_MODULES]
    while waiting:
        module = waiting.pop()
        name = f"{module.rpartition('.')[2]}.py"
        if name not in sources:
            text = _read(module)
            waiting += _megamm_imports(text, module)
            sources[name] = _flatten(text, module)
    return dict(sorted(sources.items()))


def copy_modelling_code(folder: Path) -> list[str]:
    """Write `flat_sources` into `folder` and return the file names."""
    sources = flat_sources()
    for name, text in sources.items():
        write_text(folder / name, text)
    return list(sources)


def _read(module: str) -> str:
    package, _, name = module.rpartition(".")
    file = resources.files(package).joinpath(f"{name}.py")
    if not file.is_file():
        raise ExportError(f"{module} is not a module file; the modelling code may import single files of megamm only")
    return file.read_text(encoding="utf-8")


def _flatten(text: str, module: str) -> str:
    flat = _IMPORT.sub(r"\1from .\3 import ", text)
    for node in ast.walk(ast.parse(flat)):
        for name in _absolute_imports(node):
            if name.partition(".")[0] == "megamm":
                raise ExportError(f"{module} imports {name} in a form that an export cannot carry; write `from {name} import NAME`")
    return flat


def _megamm_imports(text: str, module: str) -> list[str]:
    """Modules of megamm that `text` imports anywhere, relative imports resolved."""
    found = []
    for node in ast.walk(ast.parse(text)):
        found += _absolute_imports(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module:
                raise ExportError(f"{module} writes `from {'.' * node.level} import`; transformers follows only `from .name import`")
            found.append(f"{module.rpartition('.')[0]}.{node.module}")
    mine = [name for name in found if name.partition(".")[0] == "megamm"]
    for name in mine:
        if not name.startswith(_EXPORTABLE):
            raise ExportError(f"{module} imports {name}, which an export does not carry; only {' and '.join(_EXPORTABLE)} travel")
    return mine


def _absolute_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return [node.module]
    return []
