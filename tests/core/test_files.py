import resource

import pytest

from megamm.core.files import atomic_file, canonical_json, digest_file, digest_text, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert read_json(path) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_names_the_file(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(OSError) as error, atomic_file(tmp_path / "a.json") as file:
            file.write(b"x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert error.value.filename == str(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_equal_values_have_equal_canonical_json():
    assert canonical_json({"b": [1, "é"], "a": None}) == canonical_json({"a": None, "b": [1, "é"]}) == '{"a":null,"b":[1,"é"]}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_file_and_text_digests_agree(tmp_path):
    path = tmp_path / "t"
    path.write_text("megamm" * 400_000)
    assert digest_file(path) == digest_text("megamm" * 400_000)
