"""Hugging Face tokenizers of the kinds BPE and Unigram: folders with a tokenizer.json and a tokenizer_config.json.

The reference is Hugging Face's own engine with special tokens taken as ordinary text. Gigatoken gives the ids of BPE about ten times as
fast, but turns text that spells an added token into that token: texts that do are left to the reference.
"""

import hashlib
import json
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import tokenizers

from mujina.disks import patiently
from mujina.user_input import UserError, nearest, read_object, stand_in
from tokenization.chat import ChatTemplate, Part, plain
from tokenization.tokenizer import BEGINNINGS, CHAT_PIECES, CHAT_TEMPLATES, END_OF_TURN, SPACE_PIECE, BeginDocuments, Rendered, beginning

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
# What a folder may have of a tokenizer, for transformers and for other engines.
FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "tekken.json"),
    *("chat_template.*", "additional_chat_templates/*.jinja"),
)
# The byte-level alphabet (GPT-2): bytes that print are spelled as themselves, the others by the characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(0x100) if byte not in PRINTABLE]
CHARACTER_OF = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(OTHERS)}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
KINDS = ("BPE", "Unigram")
SAID = "acorns"  # by an assistant, to see what a template writes behind it


class HfTokenizer:
    """A `tokenization.tokenizer.Tokenizer`. `hash` covers tokenizer.json and the name of the end-of-document token."""

    def __init__(self, folder: Path, end_of_document: str | None = None, begin_documents: BeginDocuments = "auto") -> None:
        """Opens a folder. Raises UserError when it is of none of KINDS, or when what ends documents is no piece of its vocabulary.

        `end_of_document` is that piece; None: the folder's `eos_token`. `begin_documents` says whether its `bos_token` begins them.
        """
        self._folder, self._model = folder, patiently(folder, (folder / "tokenizer.json").read_bytes)
        try:
            self._reference = tokenizers.Tokenizer.from_buffer(self._model)
            kind = json.loads(self._model)["model"].get("type", "BPE")
        except (ValueError, KeyError) as error:
            problem = f"{folder / 'tokenizer.json'}: is not a Hugging Face tokenizer ({error}): copy it again"
            raise UserError(stand_in(folder / "tokenizer.json") or problem) from None
        if kind not in KINDS:
            raise UserError(
                f"{folder / 'tokenizer.json'}: is of the kind {kind}, only {' and '.join(KINDS)} are read: take another tokenizer"
            )
        self._reference.no_truncation()
        self._reference.no_padding()
        self._reference.encode_special_tokens = True
        begun = self._reference.encode("a").ids
        self._reference.post_processor = None  # adds nothing that is asked for here, and takes spaces out of the tokens' offsets
        config, more = self._read("tokenizer_config.json"), self._read("special_tokens_map.json")
        # what a chat template may name: bos_token, eos_token, and those of the model's own
        tokens = {name: _content(token) for name, token in [*more.items(), *config.items()] if name.endswith("_token") and token}
        self._special = {name: token for name, token in tokens.items() if token is not None}
        eos = end_of_document or self._special.get("eos_token")
        if eos is None:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: names no eos_token, and what ends documents must be told: add it, or write "
                "end_of_document: with the piece that does"
            )
        before = self._reference.pre_tokenizer
        self._is_byte_level = before is not None and before.pre_tokenize_str("あ")[0][0] == "ãģĤ"
        vocabulary = self._reference.get_vocab(with_added_tokens=True)
        if eos not in vocabulary:
            name = f"end_of_document ({eos})" if end_of_document else f"eos_token {eos!r}"
            special = [piece.content for piece in self._reference.get_added_tokens_decoder().values() if piece.special]
            raise UserError(f"{folder}: {name} is no piece of tokenizer.json: {nearest(eos, special)}")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = vocabulary[eos]
        bos = self._special.get("bos_token")
        self.bos_id = vocabulary.get(bos) if bos else None
        if begin_documents == "yes" and self.bos_id is None:
            raise UserError(f"{folder}: begin_documents (yes) needs a bos_token, and its tokenizer names none of its pieces: write no")
        self._begins_by_itself = self.bos_id is not None and begun[:1] == [self.bos_id]
        self.begin_documents, self.begins_texts = begin_documents, begin_documents == "yes"
        if begin_documents == "auto":
            self.begins_texts = self._begins_by_itself
        begins = [f"{begin_documents} {bos}".encode()] if self.begins_texts or begin_documents != "auto" else []
        self.hash = hashlib.sha256(b"\0".join([self._model, eos.encode(), *begins])).hexdigest()
        added = self._reference.get_added_tokens_decoder()
        chat = {vocabulary[piece] for piece in CHAT_PIECES if piece in vocabulary}
        named = {vocabulary[piece] for piece in self._special.values() if piece in vocabulary}
        self._control_ids = {token for token, piece in added.items() if piece.special} | named | chat | {self.eod_id}
        self._unseen_ids = self._control_ids - chat
        spelled = {piece.content for piece in added.values()} | set(map(self.piece, self._control_ids))
        self._guarded = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
        template = self._read_template(config)
        if template is None and vocabulary.keys() >= set(CHAT_PIECES):
            template = CHAT_TEMPLATES["roles"].read_text(encoding="utf-8")
        white = {piece.content: (piece.lstrip, piece.rstrip) for piece in added.values()}
        controls = {piece: white.get(piece, (False, False)) for piece in map(self.piece, self._control_ids)}
        self._template, self._chat = template, None
        if template is not None:
            self._chat = ChatTemplate(template, folder, controls, self._special)
            if begin_documents == "no" or begin_documents == "yes" and not self._begins_dialogues():
                self._template = BEGINNINGS[begin_documents] + template
                self._chat = ChatTemplate(self._template, folder, controls, self._special)
            if begin_documents == "no" and self._begins_dialogues():
                raise UserError(f"{folder}: begin_documents (no): its chat template spells {bos} itself: take it out of the template")
        self.template_hash = self._chat.hash if self._chat else None
        self.end_of_turn_id = self._find_end_of_turn(vocabulary)
        self.remark = None if end_of_document else self._remark_on(eos)
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
            pieces = (self._reference.token_to_id(f"<0x{byte:02X}>") for byte in data)
            return [token for token in pieces if token is not None]

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
        all_parts = self._chat.parts(messages, add_generation_prompt, with_answers)
        for is_control, group in groupby(all_parts, lambda part: part.is_control):
            parts = list(group)
            tokens = [[self._id(part.text)] for part in parts] if is_control else self._encode_cut([part.text for part in parts])
            for part, its_ids in zip(parts, tokens, strict=True):
                ids += its_ids
                is_answer += [part.is_answer] * len(its_ids)
        return Rendered(np.array(ids, np.int32), np.array(is_answer, bool), plain(all_parts))

    def template_notes(self) -> list[str]:
        """What the chat template adds to dialogues and leaves out of them, such as a system prompt or reasoning."""
        return self._chat.notes() if self._chat else []

    def save_hf(self, folder: str | Path) -> None:
        """Copies what there is of the tokenizer into `folder`; with `begin_documents` in it as transformers understands it."""
        for file in sorted(file for pattern in FILES for file in self._folder.glob(pattern)):
            target = Path(folder) / file.relative_to(self._folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if self.begin_documents != "auto":
            self._save_beginning(Path(folder))
        if self._template is not None and self._template != self._read_template(self._read("tokenizer_config.json")):
            (Path(folder) / "chat_template.jinja").write_text(self._template, encoding="utf-8")

    def _save_beginning(self, folder: Path) -> None:
        """Texts and dialogues of transformers begin as documents do; where those begin with nothing, no bos_token is named."""
        if self.begins_texts != self._begins_by_itself:
            backend = tokenizers.Tokenizer.from_buffer(self._model)
            bos = self._special["bos_token"]
            backend.post_processor = beginning(bos, self._id(bos)) if self.begins_texts else None
            (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        if not self.begins_texts:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                if (folder / name).exists():
                    values = {key: value for key, value in self._read(name).items() if key not in ("bos_token", "add_bos_token")}
                    (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")

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

    def _dialogue(self) -> list[Part]:
        """How the template writes a question and an answer that is SAID; empty where it takes other dialogues only."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID}]
        for first in ([], [{"role": "system", "content": "!"}]):  # some want a system's turn
            with suppress(UserError):
                return self._chat.parts([*first, *turns], with_answers=False) if self._chat else []
        return []

    def _begins_dialogues(self) -> bool:
        return [part.text for part in self._dialogue()[:1]] == [self._special.get("bos_token")]

    def _find_end_of_turn(self, vocabulary: dict[str, int]) -> int:
        """The added token that the template writes behind what the assistant has said; else <|end|>, or what ends documents."""
        written = "".join(part.text for part in self._dialogue())
        found = self._guarded.search(written.partition(SAID)[2])
        return vocabulary.get(found.group() if found else END_OF_TURN, self.eod_id)

    def _remark_on(self, eos: str) -> str | None:
        """That the model beside the tokenizer ends its texts with other tokens."""
        others = set[int]()
        for name in ("config.json", "generation_config.json"):
            value = self._read(name).get("eos_token_id")
            tokens = [] if value is None else value if isinstance(value, list) else [value]
            if not all(type(token) is int for token in tokens):
                raise UserError(f"{self._folder / name}: eos_token_id ({value!r}) must be a token's number, or a list of such: mend it")
            others |= {token for token in tokens if token >= 0}
        others -= {self.eod_id} if self.eod_id == self.end_of_turn_id else {self.eod_id, self.end_of_turn_id}
        pieces = [piece for token in sorted(others) if (piece := self._reference.id_to_token(token)) is not None]
        if not pieces:
            return None
        return (
            f"{self._folder}: documents end with {eos}, the eos_token of the tokenizer, and by its configuration the model ends texts with "
            f"{', '.join(pieces)}: where documents are to end with that, write end_of_document: {json.dumps(pieces[0], ensure_ascii=False)}"
        )

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty without the file. Raises UserError when it is anything else."""
        path = self._folder / name
        return read_object(path, "mend it, or copy it again") if path.exists() else {}

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


def _content(token: Any) -> str | None:
    """How a special token is spelled, by its own name or as an added token."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _arrays(engine: gigatoken.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    layout = engine.encode_batch(texts, parallel=False).layout
    ids = np.asarray(layout.content.data).astype(np.int32)
    return np.split(ids, np.asarray(layout.offsets.data)[1:-1])
