import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.prepare.names import is_key, plain_key, stems


@pytest.mark.parametrize("name", ["a", "daisy/100_n", "A-1/b_2/c", "_", "a" * 64])
def test_names_that_can_be_keys_stay(name):
    assert plain_key(name) == name


@given(st.text(st.characters(codec="utf-8")))
def test_every_name_has_a_key_that_fits_a_tar_header(name):
    key = plain_key(name)
    assert is_key(key)
    assert len(key) <= 65


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=80), unique=True, max_size=20))
def test_different_names_have_different_keys(names):
    assert len({plain_key(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("katze.jpg", "katze_jpg-"),
        ("/ab", "ab-"),
        ("a//b", "a/b-"),
        ("../../etc", "etc-"),
        ("__url__/x", "url/x-"),
        ("猫", ""),
        ("a" * 65, "a" * 47 + "-"),
    ],
)
def test_other_names_keep_what_they_can_and_get_a_digest(name, start):
    key = plain_key(name)
    assert key.startswith(start)
    assert len(key) == len(start) + 16


def test_reserved_names_are_no_keys():
    assert not is_key("__key__")
    assert not is_key("__a__/b")
    assert is_key("a/__b__")


def test_stems_leave_endings_that_tell_files_apart():
    assert stems(["a/b.jpg", "a/c.jpg", "a/c.png", "a.d/e", "f.tar.gz"]) == ["a/b", "a/c.jpg", "a/c.png", "a.d/e", "f.tar"]
