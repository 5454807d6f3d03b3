import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import DataError
from megamm.core.geometry import Shape
from megamm.core.types import Message, Part
from megamm.tasks import template
from megamm.tasks.template import encode, parse_sample, prompt

IMAGE = {"type": "image", "member": "0.png"}
AUDIO = {"type": "audio", "member": "1.flac"}
TEXT = {"type": "text", "text": "What  \ndigit? "}
LABEL = {"type": "label", "text": "7"}


def chat(*contents, task="classification"):
    roles = ("user", "assistant") * len(contents)
    return {"task": task, "messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


DOCUMENT = {"task": "text", "messages": [{"role": "assistant", "content": [{"type": "text", "text": " The word seven.\n"}]}]}
CHATS = {
    "text": chat("Seven?", "yes 七"),
    "text-parts": chat(
        [TEXT, {"type": "text", "text": "The word"}, {"type": "text", "text": " seven"}], [LABEL, {"type": "text", "text": " is"}]
    ),
    "image": chat([IMAGE, TEXT], [LABEL]),
    "audio": chat([TEXT, AUDIO], [LABEL], task="speech_recognition"),
    "both-and-turns": chat([IMAGE, AUDIO, TEXT, IMAGE], [LABEL], [AUDIO], "seven"),
    "system": {"task": "classification", "messages": [{"role": "system", "content": "Digits. "}, *chat([IMAGE], [LABEL])["messages"]]},
    "document": DOCUMENT,
    "document-with-picture": {
        "task": "text",
        "messages": [{"role": "assistant", "content": [{"type": "text", "text": "This:"}, IMAGE, {"type": "text", "text": "is 7."}]}],
    },
}


def media_counts(messages, num_tokens=1):
    types = [part.type for message in messages for part in message.content]
    return {"image_tokens": [num_tokens] * types.count("image"), "audio_tokens": [num_tokens] * types.count("audio")}


def names(ids, tokenizer):
    """Control names and text runs, to read a layout in one line."""
    vocabulary = tokenizer.vocabulary
    strings = [f"\0{vocabulary.token_string(i)}\0" if i >= vocabulary.text else tokenizer.decode([i]) for i in ids.tolist()]
    return [piece for piece in "".join(strings).split("\0") if piece]


def test_layout_of_a_chat(tokenizer):
    messages = parse_sample("k", CHATS["image"], where="here").messages
    encoded = encode(messages, tokenizer, image_tokens=[3])
    picture = ["<|image_start|>", "<|image|>", "<|image|>", "<|image|>", "<|image_end|>"]
    expected = ["<|bos|>", "<|user|>", *picture, "What  \ndigit? ", "<|end|>", "<|assistant|>", "7", "<|end|>"]
    assert names(encoded.input_ids, tokenizer) == expected
    assert names(encoded.input_ids[encoded.supervised], tokenizer) == ["7", "<|end|>"]
    assert (encoded.input_ids.dtype, encoded.supervised.dtype) == (np.int32, np.bool_)


def test_layout_of_a_document(tokenizer):
    messages = parse_sample("k", DOCUMENT, where="here").messages
    encoded = encode(messages, tokenizer)
    assert names(encoded.input_ids, tokenizer) == ["<|bos|>", " The word seven.\n", "<|eos|>"]
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)


def test_media_in_a_document_are_not_targets(tokenizer):
    messages = parse_sample("k", CHATS["document-with-picture"], where="here").messages
    encoded = encode(messages, tokenizer, image_tokens=[2])
    assert names(encoded.input_ids[~encoded.supervised], tokenizer) == ["<|bos|>", "<|image_start|>", *["<|image|>"] * 2, "<|image_end|>"]


def test_supervise_all_takes_every_message_like_the_assistants(tokenizer):
    messages = parse_sample("k", CHATS["image"], where="here").messages
    encoded = encode(messages, tokenizer, image_tokens=[1], supervise_all=True)
    assert names(encoded.input_ids[encoded.supervised], tokenizer) == ["What  \ndigit? ", "<|end|>", "7", "<|end|>"]


@pytest.mark.parametrize("name", CHATS)
def test_transformers_chat_template_gives_the_same_ids(name, folder, tokenizer):
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    document = CHATS[name]
    messages = parse_sample("k", document, where="here").messages
    ours = encode(messages, tokenizer, **media_counts(messages))
    theirs = hugging_face.apply_chat_template(document["messages"], return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ours.input_ids.tolist()
    if name != "document-with-picture":  # jinja marks whole messages; placeholders in an answer are only left out here
        assert theirs["assistant_masks"] == ours.supervised.astype(int).tolist()
    if not template.is_document(messages):
        asked = messages[:-1]
        theirs = hugging_face.apply_chat_template(document["messages"][:-1], add_generation_prompt=True)["input_ids"]
        assert theirs == prompt(asked, tokenizer, **media_counts(asked)).tolist()


def test_transformers_chat_template_refuses_what_parse_sample_refuses(folder):
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}):
        with pytest.raises(TemplateError, match="is not one of"):
            hugging_face.apply_chat_template([message])


@given(
    turns=st.lists(
        st.lists(st.sampled_from(["image", "audio"]) | st.text(st.characters(codec="utf-8"), min_size=1), min_size=1), min_size=2
    ),
    num_tokens=st.integers(1, 4),
)
def test_placeholders_are_as_many_as_the_towers_return(tokenizer, turns, num_tokens):
    messages = [
        Message(
            ("user", "assistant")[index % 2],
            tuple(Part(value, member="0.x") if value in ("image", "audio") else Part("text", text=value) for value in values),
        )
        for index, values in enumerate(turns)
    ]
    counts = media_counts(messages, num_tokens)
    encoded = encode(messages, tokenizer, **counts)
    ids = encoded.input_ids.tolist()
    for name in ("image", "audio"):
        assert ids.count(tokenizer.vocabulary.control_id(name)) == sum(counts[f"{name}_tokens"])
        assert ids.count(tokenizer.vocabulary.control_id(f"{name}_end")) == len(counts[f"{name}_tokens"])
    assert ids.count(tokenizer.vocabulary.control_id("end")) == len(turns)
    words = "".join(part.text for message in messages for part in message.content)
    assert tokenizer.decode(ids) == words.replace("▁", " ")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "fewer image token counts"),
        ({"image_tokens": [1, 1]}, "more image token counts"),
        ({"image_tokens": [1], "audio_tokens": [1]}, "more audio token counts"),
        ({"image_tokens": [0]}, "image part of 0 tokens"),
    ],
)
def test_token_counts_must_match_the_parts(tokenizer, counts, message):
    messages = parse_sample("k", CHATS["image"], where="here").messages
    with pytest.raises(DataError, match=message):
        encode(messages, tokenizer, **counts)


def test_split_answer(tokenizer):
    messages = parse_sample("k", CHATS["text-parts"], where="here").messages
    asked, answer = template.split_answer(messages)
    assert (asked, answer) == (messages[:1], messages[1].content)
    with pytest.raises(DataError, match="end before an answer"):
        prompt(messages, tokenizer)
    for unanswered in (asked, parse_sample("k", DOCUMENT, where="here").messages):
        with pytest.raises(DataError, match="does not end with an assistant's answer"):
            template.split_answer(unanswered)


def test_parse_sample_keeps_what_it_does_not_know_as_metadata():
    sample = parse_sample("k", {**CHATS["image"], "voice": "en-us", "n": [1]}, where="here")
    assert (sample.key, sample.task, sample.metadata) == ("k", "classification", {"voice": "en-us", "n": [1]})
    assert sample.messages[0].content == (Part("image", member="0.png"), Part("text", text=TEXT["text"]))
    assert sample.messages[1].content == (Part("label", text="7"),)


MASK = {"type": "mask", "image": 0, "member": "1.png", "labels": ["nucleus", "核"]}


def found(label, xyxy=(1, 2, 3.5, 4), image=0, **more):
    boxes = {"type": "boxes", "image": image, "boxes": [{"label": label, "xyxy": list(xyxy), **more}]}
    return chat([IMAGE, TEXT], [boxes], task="detection")


def test_boxes_masks_and_items_are_read():
    boxes = parse_sample("k", found("RBC"), where="here").messages[1].content
    assert boxes == (Part("boxes", data={"image": 0, "boxes": [{"label": "RBC", "xyxy": [1, 2, 3.5, 4]}]}),)
    none_found = chat([IMAGE, IMAGE], [{"type": "boxes", "image": 1, "boxes": []}], task="detection")
    assert parse_sample("k", none_found, where="here").messages[1].content == (Part("boxes", data={"image": 1, "boxes": []}),)
    mask = parse_sample("k", chat([IMAGE], [MASK], task="segmentation"), where="here").messages[1].content
    assert mask == (Part("mask", member="1.png", data={"image": 0, "labels": ["nucleus", "核"]}),)
    items = [{"type": "item", "id": "7"}, {"type": "item", "id": "8", "text": "A lamp"}]
    read = parse_sample("k", chat(items, [items[0]], task="recommendation"), where="here").messages
    assert read[0].content == (Part("item", data={"id": "7"}), Part("item", text="A lamp", data={"id": "8"}))


def test_items_are_their_codes_and_descriptions_follow_what_is_told(with_items):
    history = [{"type": "item", "id": "lamp", "text": "A lamp"}, {"type": "item", "id": "cup"}]
    messages = parse_sample("k", chat(history, [history[0]], task="recommendation"), where="here").messages
    encoded = encode(messages, with_items)
    told = ["<|item_0_1|>", "<|item_1_2|>", "A lamp", "<|item_0_1|>", "<|item_1_0|>"]
    answer = ["<|item_0_1|>", "<|item_1_2|>", "<|end|>"]
    assert names(encoded.input_ids, with_items) == ["<|bos|>", "<|user|>", *told, "<|end|>", "<|assistant|>", *answer]
    assert names(encoded.input_ids[encoded.supervised], with_items) == answer


def test_items_without_codes_are_named(tokenizer, with_items):
    def messages(item):
        return parse_sample("k", chat([item], [item], task="recommendation"), where="here").messages

    with pytest.raises(DataError, match="item 'cup' has no codes: the tokenizer knows no items"):
        encode(messages({"type": "item", "id": "cup"}), tokenizer)
    with pytest.raises(DataError, match="item 'hat' is not among the tokenizer's 2 items"):
        encode(messages({"type": "item", "id": "hat"}), with_items)


def box(label, left, top, is_visible=True):
    return Shape(label, ((left, top), (left + 0.25, top + 0.5)), is_visible)


def test_boxes_stand_from_top_to_bottom_with_their_label_behind(tokenizer):
    messages = parse_sample("k", found("RBC"), where="here").messages
    shapes = [box("low", 0.5, 0.5), box("right", 0.75, 0.0), box("left", 0.0, 0.0)]
    encoded = encode(messages, tokenizer, image_tokens=[1], shapes=[shapes])
    last = tokenizer.vocabulary.location - 1

    def spelled(label, *shares):
        return ["<|box_start|>", *(f"<|loc_{round(share * last)}|>" for share in shares), "<|box_end|>", label]

    answer = [*spelled("left", 0, 0, 0.25, 0.5), *spelled("right", 0.75, 0, 1, 0.5), *spelled("low", 0.5, 0.5, 0.75, 1)]
    assert names(encoded.input_ids[encoded.supervised], tokenizer) == [*answer, "<|end|>"]
    assert encoded.input_ids.tolist() == encode(messages, tokenizer, image_tokens=[1], shapes=[shapes[::-1]]).input_ids.tolist()


def test_what_is_not_seen_leaves_its_length_behind(tokenizer):
    messages = parse_sample("k", found("RBC"), where="here").messages
    shapes = [box("a", 0, 0), box("longer label", 0.5, 0.25), box("b", 0.5, 0.5)]
    seen = [shapes[0], box("longer label", 0.5, 0.25, is_visible=False), shapes[2]]
    whole = encode(messages, tokenizer, image_tokens=[1], shapes=[shapes])
    part = encode(messages, tokenizer, image_tokens=[1], shapes=[seen])
    expected = encode(messages, tokenizer, image_tokens=[1], shapes=[[shapes[0], shapes[2]]])
    assert len(part.input_ids) == len(whole.input_ids)
    assert part.input_ids[: len(expected.input_ids)].tolist() == expected.input_ids.tolist()
    assert set(part.input_ids[len(expected.input_ids) :].tolist()) == {tokenizer.vocabulary.control_id("pad")}
    assert not part.supervised[len(expected.input_ids) :].any()


def test_a_prompt_ends_where_the_answer_begins_whatever_is_hidden_in_it(tokenizer):
    asked = [IMAGE, {"type": "boxes", "image": 0, "boxes": [{"label": "RBC", "xyxy": [1, 2, 3, 4]}]}, TEXT]
    messages = parse_sample("k", chat(asked, [LABEL]), where="here").messages[:1]
    hidden, seen = ([[box("RBC", 0, 0, is_visible=visible)]] for visible in (False, True))
    one, other = (prompt(messages, tokenizer, image_tokens=[1], shapes=shapes) for shapes in (hidden, seen))
    assert len(one) == len(other)
    assert one[-1] == other[-1] == tokenizer.vocabulary.control_id("assistant")


def test_an_instance_is_its_outline(tokenizer):
    messages = parse_sample("k", chat([IMAGE], [MASK], task="segmentation"), where="here").messages
    corners = ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0))
    encoded = encode(messages, tokenizer, image_tokens=[1], shapes=[[Shape("nucleus", corners)]])
    last = tokenizer.vocabulary.location - 1
    places = [f"<|loc_{round(share * last)}|>" for corner in corners for share in corner]
    assert names(encoded.input_ids[encoded.supervised], tokenizer) == ["<|mask_start|>", *places, "<|mask_end|>", "nucleus", "<|end|>"]


def test_shapes_must_match_the_parts(tokenizer):
    messages = parse_sample("k", found("RBC"), where="here").messages
    with pytest.raises(DataError, match="fewer lists of shapes"):
        encode(messages, tokenizer, image_tokens=[1])
    with pytest.raises(DataError, match="more lists of shapes"):
        encode(messages, tokenizer, image_tokens=[1], shapes=[[], []])


def user(*parts):
    return chat(list(parts), [LABEL])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "sample is list, not a JSON object"),
        ({"messages": []}, "sample has no task"),
        ({"task": 3, "messages": []}, "task of sample is '3', not a string"),
        ({**DOCUMENT, "task": "De tect"}, "task 'De tect' is not a name of small letters, digits and '_'"),
        ({"task": "text"}, "sample has no messages"),
        ({"task": "text", "messages": []}, "messages of sample is '[]', not a list with something"),
        ({"task": "text", "messages": "hello"}, "messages of sample is 'hello', not a list"),
        ({"task": "text", "messages": ["hello"]}, "message 0 is str, not a JSON object"),
        ({"task": "text", "messages": [{"content": "x"}]}, "message 0 has no role"),
        ({"task": "text", "messages": [{"role": "tool", "content": "x"}]}, "message 0 has role 'tool'; roles are"),
        ({"task": "text", "messages": [{"role": "assistant", "content": "x", "name": "y"}]}, "message 0 has unknown fields name; it takes"),
        ({"task": "text", "messages": [{"role": "assistant"}]}, "message 0 has no content"),
        ({"task": "text", "messages": [{"role": "assistant", "content": ""}]}, "content of message 0 is '', not a string"),
        ({"task": "text", "messages": [{"role": "assistant", "content": None}]}, "content of message 0 is 'None', not a list"),
        (user("x"), "message 0, part 0 is str, not a JSON object"),
        (user({"text": "x"}), "message 0, part 0 has no type"),
        (user({"type": "video", "member": "0.mp4"}), "message 0, part 0 has type 'video'; part types are"),
        (user(TEXT, {"type": "text"}), "message 0, part 1 has no text"),
        (user({"type": "text", "text": 7}), "text of message 0, part 0 is '7', not a string"),
        (user({"type": "text", "text": "\ud83d"}), "holds half of a surrogate pair"),
        (user({"type": "image"}), "message 0, part 0 has no member"),
        (user({"type": "image", "member": "0.png", "url": "x"}), "part 0 has unknown fields url; it takes type, member"),
        (user({"type": "audio", "member": "../0.flac"}), "names member '../0.flac'"),
        (user({"type": "audio", "member": ".flac"}), "names member '.flac'"),
        (chat([IMAGE], [{"type": "boxes", "image": 0}], task="detection"), "message 1, part 0 has no boxes"),
        (found("RBC", image=1), "a boxes part lies in picture 1, and 1 pictures stand before it"),
        (found("RBC", image=-1), "image of message 1, part 0 is '-1', not the number of a picture"),
        (found("RBC", image=True), "image of message 1, part 0 is 'True', not the number of a picture"),
        (found(""), "label of box 0 of message 1, part 0 is ''"),
        (found("RBC", [1, 2, 3]), "xyxy of box 0 of message 1, part 0 is '[1, 2, 3]', not four numbers of at least 0"),
        (found("RBC", [-1, 2, 3, 4]), "not four numbers of at least 0"),
        (found("RBC", [1, 2, float("inf"), 4]), "not four numbers of at least 0"),
        (found("RBC", [1, 2, 10**400, 4]), "not four numbers of at least 0"),
        (found("RBC", [1, 2, 1, 4]), "is [1, 2, 1, 4], which has no area"),
        (found("  "), "label of box 0 of message 1, part 0 is blank; give it a name"),
        (found("RBC", score=1), "box 0 of message 1, part 0 has unknown fields score; it takes label, xyxy"),
        (chat([IMAGE], [{**MASK, "labels": "a"}], task="segmentation"), "labels of message 1, part 0 is 'a', not a list"),
        (chat([IMAGE], [{**MASK, "labels": ["a", 7]}], task="segmentation"), "label of instance 2 of message 1, part 0 is '7'"),
        (chat([IMAGE], [{**MASK, "member": "1.jpg"}], task="segmentation"), "names member '1.jpg'; a mask is a PNG"),
        (chat([TEXT], [MASK], task="segmentation"), "a mask part lies in picture 0, and 0 pictures stand before it"),
        (chat([{"type": "item", "id": 7}], [LABEL]), "id of message 0, part 0 is '7', not a string"),
        (chat([{"type": "item", "id": "7", "price": 1}], [LABEL]), "unknown fields price; it takes type, id, text"),
        ({"task": "classification", "messages": [{"role": "system", "content": "be kind"}]}, "neither a user's nor an assistant's message"),
        (chat("x", "y", task="text"), "task 'text' is one assistant message"),
        ({**DOCUMENT, "task": "classification"}, "task 'classification' needs a message before"),
        (
            {"task": "classification", "messages": [*chat("x", "y")["messages"], {"role": "system", "content": "z"}]},
            "a system message after",
        ),
    ],
)
def test_parse_sample_refuses_and_names_the_place(document, message):
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        parse_sample("k", document, where="train-00003.tar sample 7")
    assert str(raised.value).startswith("train-00003.tar sample 7: ")
    assert "\n" not in str(raised.value)
