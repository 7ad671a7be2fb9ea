"""The configuration of `mujina preferences`: which prompts, who answers them, who judges, and which pairs are made of that."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from mujina.answers import Sampling
from mujina.user_input import Section


class AnswersConfig(Section):
    """Who answers, how often, and how the answers are drawn."""

    model: str
    """A Hugging Face folder with a chat template, or the model of a server: http://host:port/v1#model."""
    number: int = Field(default=4, ge=2, le=1_000)
    """Answers to each prompt."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """1 draws from the model's own distribution; lower values sharpen it."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The likeliest tokens that have this much probability together are drawn from."""
    max_new_tokens: int = Field(default=1024, gt=0, le=1_000_000)
    """Longest answer, in tokens. What is longer is cut off, and left out."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the draws; the same seed and model draw the same answers, as far as a server keeps to it."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.number, self.seed)


class NumberRule(Section):
    """An answer is right, and scores 1, when the last number in it equals the one that the row states; else it scores 0."""

    kind: Literal["number"] = "number"
    field: str = "answer"
    """The field of a row of prompts that has the right number."""


class PatternRule(Section):
    """An answer scores 1 when a regular expression is found in it, and else 0."""

    kind: Literal["pattern"] = "pattern"
    pattern: str
    """The regular expression, as Python's `re` reads it; `\\Z` is the end of the answer."""
    field: str | None = None
    """The field of a row of prompts that the first group of the last match has to equal, as text. Null: a match is enough."""

    @pydantic.model_validator(mode="after")
    def _can_be_read(self) -> "PatternRule":
        try:
            num_groups = re.compile(self.pattern).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern ({self.pattern[:100]!r}) is no regular expression ({error}): mend it") from None
        if self.field is not None and not num_groups:
            raise ValueError(f"pattern ({self.pattern[:100]!r}) has no group to compare with {self.field}: put the part into (…)")
        return self


class _ModelJudge(Section):
    model: str
    """A Hugging Face folder with a chat template, or the model of a server: http://host:port/v1#model."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """0 is greedy decoding."""
    max_new_tokens: int = Field(default=1024, gt=0, le=1_000_000)
    """Longest judgement, in tokens."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of judgements that are drawn."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, seed=self.seed)


class PairwiseJudge(_ModelJudge):
    """A model says which of two answers is better, for all pairs of a prompt's answers and in both orders. Where the two orders do not say the
    same, or call them equally good, neither is."""

    kind: Literal["pairwise"] = "pairwise"
    prompt: str = "pairwise_en"
    """One of Mujina's judge prompts (pairwise_en, pairwise_ja), or the path of a YAML file with the same keys."""


class ScoreJudge(_ModelJudge):
    """A model gives every answer a score."""

    kind: Literal["score"] = "score"
    prompt: str = "score_en"
    """One of Mujina's judge prompts (score_en, score_ja), or the path of a YAML file with the same keys."""


class PreferencesConfig(Section):
    """Where prompts come from, and what is made of the answers to them."""

    prompts: list[str] = Field(min_length=1)
    """Files of .jsonl[.gz|.zst], in order. A row is {"messages": [turns …]}, of which the last is the user's; rules read further fields."""
    limit: int | None = Field(default=None, gt=0)
    """Only the first so many prompts. Null: all."""
    output: Path
    """The folder for pairs.jsonl, summary.json and journal.jsonl."""
    answers: AnswersConfig
    """Who answers."""
    judge: Annotated[NumberRule | PatternRule | PairwiseJudge | ScoreJudge, Field(discriminator="kind")]
    """What prefers one answer to another."""
    choose: Literal["best_and_worst", "every_pair"] = "best_and_worst"
    """best_and_worst: one pair of a prompt, the best of its answers and the worst, by scores or by wins less losses. every_pair: all in which
    one is better."""
