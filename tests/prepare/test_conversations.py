import base64
import gzip
import json

import pytest

from megamm.core.errors import ConfigError, DataError
from tests.support.preparing import omitted, samples, write_shards
from tests.support.shards import flac, jpeg

TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(jpeg(4 + number, 3, seed=number))
    (tmp_path / "a.flac").write_bytes(flac(800))
    return tmp_path


def prepare(root, *documents, **options):
    path = root / "chats.jsonl"
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), encoding="utf-8")
    write_shards("conversations", root / "out", input=path, **options)
    return samples(root / "out")


def sharegpt(*turns, **more):
    names = ("human", "gpt") * len(turns)
    return {"conversations": [{"from": name, "value": value} for name, value in zip(names, turns, strict=False)], **more}


def openai(*contents, **more):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)], **more}


def contents(found):
    ((document, _),) = found.values()
    return [(message["role"], message["content"]) for message in document["messages"]]


def picture(number=0):
    return {"type": "image", "member": f"{number}.jpg"}


def words(text):
    return [{"type": "text", "text": text}]


def test_sharegpt(root):
    document = sharegpt("Hi", "Hello 你好", "Bye", "Bye!", id="chat/1")
    document["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    found = prepare(root, document)
    assert list(found) == ["chat/1"]
    assert found["chat/1"][0]["task"] == "conversation"
    assert contents(found) == [
        ("system", words("Be kind.")),
        ("user", words("Hi")),
        ("assistant", words("Hello 你好")),
        ("user", words("Bye")),
        ("assistant", words("Bye!")),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat is it?", [picture(), TEXT]),
        ("What is it?\n<image>", [TEXT, picture()]),
        ("What is it?", [picture(), TEXT]),
        ("See <image> here", [{"type": "text", "text": "See "}, picture(), {"type": "text", "text": " here"}]),
        ("<image>", [picture()]),
    ],
)
def test_llava_places_the_picture_where_its_tag_stands(root, text, expected):
    found = prepare(root, sharegpt(text, "A cat.", image="pictures/0.jpg"))
    assert contents(found)[0] == ("user", expected)
    ((_, media),) = found.values()
    assert media == {"0.jpg": (root / "pictures" / "0.jpg").read_bytes()}


def test_several_media_are_placed_in_order_over_the_turns(root):
    document = sharegpt(
        "<image>\nOne.<image>", "Yes", "And <audio>?", "A sound", images=["pictures/0.jpg", "pictures/1.jpg"], audio="a.flac"
    )
    found = prepare(root, document)
    assert contents(found) == [
        ("user", [picture(0), {"type": "text", "text": "One."}, picture(1)]),
        ("assistant", words("Yes")),
        ("user", [{"type": "text", "text": "And "}, {"type": "audio", "member": "2.flac"}, {"type": "text", "text": "?"}]),
        ("assistant", words("A sound")),
    ]


def test_untagged_media_stand_before_the_first_turn_of_the_user(root):
    document = openai("What is it?", "A cat.", images=["pictures/0.jpg", "pictures/1.jpg"])
    document["messages"].insert(0, {"role": "developer", "content": "Look."})
    assert contents(prepare(root, document))[:2] == [("system", words("Look.")), ("user", [picture(0), picture(1), TEXT])]


def test_openai_parts(root):
    inline = base64.b64encode((root / "pictures" / "1.jpg").read_bytes()).decode()
    sound = base64.b64encode((root / "a.flac").read_bytes()).decode()
    parts = [
        TEXT,
        {"type": "image_url", "image_url": {"url": "pictures/0.jpg", "detail": "low"}},
        {"type": "image_url", "image_url": f"data:image/jpeg;base64,{inline}"},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "image", "path": "pictures/1.jpg"},
        {"type": "audio", "audio": "a.flac"},
    ]
    found = prepare(
        root, openai(parts, [{"type": "text", "text": "A "}, {"type": "output_text", "text": "cat."}]), task="question_answering"
    )
    assert contents(found) == [
        (
            "user",
            [TEXT, picture(0), picture(1), {"type": "audio", "member": "2.flac"}, picture(3), {"type": "audio", "member": "4.flac"}],
        ),
        ("assistant", [{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]),
    ]
    ((document, media),) = found.values()
    assert document["task"] == "question_answering"
    assert media["1.jpg"] == media["3.jpg"] == (root / "pictures" / "1.jpg").read_bytes()


def test_turns_that_answer_nothing_or_are_not_answered_are_left_out_and_named(root):
    document = {"conversations": [{"from": "gpt", "value": "Welcome"}, *sharegpt("Hi", "Hello", "Bye")["conversations"]]}
    assert contents(prepare(root, document)) == [("user", words("Hi")), ("assistant", words("Hello"))]
    assert [(what, reason) for _, what, reason in omitted(root / "out")] == [
        ("part", "a last turn without an answer"),
        ("part", "a first turn of the assistant"),
    ]


def test_repeated_and_missing_ids_get_numbers(root):
    found = prepare(root, sharegpt("a", "b", id=7), sharegpt("c", "d", id=7), sharegpt("e", "f", id="x"), sharegpt("g", "h"))
    assert sorted(found) == ["7-00000001", "7-00000002", "row-00000004", "x"]


def test_conversations_about_one_picture_stay_on_one_side(root):
    for number in range(10):
        (root / "pictures" / f"{number}.jpg").write_bytes(jpeg(3, 3))
    documents = [sharegpt(f"{n}", "b", image=f"pictures/{n % 10}.jpg", id=n) for n in range(40)]
    (root / "chats.json").write_text(json.dumps(documents))
    write_shards("conversations", root / "out", job={"test_share": 0.5, "seed": 1}, input=root / "chats.json")
    sides = [{int(key) % 10 for key in samples(root / "out", split)} for split in ("train", "test")]
    assert sides[0] | sides[1] == set(range(10))
    assert not sides[0] & sides[1]


def test_lists_and_gzip(root):
    content = json.dumps([sharegpt("a", "b", id=1), [], sharegpt("c", "d", id=2)]).encode()
    (root / "chats.json.gz").write_bytes(gzip.compress(content))
    write_shards("conversations", root / "out", input=root / "chats.json.gz", root=root / "pictures")
    assert sorted(samples(root / "out")) == ["1", "2"]
    assert omitted(root / "out") == [("row-00000001", "sample", "conversation 1 is no JSON object")]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"id": 1, "text": "x"}, "it has neither messages nor conversations; its fields are id, text"),
        (sharegpt(), "it has neither messages nor conversations"),
        (sharegpt("a"), "no answer to any turn of the user"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}, "no answer to any turn of the user"),
        ({"messages": ["a"]}, "turn 0 is str, not a JSON object"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turn 0 is by 'tool'; known are system, developer, user"),
        (openai("a", None), "turn 1 holds NoneType, neither a text nor a list of parts"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}]}, "turn 1 calls a tool"),
        (openai("a", ""), "turn 1 is empty"),
        (openai([{"type": "video", "video": "x"}], "b"), "turn 0 has a part of type 'video', which samples cannot hold"),
        (openai([7], "b"), "turn 0 has a part of type 'int'"),
        (openai([{"type": "image"}], "b"), "'None' is not the path of image data"),
        (openai([{"type": "image_url", "image_url": {"url": "https://a.b/c.jpg"}}], "b"), "https://a.b/c.jpg is remote; fetch it"),
        (openai([{"type": "image_url", "image_url": "data:image/png;base64,!"}], "b"), "is no base64 data URL"),
        (openai([{"type": "image_url", "image_url": "data:image/png,x"}], "b"), "is no base64 data URL"),
        (sharegpt("<image>", "b"), "more <image> tags than the 0 listed image files"),
        (sharegpt("<image>", "b", images=["pictures/0.jpg", "pictures/1.jpg"]), "1 <image> tags for 2 listed image files"),
        (sharegpt("<image>", "b", image="gone.jpg"), "there is no file"),
        (sharegpt("<image>", "b", image="../x.jpg"), "lies outside of"),
        (sharegpt("<image>", "b", image="a.flac"), "a.flac is no JPEG, PNG or WebP file"),
    ],
)
def test_conversations_that_cannot_be_held_are_named(root, document, reason):
    assert len(prepare(root, sharegpt("a", "b", id="good"), document)) == 1
    ((_, what, found),) = omitted(root / "out")[-1:]
    assert what == "sample"
    assert reason in found


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", "x", ConfigError, r"a\.csv ends in \.csv; name a \.json or \.jsonl file"),
        ("a.json", "{", DataError, r"a\.json is not JSON"),
        ("a.json", "{}", DataError, "a.json is dict, not a JSON list of conversations"),
    ],
)
def test_files_that_are_no_conversations_are_refused(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        write_shards("conversations", tmp_path / "out", input=tmp_path / name)
