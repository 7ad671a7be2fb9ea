"""Answers of a Hugging Face folder on this machine, with transformers.

Legend of shapes: B answers decoded together, L tokens of the longest prompt among them, N new tokens, V entries of the vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mujina.answers.conversation import Answer, Conversation, Sampling, seed_of
from mujina.user_input import UserError

END_OF_TURN = "<|end|>"
BATCH_SIZE = 16  # answers of a folder decoded together

_SAID = "acorns"  # by an assistant, to see what a template writes behind it


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
            logits_processor=_draws([seed_of(*one, sampling) for one in wanted], sampling, device),
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
