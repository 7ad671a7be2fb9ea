"""Rows of prompts: what is asked, and what rules know of the right answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pydantic

from mujina.answers import Conversation, PromptMessages
from mujina.files import read_rows
from mujina.user_input import Section, UserError, parse


@dataclass(frozen=True)
class Prompt:
    """id: the row's own, else <name of the file>:<number of the line>; where: for errors; fields: the whole row."""

    id: str
    where: str
    conversation: Conversation
    fields: dict[str, Any]


class _Row(Section):
    model_config = pydantic.ConfigDict(extra="ignore")

    messages: PromptMessages


def read_prompts(paths: Sequence[str], limit: int | None) -> list[Prompt]:
    """Raises UserError, naming the line, where a row is none, and where there is none."""
    prompts: list[Prompt] = []
    for path in paths:
        for number, fields in read_rows(path):
            if len(prompts) == limit:
                return prompts
            where = f"{path} line {number}"
            own = fields.get("id")
            id = str(own) if isinstance(own, str | int) and own != "" else f"{path.rpartition('/')[2]}:{number}"
            prompts.append(Prompt(id, where, Conversation(parse(fields, _Row, where).messages), fields))
    if not prompts:
        raise UserError(f'{", ".join(paths)}: no prompts: write rows of {{"messages": [{{"role": "user", "content": "..."}}]}}')
    return prompts
