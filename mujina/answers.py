"""Conversations in, answers out: from a Hugging Face folder on this machine, or from an OpenAI-compatible server.

    answerer = open_answerer("runs/hf/moe")                      # or "http://node-3:8000/v1#moe"
    for answers in answerer.answer([question("What is 3 + 4?")], Sampling(max_new_tokens=64)): ...

Every room may import this file; it imports no room, and torch and transformers only when a folder is opened.
Legend of shapes: B answers decoded together, L tokens of the longest prompt among them, N new tokens, V entries of the vocabulary.
"""

import hashlib
import http.client
import json
import os
import random
import socket
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from mujina.user_input import Section, UserError

END_OF_TURN = "<|end|>"
BATCH_SIZE = 16  # answers of a folder decoded together

_SAID = "acorns"  # by an assistant, to see what a template writes behind it
_NUM_TRIES = 8  # of a request, over about a minute
_FIRST_WAIT = 0.5  # seconds before the second try; each further wait is twice as long
_LONGEST_WAIT = 300.0  # seconds; a server that asks for more is not waited for
_TIMEOUT = 600.0  # seconds without a byte from the server: an answer comes in one piece when it is whole


class Message(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Conversation:
    """What was said so far; the answer is the assistant's next turn."""

    messages: tuple[Message, ...]


def question(text: str) -> Conversation:
    """A conversation in which the user has said `text`, and nothing else."""
    return Conversation((Message(role="user", content=text),))


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; `temperature` 0 is greedy decoding. Raises UserError when a value is out of its range.

    `top_p` keeps the likeliest tokens that have this much probability together (Holtzman et al. 2019, arXiv 1904.09751, section 3.1).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_answers: int = 1  # to each conversation
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1: raise it")
        if self.temperature < 0:
            raise UserError(f"temperature ({self.temperature}) must not be negative: 0 is greedy decoding, 1 the model's own distribution")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be above 0 and at most 1: 1 keeps every token")
        if self.num_answers < 1:
            raise UserError(f"num_answers ({self.num_answers}) must be at least 1: raise it")
        if self.num_answers > 1 and not self.temperature:
            raise UserError(f"num_answers ({self.num_answers}) with temperature 0 would be the same answer again: raise temperature")


@dataclass(frozen=True)
class Answer:
    """The assistant's turn, without white space around it.

    finish_reason       "stop": the model ended the turn by itself; "length": it ran into max_new_tokens; "context": into the end of the
                        model's context; a server may give others
    num_answer_tokens   includes the token that ended the turn; both numbers are None where a server does not tell them
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"


class Answerer(Protocol):
    """Whoever answers."""

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        """Yields `sampling.num_answers` answers to each conversation, in the order of the conversations."""
        ...


def open_answerer(where: str, completes: bool = False) -> Answerer:
    """Opens a Hugging Face folder, or the model that `http://host:port/v1#model` names. Raises UserError when it is neither.

    With `completes` a folder without a chat template is let in as well, see `FolderAnswerer`.
    """
    if "://" not in where:
        return FolderAnswerer(Path(where), completes)
    url, _, model = where.partition("#")
    if not (url.startswith(("http://", "https://")) and model):
        raise UserError(f"{where}: is not of the form http://host:port/v1#model: write the server's URL, # and the name it gives the model")
    return ServerAnswerer(url, model)


def _seed_of(conversation: Conversation, number: int, sampling: Sampling) -> int:
    """The seed of the conversation's n-th answer, below 2^31; what else is asked plays no part in it."""
    told = [sampling.seed, number, [[message.role, message.content] for message in conversation.messages]]
    return int.from_bytes(hashlib.sha256(json.dumps(told).encode()).digest()[:4]) >> 1


class FolderAnswerer:
    """Answers of a Hugging Face chat model, on the GPU where there is one; what the folder asks for in sampling is passed over.

    An answer ends at any token that the generation configuration names, at the tokenizer's end of sequence, and at the one that the chat
    template writes behind an assistant's turn. Other special tokens stay in the text: a model that writes `<|user|>` into its answer
    should be seen doing so. A drawn answer depends on the seed, the conversation and the answer's number only, up to the rounding of
    logits, which the other prompts of a batch and the kind of device may change.

    is_plain   without a chat template, which only who `completes` lets in: a question is text, and its answer how that goes on

    Raises UserError when `folder` is not a Hugging Face folder, has no chat template or no token to stop at.
    """

    def __init__(self, folder: Path, completes: bool = False) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: not a Hugging Face folder (no config.json): write one with `mujina convert`")
        self._folder = folder
        self._model, self._tokenizer, ends = _load(folder)
        self.is_plain = self._tokenizer.chat_template is None
        if self.is_plain and not completes:
            raise UserError(
                f"{folder}: its tokenizer has no chat template: use a chat tokenizer when converting, or add chat_template.jinja"
            )
        self._stop_ids = _stop_ids(folder, self._tokenizer, ends)
        self._context: int | None = getattr(self._model.config, "max_position_embeddings", None)

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        """Yields the answers to each conversation, a batch after the other."""
        wanted = [(conversation, number) for conversation in conversations for number in range(sampling.num_answers)]
        answers: list[Answer] = []
        for start in range(0, len(wanted), BATCH_SIZE):
            answers += self._batch(wanted[start : start + BATCH_SIZE], sampling)
            while len(answers) >= sampling.num_answers:
                yield answers[: sampling.num_answers]
                del answers[: sampling.num_answers]

    def _batch(self, wanted: list[tuple[Conversation, int]], sampling: Sampling) -> list[Answer]:
        import torch

        prompts = [self._prompt(conversation) for conversation, _ in wanted]
        length, device, padding = max(map(len, prompts)), self._model.device, self._stop_ids[0]
        # The mask follows from positions: the padding token may be one that prompts hold too.
        ids_BL = torch.tensor([[padding] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        mask_BL = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        ids_BLN = self._model.generate(
            ids_BL,
            attention_mask=mask_BL,
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._stop_ids,
            pad_token_id=padding,
            logits_processor=_draws([_seed_of(*one, sampling) for one in wanted], sampling, device),
        )
        return [self._answer(len(prompt), ids_N) for prompt, ids_N in zip(prompts, ids_BLN[:, length:].tolist(), strict=True)]

    def _prompt(self, conversation: Conversation) -> list[int]:
        """Its ids. Raises UserError where nothing can be said behind it within the model's context."""
        messages = [message.model_dump() for message in conversation.messages]
        if self.is_plain:
            prompt: list[int] = self._tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        else:
            try:
                prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            except Exception as error:  # of whatever kind, the template's
                told = f"its chat template fails ({type(error).__name__}: {' '.join(str(error).split())})"
                raise UserError(f"{self._folder}: {told}: mend chat_template.jinja") from None
        if not prompt:
            raise UserError(f"{self._folder}: a prompt without a token cannot be gone on with: write something")
        if self._context and len(prompt) >= self._context:
            raise UserError(
                f"{self._folder}: the prompt {messages[-1]['content'][:40]!r} has {len(prompt):,} tokens, and the model's context "
                f"(max_position_embeddings) holds {self._context:,} together with the answer: shorten it"
            )
        return prompt

    def _answer(self, num_prompt_tokens: int, ids_N: list[int]) -> Answer:
        room = self._context - num_prompt_tokens if self._context else len(ids_N)
        end = next((position for position, token in enumerate(ids_N[:room]) if token in self._stop_ids), None)
        if end is not None:
            return Answer(self._tokenizer.decode(ids_N[:end]).strip(), "stop", num_prompt_tokens, end + 1)
        said = ids_N[:room]
        reason = "context" if len(said) < len(ids_N) else "length"
        return Answer(self._tokenizer.decode(said).strip(), reason, num_prompt_tokens, len(said))


def _load(folder: Path) -> tuple[Any, Any, list[int]]:
    """The model, its tokenizer, and the tokens that its generation configuration ends with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever it stumbles over
        problem = f"cannot be loaded as a Hugging Face model and tokenizer ({type(error).__name__}: {' '.join(str(error).split())})"
        raise UserError(f"{folder}: {problem}: write it with `mujina convert`") from None
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()  # the folder's own may ask for sampling
    ends = ends if isinstance(ends, list) else [ends]
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, ends


def _stop_ids(folder: Path, tokenizer: Any, ends: list[int]) -> list[int]:
    named = [tokenizer.get_vocab().get(END_OF_TURN), _end_of_turn(tokenizer), tokenizer.eos_token_id, *ends]
    stop_ids = [token for token in dict.fromkeys(named) if token is not None]
    if not stop_ids:
        raise UserError(
            f"{folder}: neither its tokenizer nor its generation_config.json names a token that ends an answer: write eos_token_id there"
        )
    return stop_ids


def _end_of_turn(tokenizer: Any) -> int | None:
    """The added token that the chat template writes behind what an assistant has said; None where it writes none."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
    try:
        written = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # it takes other dialogues only
        return None
    behind = tokenizer(written.partition(_SAID)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in behind if token in tokenizer.added_tokens_decoder), None)


def _draws(seeds: list[int], sampling: Sampling, device: Any) -> list[Any]:
    """What makes of greedy decoding a draw for each answer with a generator of its own; nothing at temperature 0.

    The likeliest token after Gumbel noise is added to the logits is a draw from their softmax (Gumbel 1954; Maddison et al. 2014,
    arXiv 1411.0030). transformers draws with one generator for the whole batch, so that an answer would depend on its neighbours.
    """
    if not sampling.temperature:
        return []
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def add_noise(ids_BL: Any, logits_BV: Any) -> Any:
        noise_BV = torch.empty_like(logits_BV)
        for noise_V, generator in zip(noise_BV, generators, strict=True):
            noise_V.exponential_(generator=generator)
        return logits_BV - noise_BV.log()

    return [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p), add_noise]


class _Failure(Exception):
    """A request that may succeed when it is made again, after `wait` seconds or more."""

    def __init__(self, told: str, wait: float = 0.0) -> None:
        super().__init__(told)
        self.wait = wait


class ServerAnswerer:
    """Answers of `model` behind `url`/chat/completions, at most `num_in_flight` requests at a time, one for each answer.

    A busy or broken server (429, 5xx, a lost connection, a body that is cut off or not an answer) is asked again with growing waits, and
    not before its Retry-After. The key is the environment's OPENAI_API_KEY, if set. Every request carries a seed that depends on the
    conversation and the answer's number only; whether the same seed gives the same answer is the server's matter.
    `answer` raises UserError when nobody listens at `url`, when the server does not take a request, or when all tries failed.
    """

    def __init__(self, url: str, model: str, num_in_flight: int = 32) -> None:
        self._endpoint = f"{url.rstrip('/')}/chat/completions"
        self._model, self._num_in_flight = model, num_in_flight
        self._key = os.environ.get("OPENAI_API_KEY")
        self._was_reached = False

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        """Yields the answers to each conversation; the requests for those that follow are under way meanwhile."""
        pool, ended = ThreadPoolExecutor(self._num_in_flight), threading.Event()

        def ask(conversation: Conversation, number: int) -> Future[Answer]:
            return pool.submit(self._ask, self._body(conversation, number, sampling), ended)

        wanted = ((conversation, number) for conversation in conversations for number in range(sampling.num_answers))
        try:
            # Some more than are in flight, so that one slow answer does not leave the server idle.
            pending = deque(ask(*one) for one in islice(wanted, 4 * self._num_in_flight))
            answers: list[Answer] = []
            while pending:
                answers.append(pending.popleft().result())
                pending.extend(ask(*one) for one in islice(wanted, 1))
                if len(answers) == sampling.num_answers:
                    yield answers
                    answers = []
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _body(self, conversation: Conversation, number: int, sampling: Sampling) -> bytes:
        """The request for one answer; `n` is not used, since llama.cpp and transformers pass over it."""
        values = {
            "model": self._model,
            "messages": [message.model_dump() for message in conversation.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": _seed_of(conversation, number, sampling),
            "stream": False,
        }
        return json.dumps(values).encode()

    def _ask(self, body: bytes, ended: threading.Event) -> Answer:
        told, wait = "", 0.0
        for number in range(_NUM_TRIES):
            if ended.wait(wait):
                break
            try:
                return self._post(body)
            except _Failure as failure:
                told = str(failure)
                if failure.wait > _LONGEST_WAIT:
                    raise UserError(f"{self._endpoint}: {told}, and asks to wait {failure.wait:.0f} s: start again after that") from None
                wait = max(failure.wait, _FIRST_WAIT * 2**number * random.uniform(0.5, 1.0))
        raise UserError(f"{self._endpoint}: no answer in {_NUM_TRIES} tries ({told}): look into the server's log, and start again")

    def _post(self, body: bytes) -> Answer:
        request = urllib.request.Request(self._endpoint, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                self._was_reached = True
                return _parse(response.read())
        except urllib.error.HTTPError as error:
            self._was_reached = True
            raise self._explain(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, (ConnectionRefusedError, socket.gaierror)) and not self._was_reached:
                raise UserError(f"{self._endpoint}: nobody answers ({reason}): start the server, or check host and port") from None
            raise _Failure(f"the connection failed: {reason!r}") from None

    def _explain(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(500).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException):
            said = "its words were cut off"
        told = f"the server says {error.code} ({said or error.reason})"
        if error.code in (408, 429) or error.code >= 500:
            return _Failure(told, _asked_wait(error.headers.get("Retry-After", "")))
        remedies = {
            401: "set OPENAI_API_KEY to a key of this server",
            403: "set OPENAI_API_KEY to a key that may use this model",
            404: f"check that the URL ends as the server wants it, mostly in /v1, and that {self._model} is the name of a model there",
        }
        return UserError(f"{self._endpoint}: {told}: {remedies.get(error.code, 'mend what it names, and start again')}")


def _parse(body: bytes) -> Answer:
    """The answer in a response; raises _Failure when there is none: servers under load have been seen to send halves and HTML."""
    try:
        values = json.loads(body)
        [choice] = values["choices"]
        text, reason, usage = choice["message"]["content"] or "", choice["finish_reason"] or "", values.get("usage") or {}
        return Answer(text.strip(), reason, usage.get("prompt_tokens"), usage.get("completion_tokens"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Failure(f"not a chat completion: {body[:200].decode(errors='replace')}") from None


def _asked_wait(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, section 10.2.3); 0 where it does not."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
