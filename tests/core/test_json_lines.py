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
