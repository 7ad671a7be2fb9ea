"""What a tokenizer is: texts and dialogues to token ids and back. `tokenization.load.load` opens one.

Two engines are tokenizers: `sentence_piece.py`, for what `mujina tokenizer` trains, and `hf.py`, for the tokenizers of others.
Control pieces come from us alone: text that spells one is tokenized as ordinary characters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BeforeValidator

if TYPE_CHECKING:
    import numpy as np
    from tokenizers.processors import TemplateProcessing

ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"
CHAT_PIECES = (*(f"<|{role}|>" for role in ROLES), END_OF_TURN)
CHAT_TEMPLATES = {path.stem: path for path in Path(__file__).with_name("chat_templates").glob("*.jinja")}
SPACE_PIECE = "▁"  # U+2581, sentencepiece's name for a space


def _word(value: Any) -> Any:
    """YAML takes a bare yes for true."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


# Whether documents begin with the tokenizer's bos_token; auto: as in transformers, texts by tokenizer.json, dialogues by the template.
BeginDocuments = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_word)]
# What goes before a chat template so that every dialogue begins with bos_token, or none.
BEGINNINGS = {"auto": "", "yes": "{{ bos_token }}", "no": "{% set bos_token = '' %}"}


def beginning(bos: str, bos_id: int) -> "TemplateProcessing":
    """What lets Hugging Face's engine begin every text with `bos`."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)])


class Rendered(NamedTuple):
    """A dialogue of n tokens.

    ids        int32 [n]
    is_answer  bool [n], what the assistant has to say: the contents of its turns, and the token that ends each of them; not the headers
               of its turns, which are there when it is asked, and nothing that others say
    text       what was written, a NUL for each control token
    """

    ids: "np.ndarray"
    is_answer: "np.ndarray"
    text: str


class Tokenizer(Protocol):
    """A tokenizer folder opened for use.

    vocab_size      pieces, control pieces included (a model may pad its embedding beyond that)
    bos_id          id of the token that documents may begin with, None where there is none
    eod_id          id of the end-of-document token
    end_of_turn_id  id of the token that closes the assistant's turns; eod_id where no token does
    begin_documents, begins_texts   what was asked for, and whether a document that is a text begins with bos_id; a dialogue is written
                    by its template, with it or without
    hash            sha256 of what makes the ids of a text's document: two tokenizers with one hash give the same
    template_hash   sha256 of what else makes the ids of dialogues; None where it cannot write any
    remark          what people should know who tokenize with it; None: nothing
    """

    vocab_size: int
    bos_id: int | None
    eod_id: int
    end_of_turn_id: int
    begin_documents: BeginDocuments
    begins_texts: bool
    hash: str
    template_hash: str | None
    remark: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of one text, never a control or chat id whatever the text spells."""

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """`encode` of every text as 1-D int32 arrays, on one core: who has more of them starts more processes."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Chat pieces come out as they are spelled, control pieces (</s> and so on) as nothing."""

    def piece(self, token: int) -> str:
        """How the vocabulary spells one id."""

    def bytes_of(self, token: int) -> bytes | None:
        """What one piece stands for in a text (UTF-8, or a part of a character), None for control and chat pieces."""

    def encode_bytes(self, data: bytes) -> list[int]:
        """`encode` of what `bytes_of` gives, parts of characters included."""

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> "np.ndarray":
        """The ids of `render`, int32 [n], also where it cannot be told which of them are answers."""

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> Rendered:
        """A dialogue ({role, content} a turn) as its chat template writes it; contents that spell control pieces stay text.

        `add_generation_prompt` adds the header of an assistant's turn that is still to be said.
        Raises UserError when the template refuses the dialogue, or when it cannot be told which tokens are answers (`tokenization.chat`).
        """

    def template_notes(self) -> list[str]:
        """What the chat template adds to dialogues and leaves out of them, such as a system prompt or reasoning."""

    def save_hf(self, folder: str | Path) -> None:
        """Writes what transformers.AutoTokenizer needs into `folder`, without remote code."""
