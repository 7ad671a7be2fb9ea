"""The tokenizers that `tokenization.train` makes, and their Hugging Face side.

The engine is sentencepiece (unigram with byte fallback, no normalisation, no dummy prefix), so `decode(encode(text)) == text`
for every string of valid characters.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from mujina.disks import patiently
from mujina.user_input import UserError, stand_in
from tokenization.chat import ChatTemplate, Part, plain
from tokenization.tokenizer import BEGINNINGS, CHAT_PIECES, CHAT_TEMPLATES, END_OF_TURN, SPACE_PIECE, BeginDocuments, Rendered, beginning


class ForeignModel(UserError):
    """A sentencepiece model that `tokenization.train` has not made."""


class SentencePieceTokenizer:
    """A `tokenization.tokenizer.Tokenizer`. Its `hash` is that of tokenizer.model; dialogues are written by the chat_template.jinja beside
    it, or by that of the role tokens where there is none."""

    remark: str | None = None
    bos_id: int | None

    def __init__(self, model_file: Path, end_of_document: str | None = None, begin_documents: BeginDocuments = "auto") -> None:
        """Opens a sentencepiece model. Raises UserError when it is none, and ForeignModel when `tokenization.train` has not made it."""
        self._model_file, self._model = model_file, patiently(model_file, model_file.read_bytes)
        self.begin_documents, self.begins_texts = begin_documents, begin_documents == "yes"
        self.hash = hashlib.sha256(self._model + (begin_documents.encode() if begin_documents != "auto" else b"")).hexdigest()
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError:
            raise ForeignModel(stand_in(model_file) or f"{model_file}: is not a sentencepiece model: copy it again, or train one") from None
        self.vocab_size: int = self._engine.vocab_size()
        if not self.vocab_size:
            raise ForeignModel(f"{model_file}: is not a sentencepiece model: copy it again, or train one")
        self.eod_id = self._id(eos := self._engine.id_to_piece(self._engine.eos_id()))
        if end_of_document not in (None, eos):
            raise UserError(f"end_of_document ({end_of_document}): documents of {model_file} end with {eos}: write that, or leave it out")
        self._bos = self._engine.id_to_piece(self._engine.bos_id())
        self._chat_ids = {piece: self._id(piece) for piece in (*CHAT_PIECES, self._bos, eos)}
        self.bos_id = self._chat_ids[self._bos]
        own = model_file.with_name("chat_template.jinja")
        template = (own if own.exists() else CHAT_TEMPLATES["roles"]).read_text(encoding="utf-8")
        self._template = template if template.startswith(BEGINNINGS[begin_documents]) else BEGINNINGS[begin_documents] + template
        self.end_of_turn_id = self._id(END_OF_TURN) if END_OF_TURN in template else self.eod_id
        controls = dict.fromkeys(self._chat_ids, (False, False))
        self._chat = ChatTemplate(self._template, model_file.parent, controls, {"bos_token": self._bos, "eos_token": eos})
        self.template_hash: str | None = self._chat.hash
        # The engine takes a literal U+2581 for a space. Spelled in bytes it comes back as itself.
        self._space_piece_ids = [self._id(f"<0x{byte:02X}>") for byte in SPACE_PIECE.encode()]
        # Only the chat pieces are found in raw text by the engine; <s>, </s>, <unk> and <pad> never are.
        self._guarded = re.compile("|".join(map(re.escape, (*CHAT_PIECES, SPACE_PIECE))))

    def encode(self, text: str) -> list[int]:
        """Ids of one text, never a control or chat id whatever the text spells."""
        if not self._guarded.search(text):
            return list(self._engine.encode(text))
        return [token for part in self._safe_parts(text) for token in (self._engine.encode(part) if isinstance(part, str) else part)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text as 1-D int32 arrays, on one core: who has more of them starts more processes."""
        plain = [text for text in texts if not self._guarded.search(text)]
        encoded = iter(self._engine.encode_as_numpy(plain, num_threads=1)) if plain else iter(())
        return [
            np.array(self.encode(text), dtype=np.int32) if self._guarded.search(text) else next(encoded).astype(np.int32, copy=False)
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Chat pieces come out as they are spelled, control pieces (</s> and so on) as nothing."""
        return str(self._engine.decode([int(token) for token in ids]))

    def piece(self, token: int) -> str:
        """How the vocabulary spells one id."""
        return str(self._engine.id_to_piece(token))

    def bytes_of(self, token: int) -> bytes | None:
        """What one piece stands for in a text (UTF-8, or a part of a character), None for control and chat pieces."""
        piece = self.piece(token)
        if self._engine.is_control(token) or self._engine.is_unknown(token) or piece in CHAT_PIECES:
            return None
        return bytes([int(piece[3:5], 16)]) if self._engine.is_byte(token) else piece.replace(SPACE_PIECE, " ").encode()

    def encode_bytes(self, data: bytes) -> list[int]:
        """`encode` of what `bytes_of` gives, parts of characters included."""
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            return [self._id(f"<0x{byte:02X}>") for byte in data]

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> Rendered:
        """A dialogue as its template writes it; contents that spell a chat piece stay text. Raises UserError on an unknown role."""
        return self._rendered(self._chat.parts(messages, add_generation_prompt))

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> np.ndarray:
        """The ids of `render`, int32 [n]."""
        return self._rendered(self._chat.parts(messages, add_generation_prompt, with_answers=False)).ids

    def _rendered(self, parts: list[Part]) -> Rendered:
        ids: list[int] = []
        is_answer: list[bool] = []
        for part in parts:
            ids += [self._chat_ids[part.text]] if part.is_control else self.encode(part.text)
            is_answer += [part.is_answer] * (len(ids) - len(is_answer))
        return Rendered(np.array(ids, np.int32), np.array(is_answer, bool), plain(parts))

    def template_notes(self) -> list[str]:
        """What the chat template adds to dialogues and leaves out of them."""
        return self._chat.notes()

    def save_hf(self, folder: str | Path) -> None:
        """Writes what transformers.AutoTokenizer needs into `folder`, without remote code; `tokenizer.model` goes with it.

        The two engines agree but for scores that differ by less than rounding: see `tokenization.train` for the measured share. And
        Hugging Face turns text that spells a special piece into that piece unless it is called with split_special_tokens=True.
        Training data is therefore always encoded by this class.
        """
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        engine = self._engine
        pieces = [engine.id_to_piece(token) for token in range(self.vocab_size)]
        scores = [engine.get_score(token) for token in range(self.vocab_size)]
        backend = tokenizers.Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=engine.unk_id(), byte_fallback=True))
        # Our engine never finds bytes and special pieces by their spelling. This one does, unless the spelling is cut after its "<".
        spelled = [piece for i, piece in enumerate(pieces) if piece in CHAT_PIECES or engine.is_control(i) or engine.is_byte(i)]
        cut = tokenizers.Regex("<(?=" + "|".join(re.escape(piece[1:]) for piece in spelled) + ")")
        backend.pre_tokenizer = pre_tokenizers.Split(cut, behavior="merged_with_previous")
        backend.normalizer = normalizers.Replace(" ", SPACE_PIECE)
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()])
        names = {"eos_token": engine.eos_id(), "unk_token": engine.unk_id(), "pad_token": engine.pad_id()}
        special = {name: engine.id_to_piece(token) for name, token in names.items()}
        controls = [self._bos, *special.values(), *CHAT_PIECES]
        backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in controls])
        if self.begins_texts:  # else nothing does, and who is told of a bos_token would begin with it
            special["bos_token"] = self._bos
            backend.post_processor = beginning(self._bos, self._chat_ids[self._bos])
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        config = special | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": list(CHAT_PIECES),
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self._template, encoding="utf-8")
        (folder / "tokenizer.model").write_bytes(self._model)

    def _safe_parts(self, text: str) -> Iterator[str | list[int]]:
        """Cuts text after the first character of every chat piece it spells (so that none is left whole); a U+2581 becomes byte ids."""
        start = 0
        for match in self._guarded.finditer(text):
            spelled_space = match.group() == SPACE_PIECE
            cut = match.start() if spelled_space else match.start() + 1
            yield text[start:cut]
            if spelled_space:
                yield self._space_piece_ids
            start = match.end() if spelled_space else cut
        yield text[start:]

    def _id(self, piece: str) -> int:
        token = self._engine.piece_to_id(piece)
        if token == self._engine.unk_id() or token < 0:
            raise ForeignModel(
                f"{self._model_file}: has no piece {piece}, so `mujina tokenizer` has not made it, and no tokenizer.json is beside it: "
                "open it with transformers' AutoTokenizer and save it with save_pretrained, which writes one"
            )
        return token
