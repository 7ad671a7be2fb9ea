"""What a row is: one text or one dialogue with its labels, read from a line of JSONL, a row of a table, a record of an archive or a file.

    text       a string without NUL, of at most LONGEST (64 Mi) characters; or
    messages   the turns of a dialogue, [{"role": "...", "content": "..."}, ...], their contents together like a text. They win over a
               text beside them, and a source of kind chat needs them; in one of kind preferences they are a pair (`pairs.py`)
    id         the row's own, else <name of the file>:<number of the row>
    kind, origin                          the source's: a row that states another is an error, because phases rely on them
    language, licence, teacher, source    strings; the source's where a row states none (null or "")
    url        a string, for the steps
Other keys are passed over. Every reader asks `row_of`, with steps (`steps.read`) and without (`blocks`): what is no row is none in both.
A reader finds fields, which are unchecked, and says where; here it is said what is wrong with them.
"""

import re
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args

from data_prep import pairs
from mujina.files import LONGEST, parse_row, too_long
from mujina.user_input import Section

Kind = Literal["web", "code", "documents", "chat", "preferences"]
Origin = Literal["human", "synthetic", "rule"]

LONGEST_OF_OURS = 16 * LONGEST  # bytes of a line that steps have written: JSON may take 12 for a character
INVISIBLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]*"
)  # blanks, controls, marks of direction
LABELS = ("kind", "origin", "language", "licence", "teacher", "source")
KEYS = ("text", "messages", "id", "url", *LABELS, *pairs.KEYS)  # that a row may bring from a file of rows


class SourceFacts(Section):
    """What phases may know of a source. `language`, `licence` and `teacher` hold for the rows that do not state their own."""

    kind: Kind
    """What kind of text it is."""
    origin: Origin = "human"
    """Who wrote it: human, synthetic (a model; `teacher` is its name), or rule (a program)."""
    language: str = "unknown"
    """Of the rows that do not state their own, such as ja."""
    licence: str = "unknown"
    """Of the rows that do not state their own."""
    teacher: str | None = None
    """The model that wrote the rows that do not state their own."""

    def labels(self, name: str) -> dict[str, str]:
        """The labels of the rows of this source, which is called `name`, where they state none."""
        return self.model_dump(include=set(SourceFacts.model_fields), exclude_none=True) | {"source": name}


Fields = dict[str, Any]  # of a row, as they were found


class Row(TypedDict):
    """A checked row. It has exactly one of `text` and `messages`; `date` and `html` (the text is a page) come from archives."""

    id: str
    text: NotRequired[str]
    messages: NotRequired[list[dict[str, str]]]
    kind: Kind
    origin: Origin
    language: str
    licence: str
    teacher: NotRequired[str]
    source: str
    url: NotRequired[str]
    date: NotRequired[str]
    html: NotRequired[bool]


def fields_of(line: bytes) -> Fields | str:
    """The fields of a line of JSONL, or why it has none."""
    fields = parse_row(line)
    return fields if isinstance(fields, str) else known(fields)


def known(fields: Fields) -> Fields:
    """Those that are read."""
    return {key: fields[key] for key in KEYS if key in fields}


def row_of(fields: Fields, id: str, labels: dict[str, str]) -> Row | str:
    """The row of these fields, or why they are none.

    id       the row's, unless it has its own
    labels   the source's, see `SourceFacts.labels`
    """
    for label in (*LABELS, "url"):
        if not isinstance(fields.get(label), str | None):
            return f"{label} is {_short(fields[label])}, not a string: mend the row"
    for label, known in (("kind", get_args(Kind)), ("origin", get_args(Origin))):
        if fields.get(label) not in (None, labels.get(label)):
            return (
                f"{label} is {fields[label]!r}, but the source declares {labels.get(label)!r}: put the row into a source of its own "
                f"(known: {', '.join(known)})"
            )
    if labels.get("kind") == "preferences":
        turns = pairs.turns_of(fields)
        if isinstance(turns, str):
            return turns
        fields = fields | {"messages": turns}
    fields = {key: value for key, value in fields.items() if key not in pairs.KEYS}
    text, messages = fields.get("text"), fields.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            return '`messages` is not a list of turns: write [{"role": "user", "content": "..."}, ...]'
        for turn in messages:
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
                return f"the turn {_short(turn)} lacks a string `role` or `content`: add it"
        text = joined(messages)
    elif not isinstance(text, str):
        return "has neither a string `text` nor `messages`: add one"
    elif labels.get("kind") == "chat":
        return "a source of kind chat needs `messages`, this row has only `text`: use kind documents or web"
    if "\0" in text:
        return f"holds a NUL byte at character {text.index('\0')}, which is no text: mend or drop it"
    if len(text) > LONGEST:
        return too_long("text", LONGEST)
    stated = {key: value for key, value in fields.items() if value is not None and (value != "" or key == "text")}
    if messages is not None:
        stated.pop("text", None)
    return cast(Row, labels | stated | {"id": str(stated.get("id", id))})


def is_nothing(text: str) -> bool:
    """Whether a text has no character that can be seen. Such a document would be an end-of-document token and nothing before it."""
    return INVISIBLE.fullmatch(text) is not None


def joined(messages: list[dict[str, str]]) -> str:
    """The contents of a dialogue's turns, by lines."""
    return "\n".join(turn["content"] for turn in messages)


def _short(value: Any) -> str:
    return repr(value)[:200]
