import ast

import pytest

from megamm.core.errors import ExportError
from megamm.export import modelling_code
from megamm.export.modelling_code import AUTO_MAP, flat_sources


def test_the_files_import_nothing_of_megamm_and_only_each_other():
    sources = flat_sources()
    assert set(sources) >= {f"{name}.py" for name in modelling_code.ENTRY_MODULES}
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in sources, name
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("megamm"), name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("megamm") for alias in node.names), name


def test_the_auto_map_names_classes_that_are_there():
    sources = flat_sources()
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert name in [node.name for node in ast.parse(sources[f"{module}.py"]).body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize(
    "line, message",
    [
        ("from megamm.config import Recipe", r"imports megamm\.config, which an export does not carry"),
        ("def f():\n    import megamm.data.media.decode", r"imports megamm\.data\.media\.decode, which an export does not carry"),
        ("import megamm.core.lengths as lengths", r"megamm\.core\.lengths in a form that an export cannot carry"),
        ("from megamm.core import lengths", r"imports megamm\.core, which an export does not carry"),
        ("from . import attention", r"writes `from \. import`"),
        ("from ..core.lengths import audio_num_tokens", r"writes `from \.\. import`"),
        ("from megamm.models.no_such_module import x", r"megamm\.models\.no_such_module is not a module file"),
    ],
)
def test_an_import_that_cannot_travel_fails_loudly(monkeypatch, line, message):
    read = modelling_code._read
    monkeypatch.setattr(modelling_code, "_read", lambda module: line + "\n" if module.endswith(".modeling_megamm") else read(module))
    with pytest.raises(ExportError, match=message):
        flat_sources()


def test_absolute_imports_of_exportable_modules_become_relative(monkeypatch):
    read = modelling_code._read
    text = "if True:\n    from megamm.core.lengths import audio_num_tokens\nfrom megamm.models.loss import LinearHead\n"
    monkeypatch.setattr(modelling_code, "_read", lambda module: text if module.endswith(".modeling_megamm") else read(module))
    sources = flat_sources()
    assert sources["modeling_megamm.py"] == text.replace("megamm.core.lengths", ".lengths").replace("megamm.models.loss", ".loss")
    assert "lengths.py" in sources and "loss.py" in sources
