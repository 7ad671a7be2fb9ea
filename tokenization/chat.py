"""Dialogues as a chat template writes them, cut into control tokens and text, and into what the assistant has to say and the rest.

What the assistant has to say is told in one of two ways:

    {% generation %} blocks    where the template has them they say it, as in transformers' return_assistant_tokens_mask
    turn by turn               else the dialogue is written up to each turn of the assistant with the generation prompt, and up to its
                               end. Each must be how the next one begins, and the last one how the whole dialogue begins. What is new
                               between the first and the second is the answer, up to the control token that ends it: white space that
                               a template writes behind that token stands between the turns, and nobody is asked to say it.

Neither is guessed at: a template that writes earlier turns otherwise once others follow (without their reasoning, for example), that ends
a turn with no control token, or whose generation prompt is not how a turn begins is refused. So is a token that is an answer by half.

A template is somebody else's program: it is given the time and the memory that a dialogue may take, and what it adds to a dialogue, or
leaves out of one, is told (`ChatTemplate.notes`).
"""

import hashlib
import json
import re
import signal
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mujina.processes import bounded_memory
from mujina.user_input import UserError

BLOCK = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
REMEDY = "put {% generation %} and {% endgeneration %} around what the assistant says (with the token that ends its turn)"
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys by which a message's reasoning is known
SECONDS = 10  # of CPU time that a template may take to write a dialogue once
MEMORY = 4 << 30  # bytes that it may take for that
MOST_ADDED = 4 << 20  # characters that it may write besides twice what is said
Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]  # of characters, the second one not included


class Part(NamedTuple):
    """A stretch of a dialogue as it is written: one control token, or text that is none, whatever it spells."""

    text: str
    is_control: bool
    is_answer: bool


def plain(parts: Sequence[Part]) -> str:
    """What is written, a NUL for each control token."""
    return "".join("\0" if part.is_control else part.text for part in parts)


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
        messages = [self._marked(_as_transformers(message), mark) for message in messages]
        with self._bounded():
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

    def notes(self) -> list[str]:
        """What the template adds to a dialogue or leaves out of it, told from two that it writes."""
        thought = [{"role": "user", "content": "User1"}, {"role": "assistant", "content": "<think>\nThought1\n</think>\n\nAnswer1"}]
        again = [{key: value.replace("1", "2") for key, value in turn.items()} for turn in thought]
        plain = [{"role": "user", "content": "User1"}, {"role": "assistant", "content": "Answer1"}]
        texts = list[str]()
        for messages in plain, [*thought, *again], [{"role": "system", "content": "System1"}, *plain]:
            try:
                texts.append("\0".join(part.text for part in self.parts(messages, with_answers=False) if not part.is_control))
            except UserError:
                texts.append("")  # it is refused where it comes, with its reason
        notes = list[str]()
        if "strftime_now" in self._source:
            notes.append("writes the date of the day into dialogues")
        for added in dict.fromkeys(re.split(r"\0|User1|Answer1", texts[0])):
            if " " in added.strip() or "think" in added:
                notes.append(f"adds {added.strip()[:200]!r}, which no turn says")
        for text, said, what in (
            (texts[1], "Thought1", "what earlier answers have between <think> and </think>"),
            (texts[1], "Thought2", "what the last answer has between <think> and </think>"),
            (texts[2], "System1", "the system's turn"),
        ):
            notes += [f"leaves out {what}"] if text and said not in text else []
        return notes

    def _marked(self, value: Any, mark: str) -> Any:
        """The value with a mark in each text that is spelled like a control token."""
        if isinstance(value, str):
            return self._spelled.sub(rf"\g<0>{mark}", value)
        if isinstance(value, dict):
            return {key: self._marked(inside, mark) for key, inside in value.items()}
        return [self._marked(inside, mark) for inside in value] if isinstance(value, list) else value

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Ends an endless template, and one that takes all memory. In another thread than the main one, where no signal comes, the
        former only by what it writes."""

        def stop(*_: object) -> None:
            raise self._refuse(f"takes more than {SECONDS} seconds for one dialogue", "mend the loop that does not end")

        is_main = _is_main_thread()
        before = signal.signal(signal.SIGVTALRM, stop) if is_main else None
        try:
            with bounded_memory(MEMORY):
                yield
        except MemoryError:
            raise self._refuse(f"takes more than {MEMORY >> 30} GiB for one dialogue", "mend what repeats a text so often") from None
        finally:
            if is_main:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, before)

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
        values = {"tools": None, "documents": None} | self._special | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        if _is_main_thread():
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)  # again each second: jinja takes an exception for a value that it lacks
        pieces, left = [], MOST_ADDED + 2 * sum(len(str(message)) for message in messages)
        try:
            for piece in self._compiled.generate(values, answer_begins=begin, answer_ends=end):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise self._refuse("writes more and more that nobody said", "mend the loop that does not end")
        except (TemplateError, UserError, MemoryError):
            raise
        except Exception as error:  # whatever the template does: divides by zero, calls itself for ever
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> Template:
        # Hugging Face renders with this class, these settings and these names (transformers.utils.chat_template_utils), so what is
        # tested here is what a server will do.
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self._source)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: the values `answer_begins` and `answer_ends` around a block with names of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("answer_begins", "answer_ends"))
        return nodes.Scope([begin, *body, end], lineno=line)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Without the escapes of jinja's own, which is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _as_transformers(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: without empty keys, its reasoning by all the names that templates use."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning} | message | {"reasoning_content": reasoning}


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
