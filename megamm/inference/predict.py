"""What a model says of files, typed and in source coordinates (`megamm predict`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamm.config import Head, Limits
from megamm.core.errors import ConfigError, DataError, MegaMMError
from megamm.core.types import Message, Part, Sample
from megamm.data.media.files import DEFAULT_LIMITS, decode_picture, media_type
from megamm.data.samples.targets import ANSWERS
from megamm.inference import heads, replies
from megamm.inference.drawing import Colour, draw_reply, instance_map
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import make_prompt
from megamm.tasks import TASKS, Task, recommendation
from megamm.tasks.reply import Reply

_Chat = tuple[tuple[Message, ...], dict[str, bytes]]
"""Messages, and the bytes of the members that they name."""


_LISTS = {"boxes": "boxes", "mask": "instances", "item": "items"}
"""Type of a part -> the name of such parts in a reply."""


@dataclass(frozen=True, slots=True)
class Question:
    """One thing that is asked about.

    Attributes:
        files: Pictures and sounds, shown in their order before the text.
        baskets: Ids of items that a user met, those at one time together, the oldest first.
        text: What is asked; empty for the task's own prompt.
    """

    files: tuple[Path, ...] = ()
    baskets: tuple[tuple[str, ...], ...] = ()
    text: str = ""

    @property
    def items(self) -> tuple[str, ...]:
        """What the user met, each item once."""
        return tuple(dict.fromkeys(item for basket in self.baskets for item in basket))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of a question, which holds the words that were asked.

    Attributes:
        question: What was asked.
        reply: The answer.
        kinds: Types of the parts that answers of the task hold.
    """

    question: Question
    reply: Reply
    kinds: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what was not shown is left out, and what was asked for stands there also where nothing was found."""
        shown = {"files": [str(path) for path in self.question.files], "history": [list(basket) for basket in self.question.baskets]}
        asked = {_LISTS[kind]: [] for kind in self.kinds if kind in _LISTS}
        return {name: value for name, value in shown.items() if value} | {"question": self.question.text} | asked | self.reply.to_json()


@dataclass(frozen=True, slots=True)
class Ranking:
    """How histories are laid out, and items ranked.

    Attributes:
        num_items: Items of a recommendation, best first.
        num_beams: Beginnings of items that a search follows; None ranks every item exactly.
        shows_texts: A history describes its items, as `prepare interactions` writes it unless told `--show codes`. Nothing in a model says
            how its histories were written.
        leaves_out_known: Items of the history are not recommended.

    Raises:
        ConfigError: The search finds fewer items than are wanted.
    """

    num_items: int = 10
    num_beams: int | None = None
    shows_texts: bool = True
    leaves_out_known: bool = False

    def __post_init__(self) -> None:
        replies.check_beams(self.num_beams, self.num_items)


def predict(
    loaded: Loaded,
    task: str,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 512,
    ranking: Ranking = Ranking(),
) -> Iterator[Prediction]:
    """Answer questions of one task, in their order: in tokens, by a ranking of items, or by the model's head where it has one.

    Args:
        loaded: The model.
        task: Its name.
        questions: What is asked about.
        batch_size: Questions that run at once.
        max_new_tokens: Bound on an answer, in tokens.
        ranking: How histories are shown and items ranked.

    Raises:
        ConfigError: The task is unknown or none that the model answers, or ranks no items though `ranking` says how.
        DataError: A file cannot be used, or an item is unknown.
        MegaMMError: The model overflows.
    """
    asked = _known_task(loaded, task, ranking)
    trie = ItemTrie.of(loaded) if task == recommendation.TASK.name else None
    for start in range(0, len(questions), batch_size):
        batch = [replace(question, text=question.text or asked.prompt) for question in questions[start : start + batch_size]]
        chats = [_chat(loaded, question, ranking) for question in batch]
        for question, (messages, _) in zip(batch, chats, strict=True) if loaded.model.head is None else ():
            # A head says itself what it looks at.
            _check_question(asked, question, messages)
        if loaded.model.head is not None:
            said = heads.predict(loaded, [Sample("", task, messages, media) for messages, media in chats], batch_size=batch_size)
        elif trie is not None:
            said = _recommended(loaded, trie, batch, chats, ranking)
        else:
            prompts = [make_prompt(loaded, *chat) for chat in chats]
            views = [prompt.images[0].view if prompt.images else None for prompt in prompts]
            said = replies.answers(loaded, prompts, views, max_new_tokens=max_new_tokens)
        for number, (question, reply) in enumerate(zip(batch, said, strict=True), start + 1):
            if not reply.has_finite_scores:
                raise MegaMMError(
                    f"{loaded.source} gives no finite score in answer {number} of {len(questions)}; its weights or activations overflow: "
                    "take an earlier checkpoint, or train in bf16 or fp32"
                )
            yield Prediction(question, reply, asked.kinds)


def questions_of(files: Sequence[Path], baskets: Sequence[Sequence[str]], text: str, *, together: bool = False) -> list[Question]:
    """A question for each file, one about all of them `together`, or one without a file.

    Args:
        files: Pictures and sounds.
        baskets: What every question shows of a user, the oldest first.
        text: What is asked; empty for the task's own prompt.
        together: One question about all files.

    Raises:
        ConfigError: A file is missing or is no picture and no sound, or nothing is asked about.
    """
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; name pictures and sounds")
        if media_type(path.name) is None:
            raise ConfigError(f"{path} is no picture and no sound that can be read; name a jpg, png, webp, wav, flac, ogg or mp3 file")
    if not files and not baskets and not text:
        raise ConfigError("nothing is asked about; name files, or give --text or --items")
    history = tuple(map(tuple, baskets))
    groups = [tuple(files)] if together else [(path,) for path in files]
    return [Question(group, history, text) for group in groups or [()]]


def draw(
    prediction: Prediction,
    path: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    least_score: float = 0.0,
    colours: dict[str, Colour] | None = None,
) -> bool:
    """Write a question's picture with the answer drawn over it, and a map of its instances; False where it is about no picture.

    Args:
        prediction: Of a question.
        path: A PNG; its folder is made where it is missing. The map of `a.png` is `a.instances.png`, where there are instances.
        limits: What of a picture is refused.
        least_score: Of the boxes and instances that are drawn.
        colours: Of labels in all pictures of a series, as `draw_reply` takes them.
    """
    pictures = [path for path in prediction.question.files if media_type(path.name) == "image"]
    if not pictures:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    reply = prediction.reply.surer_than(least_score)
    draw_reply(decode_picture(pictures[0].read_bytes(), limits), reply, colours=colours).save(path)
    numbered = path.with_suffix(".instances.png")
    if reply.instances:
        instance_map(reply.instances).save(numbered)
    else:
        # One of an earlier answer would be taken for this one's.
        numbered.unlink(missing_ok=True)
    return True


def line(prediction: Prediction) -> str:
    """A prediction as one line of JSON."""
    return json.dumps(prediction.to_json(), ensure_ascii=False)


def _known_task(loaded: Loaded, name: str, ranking: Ranking) -> Task:
    """The task, where this model can be asked for it so."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is not known; the tasks are {', '.join(TASKS)}")
    if name == "text":
        raise ConfigError("task 'text' continues documents and answers nothing; use `megamm generate`")
    if name != recommendation.TASK.name and ranking != Ranking():
        raise ConfigError(f"task {name!r} ranks no items, so that there is nothing to show, search, count or exclude; drop these options")
    if loaded.model.head is not None:
        _check_head(loaded.model.head.settings, TASKS[name])
    return TASKS[name]


def _check_question(task: Task, question: Question, messages: Sequence[Message]) -> None:
    try:
        task.check_question(messages)
    except DataError as error:
        raise ConfigError(f"{', '.join(map(str, question.files)) or 'the text alone'}: {error}") from None


def _check_head(head: Head, task: Task) -> None:
    """Refuse a task whose answers are none that the head gives."""
    answers = ANSWERS.get(head.kind, ())
    if not answers:
        raise ConfigError(f"a {head.kind} head fills in what is hidden and answers nothing; ask a run that was tuned from this one")
    if not set(answers) & set(task.kinds):
        fitting = [name for name, one in TASKS.items() if set(answers) & set(one.kinds) and name != "text"]
        raise ConfigError(
            f"task {task.name!r} is answered with {' or '.join(task.kinds)}, and this model's {head.kind} head says "
            f"{' or '.join(answers)}; ask it for {', '.join(fitting)}"
        )


def _recommended(loaded: Loaded, trie: ItemTrie, questions: Sequence[Question], chats: Sequence[_Chat], ranking: Ranking) -> list[Reply]:
    return replies.rankings(
        loaded,
        trie,
        [make_prompt(loaded, *chat) for chat in chats],
        num_items=ranking.num_items,
        num_beams=ranking.num_beams,
        excluded=[question.items for question in questions] if ranking.leaves_out_known else (),
    )


def _chat(loaded: Loaded, question: Question, ranking: Ranking) -> _Chat:
    """The question as samples hold it, those of `prepare interactions` among them, and the bytes of its files."""
    media = {str(path): path.read_bytes() for path in question.files}
    parts = [Part(media_type(path.name) or "", member=str(path)) for path in question.files]
    items = loaded.tokenizer.items if ranking.shows_texts else None
    for basket in question.baskets:
        parts += [Part("item", text=items.text_of(item) if items else "", data={"id": item}) for item in basket]
        parts.append(Part("text", text=recommendation.BASKET_END))
    parts.append(Part("text", text=question.text))
    return (Message("user", tuple(parts)),), media
