"""Whether a dialogue is one that a chat template can render: roles, order and contents of its turns."""

from typing import Literal

from datatrove.data import Document
from pydantic import PositiveInt

from data_prep.steps.step import Judge, Step


class Dialogue(Step):
    """Keeps an optional system turn, then user and assistant in turn, from a user's to an assistant's, none of them empty."""

    step: Literal["dialogue"] = "dialogue"
    max_turns: PositiveInt | None = None
    """Turns, the system turn counted; null: any number."""
    max_characters: PositiveInt | None = None
    """Characters of all turns together; null: any number."""

    def start(self) -> Judge:
        return self._judge

    def _judge(self, document: Document) -> str | None:
        messages = document.metadata.get("messages")
        if not messages:
            return "no_messages"
        roles = [turn["role"] for turn in messages]
        unknown = sorted(set(roles) - {"system", "user", "assistant"})
        if unknown:
            return f"roles: {', '.join(unknown)}"
        spoken = roles[1:] if roles[0] == "system" else roles
        if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
            return f"order: {' '.join(roles[:8])}"
        if not all(turn["content"].strip() for turn in messages):
            return "empty_turn"
        if self.max_turns is not None and len(messages) > self.max_turns:
            return f"too_many_turns: {len(messages)}"
        characters = sum(len(turn["content"]) for turn in messages)
        if self.max_characters is not None and characters > self.max_characters:
            return f"too_long: {characters}"
        return None
