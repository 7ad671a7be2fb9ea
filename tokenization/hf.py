"""A Hugging Face BPE tokenizer (tokenizer.json, tokenizer_config.json) behind the interface of `tokenization.tokenizer.Tokenizer`.

The reference is Hugging Face's own engine with special tokens taken as ordinary text. Gigatoken gives the same ids about ten times as
fast, but turns text that spells an added token into that token: texts that do are left to the reference.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import tokenizers

from mujina.user_input import UserError
from tokenization.tokenizer import CHAT_PIECES, END_OF_TURN, ROLES, SPACE_PIECE, Tokenizer, render

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
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a chat template may name


class HfTokenizer(Tokenizer):
    """A folder with a tokenizer.json of the BPE kind. `hash` covers that file and the name of the end-of-document token."""

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
        config = self._read_config()
        tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in config.items() if name in SPECIAL}
        self._special = {name: token for name, token in tokens.items() if isinstance(token, str)}
        if "eos_token" not in self._special:
            raise UserError(f"{folder / 'tokenizer_config.json'}: names no eos_token, which ends every document: add it")
        before = self._reference.pre_tokenizer
        self._is_byte_level = before is not None and before.pre_tokenize_str("あ")[0][0] == "ãģĤ"
        self._template, eos = self._read_template(config), self._special["eos_token"]
        self.hash = hashlib.sha256(self._model + b"\0" + eos.encode()).hexdigest()
        vocabulary = self._reference.get_vocab(with_added_tokens=True)
        if eos not in vocabulary:
            raise UserError(f"{folder}: eos_token {eos!r} of tokenizer_config.json is no piece of tokenizer.json: name one that is")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = vocabulary[eos]
        self.end_of_turn_id = vocabulary.get(END_OF_TURN, self.eod_id)
        self._role_ids = {role: vocabulary[f"<|{role}|>"] for role in ROLES if f"<|{role}|>" in vocabulary}
        added = self._reference.get_added_tokens_decoder()
        chat = {vocabulary[piece] for piece in CHAT_PIECES if piece in vocabulary}
        self._control_ids = {token for token, piece in added.items() if piece.special} | chat | {self.eod_id}
        self._unseen_ids = self._control_ids - chat
        spelled = {piece.content for piece in added.values()} | {eos} | {piece for piece in CHAT_PIECES if piece in vocabulary}
        self._guarded = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
        controls = sorted((self._reference.id_to_token(token) for token in self._control_ids), key=len, reverse=True)
        self._spelled = re.compile(f"(?=(?:{'|'.join(map(re.escape, controls))})).", re.DOTALL)  # the first character of each
        # Some take the white space beside them with them.
        white = {piece.content: (r"\s*" * piece.lstrip, r"\s*" * piece.rstrip) for piece in added.values()}
        sides = [(white.get(piece, ("", "")), re.escape(piece)) for piece in controls]
        self._controls = re.compile("|".join(f"{left}({piece}){right}" for (left, right), piece in sides))
        # Added tokens that are looked for after normalization can be spelled in ways that the pattern does not know.
        hidden = self._reference.normalizer is not None and any(piece.normalized for piece in added.values())
        self._fast = None if hidden else self._open_fast()
        self._fast_characters = 0

    def encode(self, text: str) -> list[int]:
        """Ids of one text, never a control or chat id whatever the text spells."""
        ids = list(self._reference.encode(text, add_special_tokens=False).ids)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The model itself builds a control piece out of its characters: none is left whole.
        cuts = [0, *(match.start() + 1 for match in self._guarded.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        return [token for part in parts for token in self._reference.encode(part, add_special_tokens=False).ids]

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
            return [self._reference.token_to_id(f"<0x{byte:02X}>") for byte in data]

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a dialogue as the folder's own chat template writes it, control tokens where the template has them and nowhere else.

        Without a template as Tokenizer.encode_chat. Raises UserError when the vocabulary lacks the chat pieces for that, or when the
        template refuses the dialogue.
        """
        if self._template is None:
            if len(self._role_ids) < len(ROLES) or self.end_of_turn_id == self.eod_id:
                needs = f"a chat template, and the pieces {', '.join(CHAT_PIECES)} to do without"
                raise UserError(f"{self._folder}: the tokenizer lacks {needs}, which chat sources need: add chat_template.jinja")
            return super().encode_chat(messages, add_generation_prompt)
        # What a message spells like a control token goes through the template with a mark in it, which nobody wrote.
        said = "".join(str(value) for message in messages for value in message.values())
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
        hidden = [{key: self._spelled.sub(rf"\g<0>{mark}", value) for key, value in message.items()} for message in messages]
        rendered = render(self._template, hidden, add_generation_prompt, **self._special)
        ids: list[int] = []
        start = 0
        for match in self._controls.finditer(rendered):
            ids += self.encode(rendered[start : match.start()].replace(mark, ""))
            ids.append(self._reference.token_to_id(match[match.lastindex or 0]))
            start = match.end()
        return ids + self.encode(rendered[start:].replace(mark, ""))

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """The dialogue as text, through the folder's chat template, or ours where it has none."""
        if self._template is None:
            return super().render_chat(messages, add_generation_prompt)
        return render(self._template, messages, add_generation_prompt, **self._special)

    def save_hf(self, folder: str | Path) -> None:
        """Copies what transformers.AutoTokenizer needs into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, Path(folder) / name)

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

    def _open_fast(self) -> gigatoken.Tokenizer | None:
        """Gigatoken, or None when it does not know this kind of BPE or splits it differently: then the reference does everything."""
        try:
            fast = gigatoken.Tokenizer.from_json(self._model)
        except RuntimeError:
            return None
        texts = [text for text in PROBE if not self._guarded.search(text)]
        agrees = [ids.tolist() for ids in _arrays(fast, texts)] == [self.encode(text) for text in texts]
        return fast if agrees else None


def _arrays(engine: gigatoken.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    layout = engine.encode_batch(texts, parallel=False).layout
    ids = np.asarray(layout.content.data).astype(np.int32)
    return np.split(ids, np.asarray(layout.offsets.data)[1:-1])
