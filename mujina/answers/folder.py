"""Answers of a Hugging Face folder on this machine, with transformers.

Legend of shapes: B answers decoded together, L tokens of the longest prompt among them, N new tokens, V entries of the vocabulary.
"""

import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from mujina.answers.conversation import Answer, Answerer, Conversation, Failure, Request, Sampling, Session, seed_of
from mujina.exits import STOPPED
from mujina.processes import told_to_stop
from mujina.user_input import UserError

END_OF_TURN = "<|end|>"
BATCH_SIZE = 16  # answers of a folder decoded together

_SAID = "acorns"  # by an assistant, to see what a template writes behind it


class FolderAnswerer(Answerer):
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

    @property
    def model(self) -> str:
        """The folder's name and a digest of the names, sizes and times of its files: written again, it is another model."""
        files = sorted(path for path in self._folder.rglob("*") if path.is_file())
        told = [(str(path.relative_to(self._folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{self._folder.resolve().name} {hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"

    @contextlib.contextmanager
    def open(self) -> Iterator["_Batches"]:
        with told_to_stop() as stop:
            yield _Batches(self, stop)
        if stop.is_set():
            raise SystemExit(STOPPED)

    def answers_to(self, requests: list[Request]) -> list[Answer | Failure]:
        """To requests of one sampling, decoded together; to one that does not fit it is a Failure."""
        found: dict[int, Answer | Failure] = {}
        fitting: list[tuple[int, Request, list[int]]] = []
        for place, request in enumerate(requests):
            try:
                fitting.append((place, request, self._prompt(request.conversation)))
            except UserError as error:
                found[place] = Failure(str(error))
        if fitting:
            answers = self._batch([request for _, request, _ in fitting], [prompt for *_, prompt in fitting])
            found.update(zip((place for place, *_ in fitting), answers, strict=True))
        return [found[place] for place in range(len(requests))]

    def _batch(self, requests: list[Request], prompts: list[list[int]]) -> list[Answer]:
        import torch

        sampling, began = requests[0].sampling, time.monotonic()
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
            logits_processor=_draws([seed_of(request) for request in requests], sampling, device),
        )
        said = ids_BLN[:, length:].tolist()
        seconds = round(time.monotonic() - began, 3)
        return [replace(self._answer(len(prompt), ids_N), seconds=seconds) for prompt, ids_N in zip(prompts, said, strict=True)]

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


class _Batches(Session):
    """Answers to a batch of requests when the first of them is taken."""

    def __init__(self, answerer: FolderAnswerer, stop: threading.Event) -> None:
        self._answerer, self._stop = answerer, stop
        self._wanted: deque[tuple[Any, Request]] = deque()
        self._found: deque[tuple[Any, Answer | Failure]] = deque()

    @property
    def num_open(self) -> int:
        return len(self._wanted) + len(self._found)

    @property
    def most(self) -> int:
        return BATCH_SIZE

    @property
    def has_room(self) -> bool:
        return self.num_open < BATCH_SIZE and not self._stop.is_set()

    def put(self, name: Any, request: Request) -> None:
        self._wanted.append((name, request))

    def take(self) -> tuple[Any, Answer | Failure]:
        if not self._found:
            sampling = self._wanted[0][1].sampling
            together = list(takewhile(lambda one: one[1].sampling == sampling, self._wanted))
            answers = self._answerer.answers_to([request for _, request in together])
            self._found.extend(zip((name for name, _ in together), answers, strict=True))
            for _ in together:
                self._wanted.popleft()
        return self._found.popleft()


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
    stop_ids = list(dict.fromkeys(token for token in named if isinstance(token, int)))
    if not stop_ids:
        raise UserError(
            f"{folder}: neither its tokenizer nor its generation_config.json names a token that ends an answer: write eos_token_id there"
        )
    return stop_ids


def _end_of_turn(tokenizer: Any) -> int | None:
    """The added token that the chat template writes behind what an assistant has said; None where it writes none."""
    if tokenizer.chat_template is None:
        return None
    turns, written = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}], ""
    for first in ([], [{"role": "system", "content": "!"}]):  # some want a system's turn
        with contextlib.suppress(Exception):  # of whatever kind, the template's: it takes other dialogues only
            written = written or tokenizer.apply_chat_template([*first, *turns], tokenize=False)
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
