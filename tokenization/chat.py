"""Dialogues as a chat template writes them, cut into control tokens and text, and into what the assistant has to say and the rest.

What the assistant has to say is told in one of two ways:

    {% generation %} blocks    where the template has them they say it, as in transformers' return_assistant_tokens_mask
    turn by turn               else the dialogue is written up to each turn of the assistant with the generation prompt, and up to its
                               end. Each must be how the next one begins, and the last one how the whole dialogue begins. What is new
                               between the first and the second is the answer, up to the control token that ends it: white space that
                               a template writes behind that token stands between the turns, and nobody is asked to say it.

Neither is guessed at: a template that writes earlier turns otherwise once others follow (without their reasoning, for example), that ends
a turn with no control token, or whose generation prompt is not how a turn begins is refused. So is a token that is an answer by half.
"""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mujina.user_input import UserError

BLOCK = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
REMEDY = "put {% generation %} and {% endgeneration %} around what the assistant says (with the token that ends its turn)"
Messages = Sequence[dict[str, str]]
Span = tuple[int, int]  # of characters, the second one not included


class Part(NamedTuple):
    """A stretch of a dialogue as it is written: one control token, or text that is none, whatever it spells."""

    text: str
    is_control: bool
    is_answer: bool


class ChatTemplate:
    """A jinja template and the control tokens that it may write."""

    def __init__(
        self, source: str, where: Path, controls: Mapping[str, tuple[bool, bool]], special: Mapping[str, str] | None = None
    ) -> None:
        """`where` is the folder to name in errors.

        controls  how control tokens are spelled, and whether each takes the white space on its left and on its right with it
        special   the tokens that the template may name, such as bos_token
        """
        self._source, self._where, self._special = source, where, dict(special or {})
        self.hash = hashlib.sha256(json.dumps([source, self._special, dict(controls)], sort_keys=True).encode()).hexdigest()
        self._has_blocks = BLOCK.search(source) is not None
        longest_first = sorted(controls, key=len, reverse=True)
        self._spelled = re.compile(f"(?=(?:{'|'.join(map(re.escape, longest_first))})).", re.DOTALL)  # the first character of each
        white = {piece: (r"\s*" * left, r"\s*" * right) for piece, (left, right) in controls.items()}
        self._controls = re.compile("|".join(f"{white[piece][0]}({re.escape(piece)}){white[piece][1]}" for piece in longest_first))

    def parts(self, messages: Messages, add_generation_prompt: bool = False, with_answers: bool = True) -> list[Part]:
        """The dialogue. Two texts that follow each other are one text, of which one is an answer and the other is not.

        Raises UserError when the template refuses the dialogue, or does not tell what is an answer, unless that is not asked for.
        """
        # What a message spells like a control token goes through the template with a mark in it, which nobody wrote.
        taken = self._source + "".join(str(value) for message in messages for value in message.values())
        mark, begin, end = islice((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken), 3)
        messages = [{key: self._spelled.sub(rf"\g<0>{mark}", value) for key, value in message.items()} for message in messages]
        try:
            written = self._write(messages, add_generation_prompt, begin, end)
        except TemplateError as error:
            raise UserError(
                f"{self._where}: its chat template cannot write this dialogue ({error}): see what messages it expects"
            ) from None
        text, answers = _blocks(written, begin, end)
        if not with_answers:
            answers = []
        elif not self._has_blocks:
            answers = [self._answer(messages, turn, text) for turn, message in enumerate(messages) if message["role"] == "assistant"]
        edges = [edge for answer in answers for edge in answer]
        if edges != sorted(edges):
            raise self._refuse("makes the answers of two turns overlap", REMEDY)
        controls = [(match, match.span(match.lastindex or 0)) for match in self._controls.finditer(text)]
        self._check_ends(text, answers, {span for _, span in controls})
        parts: list[Part] = []
        start = 0
        for match, span in controls:
            parts += [Part(text[a:b].replace(mark, ""), False, is_answer) for a, b, is_answer in _cut(start, match.start(), edges)]
            control = [Part(text[a:b], True, is_answer) for a, b, is_answer in _cut(*span, edges)]
            if len(control) > 1:
                raise self._refuse(f"begins or ends an answer within the token {text[slice(*span)]}", REMEDY)
            parts += control
            start = match.end()
        return parts + [Part(text[a:b].replace(mark, ""), False, is_answer) for a, b, is_answer in _cut(start, len(text), edges)]

    def _answer(self, messages: Messages, turn: int, whole: str) -> Span:
        """Where the answer of a turn stands in the whole dialogue, told from the dialogue up to this turn."""
        name = f"turn {turn + 1} (assistant)"
        try:
            before = self._write(messages[:turn], add_generation_prompt=False)
            prompt = self._write(messages[:turn], add_generation_prompt=True)
            written = self._write(messages[: turn + 1], add_generation_prompt=False)
        except TemplateError as error:
            raise self._refuse(f"cannot write the dialogue up to {name} by itself, to tell what the answer is ({error})", REMEDY) from None
        if not written.startswith(prompt):
            raise self._refuse(f"does not begin {name} with the generation prompt", REMEDY)
        if not whole.startswith(written):
            raise self._refuse(f"writes {name}, or what precedes it, otherwise once other turns follow", REMEDY)
        said = written[len(prompt) :]
        if prompt == before and not said.lstrip().startswith(messages[turn]["content"].strip()):
            raise self._refuse(f"writes no generation prompt before {name}, though more than the answer follows", REMEDY)
        return len(prompt), len(prompt) + len(said.rstrip())

    def _check_ends(self, text: str, answers: list[Span], controls: set[Span]) -> None:
        """Who never sees the token that ends a turn as something to say will never stop."""
        starts, ends = {start for start, _ in controls}, {end for _, end in controls}
        for start, end in answers:
            if text[start:end].strip() and len(text[:end].rstrip()) in ends:
                continue
            if self._has_blocks and end in starts:
                raise self._refuse("has the token that ends a turn behind {% endgeneration %}", "move it into the block")
            if not self._has_blocks:
                raise self._refuse("ends an assistant's turn with no control token", "write one behind the content, such as eos_token")

    def _refuse(self, problem: str, remedy: str) -> UserError:
        return UserError(f"{self._where}: its chat template {problem}: {remedy} in chat_template.jinja")

    def _write(self, messages: Messages, add_generation_prompt: bool, begin: str = "", end: str = "") -> str:
        """The template's text, `begin` and `end` around each of its generation blocks. Raises jinja's TemplateError."""
        values = self._special | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._compiled.render(values, answer_begins=begin, answer_ends=end)

    @cached_property
    def _compiled(self) -> Template:
        # Hugging Face renders with this class and these settings, so what is tested here is what a server will do. But for the date of
        # today: the same dialogue is to give the same ids tomorrow, and templates have a date for engines that tell none.
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self._source)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: the values `answer_begins` and `answer_ends` around a block with names of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("answer_begins", "answer_ends"))
        return nodes.Scope([begin, *body, end], lineno=line)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _blocks(written: str, begin: str, end: str) -> tuple[str, list[Span]]:
    """The text without the marks, and where the blocks between them are; a block within a block is a part of it."""
    text, answers, depth, start = "", list[Span](), 0, 0
    for piece in re.split(f"([{begin}{end}])", written):
        if piece == begin:
            start = start if depth else len(text)
            depth += 1
        elif piece == end:
            depth -= 1
            answers += [] if depth else [(start, len(text))]
        else:
            text += piece
    return text, answers


def _cut(start: int, end: int, edges: list[int]) -> list[tuple[int, int, bool]]:
    """A stretch of text, cut at the edges of answers (which begin and end in turn): (start, end, whether it is an answer)."""
    inner = edges[bisect_right(edges, start) : bisect_left(edges, end)]
    return [(first, last, bisect_right(edges, first) % 2 == 1) for first, last in pairwise([start, *inner, end]) if first < last]
