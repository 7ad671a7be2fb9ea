"""The ledger of a checkpoint: what has been consumed, where the weights came from, and what a run remembers of its steps. Needs no torch.

It is RUN/checkpoints/step-*/ledger.json:

    tokens, block_length    consumed by the run; tokens in a block of the sources
    phases                  name, steps, tokens, sequence_length (in tokens; older ledgers lack it), and of each source samples, tokens (in
                            a phase of dialogues the places of its packs), the blocks or dialogues that belong to the phase, and a checksum
    origin                  where the weights of step 0 came from: kind (imported, upcycled, averaged, trained), of (what identifies the
                            models), ledger (the first one's own, with its origin), hugging_face (configuration of a Hugging Face folder)
    base                    of an adapter's run: the frozen weights, {run, step, tokens, files} or {folder, files} with the files' checksums
    interventions           skipped steps, rollbacks, and the windows of losses and norms (stability.Guard)
    expert_load             shares of the experts in the last step [layer][expert]
"""

import json
from typing import Any, Literal

import pydantic

from mujina.user_input import Section, parse, parse_object, reading


class Consumed(Section):
    """What a phase has taken of a source."""

    samples: int
    tokens: int
    first_block: int | None = None
    num_blocks: int | None = None
    first_dialogue: int | None = None
    num_dialogues: int | None = None
    checksum: str


class PhaseRecord(Section):
    name: str
    steps: int
    tokens: int
    sequence_length: int | None = None
    sources: dict[str, Consumed]


class Origin(Section):
    """Where the weights of a run's first step came from."""

    kind: Literal["imported", "upcycled", "averaged", "trained"]
    of: tuple[dict[str, Any], ...]  # {run, step, tokens, files} of checkpoints, {folder, files} of Hugging Face folders
    ledger: "Ledger | None" = None  # of the first of them
    hugging_face: dict[str, Any] | None = None  # of a Hugging Face folder: config, generation_config, type, other_types

    def __str__(self) -> str:
        """As people are told: "upcycled from runs/dense, step 450, 614,400 tokens"."""
        verb = {"imported": "imported from", "upcycled": "upcycled from", "averaged": "the mean of", "trained": "from the weights of"}
        return f"{verb[self.kind]} {'; '.join(map(told, self.of))}"


class Ledger(Section):
    tokens: int = 0
    block_length: int | None = None  # None before anything is consumed
    phases: tuple[PhaseRecord, ...] = ()
    origin: Origin | None = None
    base: dict[str, Any] | None = None
    interventions: dict[str, Any] | None = None
    expert_load: list[list[float]] | None = None

    @property
    def untouched_import(self) -> dict[str, Any] | None:
        """The Hugging Face side of a model that was imported and not trained here."""
        return self.origin.hugging_face if self.origin and self.origin.kind == "imported" and not self.tokens else None

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that it was trained on, here or in what it came from; 0 where none is known."""
        before = self.origin.ledger.context if self.origin and self.origin.ledger else 0
        return max([before, *(phase.sequence_length or 0 for phase in self.phases if phase.steps)])

    @property
    def hugging_face(self) -> dict[str, Any] | None:
        """The Hugging Face side of the folder that it all began with, however often it was trained, averaged or upcycled since."""
        origin = self.origin
        while origin and origin.hugging_face is None:
            origin = origin.ledger.origin if origin.ledger else None
        return origin.hugging_face if origin else None

    def origin_for(self, identity: dict[str, Any]) -> Origin:
        """The origin of a run that starts from the checkpoint of this ledger; one that was not trained passes its own on."""
        return self.origin if self.origin and not self.tokens else Origin(kind="trained", of=(identity,), ledger=self)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Ledger":
        """Raises UserError when the text is no ledger."""
        remedy = "the checkpoint is damaged; take an older one"
        with reading(where, "a ledger", remedy):
            return parse(parse_object(text, where, remedy), cls, where)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _earlier_spelling(cls, values: Any) -> Any:
        """Checkpoints of version 0.1 tell their origin under a key for each kind."""
        if not isinstance(values, dict) or "origin" in values:
            return values
        values = dict(values)
        imported, averaged, upcycled = (values.pop(f"{kind}_from", None) for kind in ("imported", "averaged", "upcycled"))
        if upcycled:
            before = upcycled.pop("ledger", None)
            values["origin"] = {"kind": "upcycled", "of": [upcycled], "ledger": before}
        elif averaged:
            values["origin"] = {"kind": "averaged", "of": averaged}
        elif imported:
            values["origin"] = {"kind": "imported", "of": [{"folder": imported.pop("folder")}], "hugging_face": imported}
        return values


def told(identity: dict[str, Any]) -> str:
    """What identifies a model, as people are told."""
    if "folder" in identity:
        return str(identity["folder"])
    return f"{identity['run']}, step {identity['step']:,}, {identity['tokens']:,} tokens"
