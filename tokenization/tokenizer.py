"""What a tokenizer is: texts and dialogues to token ids and back. `tokenization.load.load` opens one.

Two engines are tokenizers: `sentence_piece.py`, for what `mujina tokenizer` trains, and `hf.py`, for the BPE tokenizers of others.
Control pieces come from us alone: text that spells one is tokenized as ordinary characters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"
CHAT_PIECES = (*(f"<|{role}|>" for role in ROLES), END_OF_TURN)
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SPACE_PIECE = "▁"  # U+2581, sentencepiece's name for a space


class Rendered(NamedTuple):
    """A dialogue of n tokens.

    ids        int32 [n]
    is_answer  bool [n], what the assistant has to say: the contents of its turns, and the token that ends each of them; not the headers
               of its turns, which are there when it is asked, and nothing that others say
    """

    ids: "np.ndarray"
    is_answer: "np.ndarray"


class Tokenizer(Protocol):
    """A tokenizer folder opened for use.

    vocab_size      pieces, control pieces included (a model may pad its embedding beyond that)
    eod_id          id of the end-of-document token
    end_of_turn_id  id of <|end|>, which closes a chat turn; eod_id where there is no such piece
    hash            sha256 of what makes the ids of texts: two tokenizers with one hash give the same ones
    template_hash   sha256 of what else makes the ids of dialogues; None where it cannot write any
    """

    vocab_size: int
    eod_id: int
    end_of_turn_id: int
    hash: str
    template_hash: str | None

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
