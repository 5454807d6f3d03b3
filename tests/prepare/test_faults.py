import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from megamm.core.errors import DataError
from megamm.prepare.inputs import below, read_input, size_of
from tests.support.preparing import files, samples, write_shards
from tests.support.shards import jpeg


def write_table(folder, num_rows=12):
    folder.mkdir()
    for number in range(num_rows):
        (folder / f"{number}.jpg").write_bytes(jpeg(60, 60, seed=number))
    rows = [{"image": f"{number}.jpg", "label": "a"} for number in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def prepare(output, table, **job):
    return write_shards("manifest", output, job={"num_samples": 3, **job}, input=table)


@contextmanager
def files_no_larger_than(num_bytes):
    """Writing more gives the error that a full disk or a quota gives (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [500, 9000])
def test_a_write_that_fails_leaves_no_torn_shard(tmp_path, num_bytes):
    table = write_table(tmp_path / "in")
    with (
        pytest.raises(DataError, match="File too large; put that right and run the same command again") as raised,
        files_no_larger_than(num_bytes),
    ):
        prepare(tmp_path / "out", table)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert not list((tmp_path / "out").glob(".*tmp"))
    prepare(tmp_path / "out", table)
    assert len(samples(tmp_path / "out")) == 12


FULL_DISK = """
set -e
mount -t tmpfs -o size=64k tmpfs "$1"
set +e
"$2" -m megamm.cli prepare manifest "$3" --output "$1/out" --max-samples-per-shard 3 --workers 1
echo "status $?"
ls -A "$1/out"
mount -o remount,size=8m "$1"
"$2" -m megamm.cli prepare manifest "$3" --output "$1/out" --max-samples-per-shard 3 --workers 1
cp -r "$1/out" "$4"
"""


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here, so no small disk to fill")
    table = write_table(tmp_path / "in")
    (tmp_path / "disk").mkdir()
    words = ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", str(tmp_path / "disk"), sys.executable, str(table), str(tmp_path / "kept")]
    child = subprocess.run(words, capture_output=True, text=True, check=True)
    error = child.stderr.splitlines()
    assert len(error) == 1
    assert error[0].startswith("megamm: ")
    assert "No space left on device; put that right and run the same command again" in error[0]
    assert error[0].count(".tar") == 1
    assert "status 1" in child.stdout
    listed = child.stdout.partition("status 1\n")[2].split()
    assert not any(name.endswith(".tmp") for name in listed)
    assert {f"{name}.index" for name in listed if name.endswith(".tar")} <= set(listed)
    prepare(tmp_path / "whole", table)
    assert files(tmp_path / "kept") == files(tmp_path / "whole")


@contextmanager
def as_nobody():
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def test_a_file_that_may_not_be_read_ends_the_run_and_is_not_skipped():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        table = write_table(folder / "in")
        (folder / "in" / "7.jpg").chmod(0)
        with as_nobody(), pytest.raises(DataError, match=r"7\.jpg: Permission denied; put that right") as raised:
            prepare(folder / "out", table)
        assert "\n" not in str(raised.value)
        (folder / "in" / "7.jpg").chmod(0o644)
        with as_nobody():
            prepare(folder / "out", table)
        assert len(samples(folder / "out")) == 12
        table.chmod(0)
        with as_nobody(), pytest.raises(DataError, match=r"the input of manifest cannot be read: .*rows\.jsonl: Permission denied"):
            prepare(folder / "again", table)
        table.chmod(0o644)
        folder.chmod(0o755)
        with as_nobody(), pytest.raises(DataError, match=r"again.*: Permission denied"):
            prepare(folder / "again", table)


def test_names_that_are_no_files_are_the_datas_fault(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = {
        "gone": "there is no file", "empty/x": "there is no file", "empty": "is empty", "folder": "is no regular file",
        "pipe": "is no regular file", "a": "Too many levels", "x" * 300: "File name too long", "a\0b": "there is no file",
    }  # fmt: skip
    for name, message in names.items():
        with pytest.raises(DataError, match=message):
            read_input(tmp_path / name)
        assert size_of(tmp_path / name) >= 0


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "a/../.."])
def test_names_stay_below_their_root(tmp_path, name):
    with pytest.raises(DataError, match="lies outside of"):
        below(tmp_path / "root", name)
    assert below(tmp_path / "root", "a/../b/./c") == tmp_path / "root" / "b" / "c"
    assert below(Path("/"), "/etc/x") == Path("/etc/x")
