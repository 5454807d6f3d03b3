import pytest

from megamm.core.errors import ConfigError
from tests.support.preparing import omitted, samples, text_of, write_shards
from tests.support.shards import flac, jpeg


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "animals"
    for label in ("cat", "big dog"):
        for number in range(3):
            path = folder / label / "deep" / f"{number}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(4, 3, seed=number + len(label)))
    return folder


def test_a_folder_is_a_class(folder, tmp_path):
    write_shards("image_folder", folder.parent / "out", input=folder)
    found = samples(tmp_path / "out")
    assert {document["file"] for document, _ in found.values()} == {f"{name}/deep/{n}.JPG" for name in ("cat", "big dog") for n in range(3)}
    assert sorted(key for key in found if key.startswith("cat")) == ["cat/deep/0", "cat/deep/1", "cat/deep/2"]
    document, media = found["cat/deep/1"]
    assert (document["task"], document["label"], text_of(document), text_of(document, 0)) == (
        "classification",
        "cat",
        "cat",
        "What is this?",
    )
    assert media == {"0.jpg": (folder / "cat" / "deep" / "1.JPG").read_bytes()}


def test_sounds_have_their_own_source_and_prompt(tmp_path):
    path = tmp_path / "in" / "rain" / "a.wav"
    path.parent.mkdir(parents=True)
    path.write_bytes(flac(800, format="WAV"))
    write_shards("audio_folder", tmp_path / "out", input=tmp_path / "in", prompt="What do you hear?", task="audio_classification")
    ((document, media),) = samples(tmp_path / "out").values()
    assert document["task"] == "audio_classification"
    assert document["messages"][0]["content"] == [{"type": "audio", "member": "0.wav"}, {"type": "text", "text": "What do you hear?"}]
    assert media == {"0.wav": path.read_bytes()}


def test_a_list_or_a_share_is_held_out(folder, tmp_path):
    listed = frozenset({"cat/deep/0.JPG", "big dog/deep/2.JPG"})
    write_shards("image_folder", tmp_path / "listed", job={"test_names": listed}, input=folder)
    assert {document["file"] for document, _ in samples(tmp_path / "listed", "test").values()} == listed
    assert len(samples(tmp_path / "listed")) == 4
    write_shards("image_folder", tmp_path / "shared", job={"test_share": 0.5, "seed": 3}, input=folder)
    parts = [set(samples(tmp_path / "shared", split)) for split in ("train", "test")]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]


def test_endings_tell_files_apart_and_the_bytes_say_what_they_are(folder, tmp_path):
    (folder / "cat" / "deep" / "0.png").write_bytes(jpeg(4, 3, format="WEBP"))
    write_shards("image_folder", tmp_path / "out", input=folder)
    found = samples(tmp_path / "out")
    webp = next(media for document, media in found.values() if document["file"] == "cat/deep/0.png")
    assert list(webp) == ["0.webp"]
    assert "cat/deep/1" in found
    assert "cat/deep/0" not in found


def test_what_is_no_sample_is_named(folder, tmp_path):
    (folder / "LICENSE").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "top.jpg").write_bytes(jpeg(2, 2))
    (folder / ".hidden.jpg").write_bytes(jpeg(2, 2))
    (folder / "cat" / "deep" / "3.jpg").write_bytes(b"GIF89a")
    (folder / "cat" / "deep" / "4.jpg").write_bytes(b"")
    (folder / "cat" / "deep" / "5.jpg").write_bytes(jpeg(40, 40)[:12])
    (folder / "cat" / "deep" / "6.jpg").symlink_to("gone.jpg")
    write_shards("image_folder", tmp_path / "out", input=folder)
    assert len(samples(tmp_path / "out")) == 6
    found = omitted(tmp_path / "out")
    assert [reason for key, what, reason in found if what == "input"] == [
        "1 files in no folder that names its class",
        "1 files no image: ending '.txt'",
        "1 files no image: ending 'missing'",
    ]
    reasons = {key: reason for key, what, reason in found if what == "sample"}
    assert reasons["cat/deep/3"] == "cat/deep/3.jpg is no JPEG, PNG or WebP file; convert it"
    assert reasons["cat/deep/4"] == f"the file {folder}/cat/deep/4.jpg is empty"
    assert reasons["cat/deep/5"].startswith("the picture's header cannot be read")
    assert reasons["cat/deep/6"] == f"there is no file {folder}/cat/deep/6.jpg"


def test_file_names_of_other_alphabets_and_without_any(folder, tmp_path):
    (folder / "cat" / "猫 1.jpg").write_bytes(jpeg(2, 2))
    with open(bytes(folder / "cat") + b"/\xff.jpg", "wb") as file:
        file.write(jpeg(2, 2))
    write_shards("image_folder", tmp_path / "out", input=folder)
    found = samples(tmp_path / "out")
    assert len(found) == 7
    assert next(key for key, (document, _) in found.items() if document["file"] == "cat/猫 1.jpg").startswith("cat/1-")
    assert omitted(tmp_path / "out") == [("", "input", "1 files with a name that is not UTF-8")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "the input .*in does not exist"),
        (lambda path: path.write_text("x"), "the input .*in is a file, wanted is a folder"),
        (lambda path: path.mkdir(), r"holds no image as CLASS/FILE \(no file at all\)"),
        (lambda path: (path.mkdir(), (path / "a.jpg").touch()), r"holds no image as CLASS/FILE \(1 files in no folder"),
    ],
)
def test_inputs_that_are_no_classes_are_refused(tmp_path, make, message):
    make(tmp_path / "in")
    with pytest.raises(ConfigError, match=message):
        write_shards("image_folder", tmp_path / "out", input=tmp_path / "in")
    assert not (tmp_path / "out").exists()
