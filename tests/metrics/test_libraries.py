import sys

import pytest

from megamm.core.errors import MegaMMError
from megamm.metrics.libraries import library
from megamm.metrics.speech import error_rates


def test_a_missing_library_is_one_clear_line(monkeypatch):
    # What Python's import system takes for a module that cannot be found.
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MegaMMError, match=r"jiwer is not installed; pip install 'megamm\[evaluation\]'") as caught:
        error_rates(["a"], ["a"])
    assert "\n" not in str(caught.value)


def test_what_a_library_lacks_in_turn_is_named(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MegaMMError, match="needs needs_more, and surely_not_here is not installed"):
        library("needs_more")
