"""Hugging Face BPE tokenizers: folders with a tokenizer.json and a tokenizer_config.json.

The reference is Hugging Face's own engine with special tokens taken as ordinary text. Gigatoken gives the same ids about ten times as
fast, but turns text that spells an added token into that token: texts that do are left to the reference.
"""

import hashlib
import json
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import tokenizers

from mujina.user_input import UserError
from tokenization.chat import ChatTemplate
from tokenization.tokenizer import CHAT_PIECES, CHAT_TEMPLATE, END_OF_TURN, SPACE_PIECE, Rendered

# Gigatoken remembers every word that it has met (13 bytes a character of words that never recur) until it is dropped: so it is opened
# anew, in 20 ms, after this many characters.
RENEW_AFTER = 50_000_000
PROBE = [
    "The cat's 12,345 hats\n\n\tdef f(x):  return x",
    "吾輩は猫である。名前はまだ無い。 🦡\r\n",
    " leading",
    "x" * 50,
    "é e\u0301 \u3000\x00",
    "",
]
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# The byte-level alphabet (GPT-2): bytes that print are spelled as themselves, the others by the characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(0x100) if byte not in PRINTABLE]
CHARACTER_OF = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(OTHERS)}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class HfTokenizer:
    """A `tokenization.tokenizer.Tokenizer`. `hash` covers tokenizer.json and the name of the end-of-document token."""

    def __init__(self, folder: Path) -> None:
        """Opens a folder. Raises UserError when it is no BPE tokenizer, or names no `eos_token` of its vocabulary."""
        self._folder, self._model = folder, (folder / "tokenizer.json").read_bytes()
        try:
            self._reference = tokenizers.Tokenizer.from_buffer(self._model)
            kind = json.loads(self._model)["model"].get("type", "BPE")
        except (ValueError, KeyError) as error:
            raise UserError(f"{folder / 'tokenizer.json'}: is not a Hugging Face tokenizer ({error}): copy it again") from None
        if kind != "BPE":
            raise UserError(
                f"{folder / 'tokenizer.json'}: is of the kind {kind}, only BPE is read from here: put its tokenizer.model beside it"
            )
        self._reference.no_truncation()
        self._reference.no_padding()
        self._reference.encode_special_tokens = True
        self._reference.post_processor = None  # adds nothing that is asked for here, and takes spaces out of the tokens' offsets
        config = self._read_config()
        # what a chat template may name: bos_token, eos_token, and those of the model's own
        tokens = {name: _content(token) for name, token in config.items() if name.endswith("_token")}
        self._special = {name: token for name, token in tokens.items() if isinstance(token, str)}
        if "eos_token" not in self._special:
            raise UserError(f"{folder / 'tokenizer_config.json'}: names no eos_token, which ends every document: add it")
        before = self._reference.pre_tokenizer
        self._is_byte_level = before is not None and before.pre_tokenize_str("あ")[0][0] == "ãģĤ"
        eos = self._special["eos_token"]
        self.hash = hashlib.sha256(self._model + b"\0" + eos.encode()).hexdigest()
        vocabulary = self._reference.get_vocab(with_added_tokens=True)
        if eos not in vocabulary:
            raise UserError(f"{folder}: eos_token {eos!r} of tokenizer_config.json is no piece of tokenizer.json: name one that is")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = vocabulary[eos]
        self.end_of_turn_id = vocabulary.get(END_OF_TURN, self.eod_id)
        added = self._reference.get_added_tokens_decoder()
        chat = {vocabulary[piece] for piece in CHAT_PIECES if piece in vocabulary}
        self._control_ids = {token for token, piece in added.items() if piece.special} | chat | {self.eod_id}
        self._unseen_ids = self._control_ids - chat
        spelled = {piece.content for piece in added.values()} | {eos} | {piece for piece in CHAT_PIECES if piece in vocabulary}
        self._guarded = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
        template = self._read_template(config)
        if template is None and vocabulary.keys() >= set(CHAT_PIECES):
            template = CHAT_TEMPLATE.read_text(encoding="utf-8")
        white = {piece.content: (piece.lstrip, piece.rstrip) for piece in added.values()}
        controls = {piece: white.get(piece, (False, False)) for piece in map(self.piece, self._control_ids)}
        self._chat = None if template is None else ChatTemplate(template, folder, controls, self._special)
        self.template_hash = self._chat.hash if self._chat else None
        # Added tokens that are looked for after normalization can be spelled in ways that the pattern does not know.
        hidden = self._reference.normalizer is not None and any(piece.normalized for piece in added.values())
        self._fast = None if hidden else self._open_fast()
        self._fast_characters = 0

    def encode(self, text: str) -> list[int]:
        """Ids of one text, never a control or chat id whatever the text spells."""
        return [token for _, encoding in self._encodings(text) for token in encoding.ids]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text as 1-D int32 arrays, on one core."""
        slow = [self._fast is None or self._guarded.search(text) is not None for text in texts]
        plain = [text for text, is_slow in zip(texts, slow, strict=True) if not is_slow]
        self._fast_characters += sum(map(len, plain))
        fast = iter(_arrays(self._fast, plain) if self._fast is not None and plain else [])
        encoded = [
            np.array(self.encode(text), dtype=np.int32) if is_slow else next(fast) for text, is_slow in zip(texts, slow, strict=True)
        ]
        if self._fast is not None and self._fast_characters > RENEW_AFTER:
            self._fast, self._fast_characters = gigatoken.Tokenizer.from_json(self._model), 0
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Chat pieces come out as they are spelled, control pieces as nothing."""
        return str(self._reference.decode([int(token) for token in ids if token not in self._unseen_ids], skip_special_tokens=False))

    def piece(self, token: int) -> str:
        """How the vocabulary spells one id; bytes as the byte-level alphabet writes them."""
        return str(self._reference.id_to_token(token))

    def bytes_of(self, token: int) -> bytes | None:
        """What one piece stands for in a text (UTF-8, or a part of a character), None for control and chat pieces."""
        piece = self.piece(token)
        if token in self._control_ids:
            return None
        if self._is_byte_level and set(piece) <= BYTE_OF.keys():
            return bytes(BYTE_OF[character] for character in piece)
        return bytes([int(piece[3:5], 16)]) if BYTE_PIECE.fullmatch(piece) else piece.replace(SPACE_PIECE, " ").encode()

    def encode_bytes(self, data: bytes) -> list[int]:
        """`encode` of what `bytes_of` gives, parts of characters included."""
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            if self._is_byte_level:
                return [token.id for token in self._reference.model.tokenize("".join(CHARACTER_OF[byte] for byte in data))]
            return [self._id(f"<0x{byte:02X}>") for byte in data]

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> Rendered:
        """A dialogue as the folder's own chat template writes it, control tokens where the template has them and nowhere else.

        Without a template, as ours does. Raises UserError when the vocabulary lacks the chat pieces for that, when the template refuses
        the dialogue, or when it cannot be told which tokens are answers.
        """
        return self._rendered(messages, add_generation_prompt, with_answers=True)

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> np.ndarray:
        """The ids of `render`, int32 [n], also where it cannot be told which of them are answers."""
        return self._rendered(messages, add_generation_prompt, with_answers=False).ids

    def _rendered(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, with_answers: bool) -> Rendered:
        if self._chat is None:
            needs = f"a chat template, and the pieces {', '.join(CHAT_PIECES)} to do without"
            raise UserError(f"{self._folder}: the tokenizer lacks {needs}, which chat sources need: add chat_template.jinja")
        ids: list[int] = []
        is_answer: list[bool] = []
        for is_control, group in groupby(self._chat.parts(messages, add_generation_prompt, with_answers), lambda part: part.is_control):
            parts = list(group)
            tokens = [[self._id(part.text)] for part in parts] if is_control else self._encode_cut([part.text for part in parts])
            for part, its_ids in zip(parts, tokens, strict=True):
                ids += its_ids
                is_answer += [part.is_answer] * len(its_ids)
        return Rendered(np.array(ids, np.int32), np.array(is_answer, bool))

    def template_notes(self) -> list[str]:
        """What the chat template adds to dialogues and leaves out of them, such as a system prompt or reasoning."""
        return self._chat.notes() if self._chat else []

    def save_hf(self, folder: str | Path) -> None:
        """Copies what transformers.AutoTokenizer needs into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, Path(folder) / name)

    def _encodings(self, text: str) -> Iterator[tuple[int, tokenizers.Encoding]]:
        """`encode`, in stretches: where each begins in the text, and its encoding."""
        encoding = self._reference.encode(text, add_special_tokens=False)
        if self._control_ids.isdisjoint(encoding.ids):
            yield 0, encoding
            return
        # The model itself builds a control piece out of its characters: none is left whole.
        cuts = [0, *(match.start() + 1 for match in self._guarded.finditer(text)), len(text)]
        for start, end in pairwise(cuts):
            yield start, self._reference.encode(text[start:end], add_special_tokens=False)

    def _encode_cut(self, texts: list[str]) -> list[list[int]]:
        """The ids of each of the texts, encoded as one. Raises UserError when a token belongs to two of them: BPE merges across."""
        if len(texts) == 1:
            return [self.encode(texts[0])]
        whole, ends = "".join(texts), list(accumulate(map(len, texts)))
        ids: list[list[int]] = [[] for _ in texts]
        for offset, encoding in self._encodings(whole):
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                place = bisect_left(ends, offset + end)
                if place and offset + start < ends[place - 1]:
                    raise UserError(
                        f"{self._folder}: the token {whole[offset + start : offset + end]!r} belongs to an assistant's answer "
                        f"({texts[place][:40]!r}) by half: let chat_template.jinja trim what is said, or a control token precede it"
                    )
                ids[place].append(token)
        return ids

    def _read_config(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self._folder / "tokenizer_config.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def _read_template(self, config: dict[str, Any]) -> str | None:
        if (self._folder / "chat_template.jinja").exists():
            return (self._folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = config.get("chat_template")
        return {item["name"]: item["template"] for item in template}.get("default") if isinstance(template, list) else template

    def _id(self, piece: str) -> int:
        token = self._reference.token_to_id(piece)
        assert token is not None, piece
        return token

    def _open_fast(self) -> gigatoken.Tokenizer | None:
        """Gigatoken, or None when it does not know this kind of BPE or splits it differently: then the reference does everything."""
        try:
            fast = gigatoken.Tokenizer.from_json(self._model)
        except RuntimeError:
            return None
        texts = [text for text in PROBE if not self._guarded.search(text)]
        agrees = [ids.tolist() for ids in _arrays(fast, texts)] == [self.encode(text) for text in texts]
        return fast if agrees else None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _arrays(engine: gigatoken.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    layout = engine.encode_batch(texts, parallel=False).layout
    ids = np.asarray(layout.content.data).astype(np.int32)
    return np.split(ids, np.asarray(layout.offsets.data)[1:-1])
