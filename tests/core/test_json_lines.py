import logging
import resource
from contextlib import contextmanager

from megamm.core.json_lines import JsonLines, cut_back, read_json_lines


def test_lines_come_back_whatever_their_strings_hold(tmp_path):
    path = tmp_path / "logs" / "lines.jsonl"
    lines = [{"step": step, "key": key} for step, key in enumerate(["a", "b\u2028c", "d\x85\n", "é"])]
    file = JsonLines(path)
    for line in lines:
        file.write(line)
    file.close()
    assert read_json_lines(path) == lines
    path.write_text(path.read_text() + '{"step": 4, "ke')
    assert read_json_lines(path) == lines
    cut_back(path, 2)
    assert read_json_lines(path) == lines[:3]


def test_a_file_that_is_not_there_holds_none(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []


@contextmanager
def files_end_at(num_bytes):
    """The kernel takes so many bytes a file and no more, as on a disk that fills up in the middle of a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_disk_refuses_is_told_once_and_written_later(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    lines = [{"step": step, "loss": 0.5} for step in range(6)]
    file = JsonLines(path)
    file.write(lines[0])
    with files_end_at(path.stat().st_size + 5), caplog.at_level(logging.WARNING, "megamm"):
        for line in lines[1:4]:
            file.write(line)
    assert len(caplog.messages) == 1 and "is not written for now: " in caplog.text
    assert read_json_lines(path) == lines[:1]
    for line in lines[4:]:
        file.write(line)
    file.close()
    assert read_json_lines(path) == lines


def test_a_file_that_is_never_to_be_had_costs_its_lines_alone(tmp_path, caplog):
    (tmp_path / "logs").touch()
    file = JsonLines(tmp_path / "logs" / "lines.jsonl")
    with caplog.at_level(logging.WARNING, "megamm"):
        file.write({"step": 1})
        file.close()
    assert "lacks its last 1 line" in caplog.text
