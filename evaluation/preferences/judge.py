"""Models that judge answers: which of two is better, asked in both orders, or how good one is.

A judge's prompt is a YAML file, of our own in prompts/ or of the user's: `JudgePrompt` is what it holds. What a judge answers has a verdict
where all that the pattern finds in it is the same: one that repeats its prompt, or weighs several verdicts, has none.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic

from evaluation.preferences.choice import Judged, Texts, by_scores
from evaluation.preferences.config import PairwiseJudge, ScoreJudge
from evaluation.preferences.rows import Prompt
from evaluation.progress import asked
from mujina.answers import Answer, Conversation, Message, Request, open_answerer
from mujina.answers.journal import Journal, Journalled
from mujina.files import sha256_of
from mujina.user_input import Section, UserError, nearest, read_yaml

FOLDER = Path(__file__).with_name("prompts")
_SLOT = re.compile(r"\{(\w+)\}")


class JudgePrompt(Section):
    """What a judge is asked, and how its verdict is found. The texts may have {conversation}, and {answer}, or {answer_a} and {answer_b}."""

    version: int
    """Raised with every change; it stands in the provenance of pairs."""
    system: str | None = None
    """What the judge is told about its task."""
    user: str
    """What it is asked about one answer, or two."""
    verdict: str
    """A regular expression whose first group is the verdict: A, B or C (as good), or the score."""
    lowest: float = 0
    """Scores below it are no verdict."""
    highest: float = 10
    """Scores above it are no verdict."""

    @pydantic.field_validator("verdict")
    @classmethod
    def _has_a_group(cls, verdict: str) -> str:
        try:
            if re.compile(verdict).groups != 1:
                raise ValueError("must have one group, which is the verdict: put it into (…)")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is no regular expression ({error}): mend it") from None
        return verdict


class ModelJudge:
    """Raises UserError where there is no such prompt, or it has not the slots that its kind fills in."""

    def __init__(self, config: PairwiseJudge | ScoreJudge) -> None:
        self._config, self._slots = config, ["answer"] if isinstance(config, ScoreJudge) else ["answer_a", "answer_b"]
        self._path = _path_of(config.prompt)
        self._prompt = read_yaml(self._path, JudgePrompt)
        known = ["conversation", *self._slots]
        for name in _SLOT.findall(f"{self._prompt.system or ''}{self._prompt.user}"):
            if name not in known:
                raise UserError(f"{self._path}: there is no slot {{{name}}} in prompts of kind {config.kind}: {nearest(name, known)}")
        for name in known:
            if f"{{{name}}}" not in self._prompt.user:
                raise UserError(f"{self._path}: user has no {{{name}}}: write where it stands")
        self.provenance: dict[str, Any] = {"kind": config.kind, "prompt": config.prompt, "version": self._prompt.version}
        self.provenance |= {"prompt_sha256": sha256_of(self._path), "temperature": config.temperature, "seed": config.seed}

    def judge(self, prompts: Sequence[Prompt], answers: Texts, journal: Journal, counts: dict[str, int]) -> list[Judged]:
        answerer = Journalled(open_answerer(self._config.model), journal)
        self.provenance["model"] = answerer.model
        wanted: list[tuple[int, tuple[int, ...]]]
        if isinstance(self._config, ScoreJudge):
            wanted = [(row, (number,)) for row, texts in enumerate(answers) for number, text in enumerate(texts) if text is not None]
        else:
            wanted = [(row, order) for row, texts in enumerate(answers) for pair in _pairs(texts) for order in (pair, pair[::-1])]
        requests = ((one, Request(self._conversation(prompts, answers, *one), self._config.sampling)) for one in wanted)
        found: list[dict[tuple[int, ...], str]] = [{} for _ in prompts]
        for (row, numbers), said in asked(answerer, requests, len(wanted), "judging"):
            counts["judgements"] += 1
            if not isinstance(said, Answer):
                counts["failed judgements"] += 1
                if counts["failed judgements"] == 1:
                    print(f"{prompts[row].where}: the judge has no answer: {said.reason}")
            elif (verdict := self._verdict(said.text)) is not None:
                found[row][numbers] = verdict
            else:
                counts["judgements without a verdict"] += 1
                if counts["judgements without a verdict"] == 1:
                    print(f"{prompts[row].where}: the judge gives no verdict, or several: {said.text[-200:]!r}")
        if isinstance(self._config, ScoreJudge):
            return [
                by_scores([float(known[number,]) if (number,) in known else None for number in range(len(texts))])
                for texts, known in zip(answers, found, strict=True)
            ]
        return [_compared(texts, known, counts) for texts, known in zip(answers, found, strict=True)]

    def _conversation(self, prompts: Sequence[Prompt], answers: Texts, row: int, numbers: tuple[int, ...]) -> Conversation:
        turns = prompts[row].conversation.messages
        filled = {"conversation": "\n\n".join(f"[{message.role}]\n{message.content}" for message in turns)}
        filled |= {slot: answers[row][number] or "" for slot, number in zip(self._slots, numbers, strict=True)}

        # In one pass: what an answer holds is no slot.
        def fill(text: str) -> str:
            return _SLOT.sub(lambda found: filled[found[1]], text)

        system = [Message(role="system", content=fill(self._prompt.system))] if self._prompt.system else []
        return Conversation((*system, Message(role="user", content=fill(self._prompt.user))))

    def _verdict(self, text: str) -> str | None:
        found = set(re.findall(self._prompt.verdict, text))
        if len(found) != 1:
            return None
        verdict: str = found.pop()
        if not isinstance(self._config, ScoreJudge):
            return verdict if verdict in ("A", "B", "C") else None
        try:
            return verdict if self._prompt.lowest <= float(verdict) <= self._prompt.highest else None
        except ValueError:
            return None


def _compared(texts: Sequence[str | None], verdicts: dict[tuple[int, ...], str], counts: dict[str, int]) -> Judged:
    """An answer wins over another where both orders say so; its score is wins less losses."""
    judged = Judged([None if text is None else 0.0 for text in texts])
    for i, j in _pairs(texts):
        both = verdicts.get((i, j)), verdicts.get((j, i))
        if None in both:
            continue
        if both in (("A", "B"), ("B", "A")):
            better, worse = (i, j) if both[0] == "A" else (j, i)
            judged.wins.append((better, worse))
            judged.scores[better] = (judged.scores[better] or 0.0) + 1
            judged.scores[worse] = (judged.scores[worse] or 0.0) - 1
        else:
            counts["ties" if both == ("C", "C") else "disagreements"] += 1
    return judged


def _pairs(texts: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """Of answers that are there and differ."""
    for i, one in enumerate(texts):
        for j in range(i + 1, len(texts)):
            if one is not None and texts[j] is not None and one != texts[j]:
                yield i, j


def _path_of(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = [path.stem for path in FOLDER.glob("*.yaml")]
        raise UserError(f"judge.prompt ({name}): no such prompt: {nearest(name, known)}; or write the path of a .yaml file")
    return path
