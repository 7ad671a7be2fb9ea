"""Adds pieces to the vocabulary of a Hugging Face model, with an embedding row for each.

    python -m tokenization.extend CONFIG.yaml [key=value ...]        (= mujina extend-vocabulary)

What can be extended: a sentencepiece tokenizer.model of the unigram kind (ours) or the BPE kind (Llama 2), and the tokenizer.json
beside it; or a byte-level BPE tokenizer.json alone (Llama 3, Qwen, SmolLM2). Old ids stay what they were, special ones included.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import sentencepiece
import tokenizers
import typer
from google.protobuf.message import DecodeError
from pydantic import Field
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import pre_tokenizers

from mujina.files import whole_folder
from mujina.user_input import Section, UserError, command_line, read_object, read_yaml, reading
from tokenization.embeddings import extend_embeddings
from tokenization.merges import continue_merges
from tokenization.presplit import mecab
from tokenization.tokenizer import SPACE_PIECE
from tokenization.train import read_lines

MANIFEST = "extension.json"
FOLDER = "give a Hugging Face folder"
NORMAL = proto.ModelProto.SentencePiece.NORMAL
# What sentencepiece would not learn across: digits stand alone, and a space begins a word.
WORD = re.compile(r" ?[^\W\d]+|\d| ?[^\w\s]+")
# vocab.json and merges.txt, the slow tokenizer's, would contradict the extended tokenizer.json.
COMPANIONS = ("*.json", "*.jinja", "*.py", "*.md", "*.txt", "LICENSE*")
STALE = {"vocab.json", "merges.txt"}


class ExtendConfig(Section):
    """Which model gets pieces, and where they come from."""

    model: str
    """Hugging Face folder: config.json, *.safetensors, tokenizer.model or tokenizer.json."""
    output: str
    """The folder to write."""
    num_new_pieces: int = Field(gt=0)
    """How many pieces are added."""
    inputs: list[str] = []
    """For a BPE vocabulary: JSONL files of the new language, on which merging goes on."""
    presplit: Literal["mecab"] | None = None
    """For a BPE vocabulary: `mecab` keeps the new pieces within Japanese words."""
    character_coverage: float = Field(default=0.9995, gt=0.9, le=1.0)
    """For a BPE vocabulary without the bytes' alphabet: share of the characters that shall be pieces."""
    pieces_from: str | None = None
    """For a unigram vocabulary: a folder of `mujina tokenizer`, trained on the new language, whose most probable pieces are added with
    their scores.
    """


@dataclass(frozen=True)
class Extension:
    """`old_ids[k]` is how the old tokenizer spells the new piece `first_id + k`; `files` are the tokenizer's, as they are to be."""

    pieces: list[str]
    first_id: int
    old_ids: list[list[int]]
    files: dict[str, bytes]


def extend(config: ExtendConfig) -> Path:
    """Writes the extended model; returns its folder. Raises UserError on what cannot be extended, or when the text gives too few pieces."""
    source, output = Path(config.model), Path(config.output)
    model_config = read_object(source / "config.json", FOLDER)
    with reading(source, "a folder whose vocabulary can be extended", "give a Hugging Face model with its tokenizer"):
        extension = _extend_sentencepiece(source, config) if (source / "tokenizer.model").exists() else _extend_byte_level(source, config)
    with whole_folder(output, MANIFEST) as partial:
        for file in {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file() and file.name not in STALE}:
            shutil.copyfile(file, partial / file.name)
        for name, data in extension.files.items():
            (partial / name).write_bytes(data)
        model_config["vocab_size"] = extend_embeddings(source, partial, extension.first_id, extension.old_ids)
        _write_json(partial / "config.json", model_config)
        _write_json(partial / MANIFEST, {"config": config.model_dump(), "first_new_id": extension.first_id, "pieces": extension.pieces})
    print(f"{output}: {len(extension.pieces):,} new pieces from id {extension.first_id:,} on, vocab_size {model_config['vocab_size']:,}")
    return output


def _extend_sentencepiece(source: Path, config: ExtendConfig) -> Extension:
    model = _read_model(source / "tokenizer.model")
    kind = proto.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
    if kind == "UNIGRAM":
        scored = _unigram_pieces(model, config)
    elif kind == "BPE":
        # In a BPE model a score is minus the rank of the merge: the new ones come behind the old.
        lowest = min(piece.score for piece in model.pieces if piece.type == NORMAL)
        scored = [(piece, lowest - rank) for rank, piece in enumerate(_bpe_pieces(model, config), start=1)]
    else:
        raise UserError(f"{source / 'tokenizer.model'}: is of the kind {kind}, only UNIGRAM and BPE can be extended: use another tokenizer")
    pieces, first_id, old = [piece for piece, _ in scored], len(model.pieces), _engine(model)
    files = {"tokenizer.model": _with_pieces(model, scored).SerializeToString()}
    if (source / "tokenizer.json").exists():
        document = read_object(source / "tokenizer.json", FOLDER)
        if any(token["id"] >= first_id for token in document["added_tokens"]):
            raise UserError(
                f"{source / 'tokenizer.json'}: has added tokens behind the {first_id} pieces of tokenizer.model: remove one of them"
            )
        if document["model"]["type"] == "Unigram":
            document["model"]["vocab"] += [list(item) for item in scored]
        else:
            _append_merges(document["model"], set(document["model"]["vocab"]), pieces, first_id)
        files["tokenizer.json"] = json.dumps(document, ensure_ascii=False).encode()
    return Extension(pieces, first_id, [old.encode(piece) for piece in pieces], files)


def _unigram_pieces(model: Any, config: ExtendConfig) -> list[tuple[str, float]]:
    """The most probable pieces of the other model which, once added, are how their own text is split."""
    if config.pieces_from is None:
        raise UserError(
            "pieces_from is missing: a unigram vocabulary takes its new pieces from a tokenizer folder: train one with mujina tokenizer"
        )
    path = Path(config.pieces_from) / "tokenizer.model"
    if not path.exists():
        raise UserError(f"pieces_from ({config.pieces_from}): holds no tokenizer.model: train one with mujina tokenizer")
    other, known = _read_model(path), {piece.piece for piece in model.pieces}
    candidates = [(piece.piece, piece.score) for piece in other.pieces if piece.type == NORMAL and piece.piece not in known]
    while True:
        chosen = candidates[: config.num_new_pieces]
        if len(chosen) < config.num_new_pieces:
            raise UserError(
                f"num_new_pieces ({config.num_new_pieces}): {path} has only {len(chosen)} new and useful ones: train a larger one"
            )
        engine = _engine(_with_pieces(model, chosen))
        useless = {piece for piece, _ in chosen if engine.encode_as_pieces(piece) != [piece]}
        if not useless:
            return chosen
        candidates = [item for item in candidates if item[0] not in useless]


def _bpe_pieces(model: Any, config: ExtendConfig) -> list[str]:
    """First the characters that the model lacks, then merges."""
    counts = Counter[str]()
    for word in _words(config):
        counts.update(part.replace(" ", SPACE_PIECE) for part in WORD.findall(word))
    known, engine = {piece.piece for piece in model.pieces if piece.type == NORMAL}, _engine(model)
    characters = Counter[str]()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    missing = Counter({character: count for character, count in characters.items() if character not in known})
    uncovered, allowed, new = missing.total(), (1 - config.character_coverage) * characters.total(), []
    for character, count in missing.most_common(config.num_new_pieces):
        if uncovered > allowed:
            new.append(character)
            uncovered -= count

    def symbols(word: str) -> list[str]:
        runs = [(is_missing, "".join(run)) for is_missing, run in groupby(word, missing.__contains__)]
        return [symbol for is_missing, run in runs for symbol in (run if is_missing else engine.encode_as_pieces(run))]

    split = [(symbols(word), count) for word, count in counts.items()]
    return _enough([*new, *continue_merges(split, known | set(new), config.num_new_pieces - len(new))], config)


def _extend_byte_level(source: Path, config: ExtendConfig) -> Extension:
    path = source / "tokenizer.json"
    document = read_object(path, FOLDER)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    before, normalizer, alphabet = tokenizer.pre_tokenizer, tokenizer.normalizer, set(pre_tokenizers.ByteLevel.alphabet())
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    vocabulary = document["model"].get("vocab", {})
    byte_level = before is not None and before.pre_tokenize_str("あ")[0][0] == "ãģĤ" and alphabet <= set(vocabulary)
    if document["model"].get("type", "BPE") != "BPE" or not byte_level:
        raise UserError(f"{path}: is no byte-level BPE without a prefix space: other kinds need their tokenizer.model beside it")
    counts = Counter[str]()
    for word in _words(config):
        counts.update(part for part, _ in before.pre_tokenize_str(normalizer.normalize_str(word) if normalizer else word))
    split = [([token.value for token in tokenizer.model.tokenize(word)], count) for word, count in counts.items()]
    known = set(vocabulary) - set(added)
    pieces = _enough(continue_merges(split, known, config.num_new_pieces), config)
    first_id = max(*vocabulary.values(), *added.values(), 0) + 1
    _append_merges(document["model"], known, pieces, first_id)
    # An added token that is no piece of the model would be numbered behind the last piece, wherever that is now.
    vocabulary.update(added)
    old_ids = [[token.id for token in tokenizer.model.tokenize(piece)] for piece in pieces]
    return Extension(pieces, first_id, old_ids, {"tokenizer.json": json.dumps(document, ensure_ascii=False).encode()})


def _append_merges(model: dict[str, Any], known: set[str], pieces: list[str], first_id: int) -> None:
    """Adds pieces to the model of a tokenizer.json, with every way to make each of them out of two pieces that precede it."""
    known, as_text = set(known), bool(model["merges"]) and isinstance(model["merges"][0], str)
    for token, piece in enumerate(pieces, start=first_id):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in known and piece[cut:] in known]
        model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in pairs]
        model["vocab"][piece] = token
        known.add(piece)


def _words(config: ExtendConfig) -> Iterator[str]:
    if not config.inputs:
        raise UserError("inputs is missing: a BPE vocabulary learns its new pieces from text: name JSONL files of the new language")
    words = mecab() if config.presplit else lambda line: [line]
    return (word for line in read_lines(config.inputs) for word in words(line))


def _enough(pieces: list[str], config: ExtendConfig) -> list[str]:
    if len(pieces) < config.num_new_pieces:
        raise UserError(
            f"num_new_pieces ({config.num_new_pieces}): the inputs repeat only {len(pieces)} new pieces: give more text, or fewer pieces"
        )
    return pieces


def _with_pieces(model: Any, scored: list[tuple[str, float]]) -> Any:
    extended = proto.ModelProto()
    extended.CopyFrom(model)
    extended.pieces.extend(proto.ModelProto.SentencePiece(piece=piece, score=score) for piece, score in scored)
    extended.trainer_spec.vocab_size = len(extended.pieces)
    return extended


def _engine(model: Any) -> sentencepiece.SentencePieceProcessor:
    """The model without what it does at the ends of a text, to see how it splits the text of one piece."""
    plain = _with_pieces(model, [])
    plain.normalizer_spec.add_dummy_prefix = plain.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())


def _read_model(path: Path) -> Any:
    try:
        return proto.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: is not a sentencepiece model ({error}): copy it again") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the extension, see ExtendConfig")],
    overrides: Annotated[list[str] | None, typer.Argument(help="values that replace the file's, such as num_new_pieces=8000")] = None,
) -> None:
    """Adds pieces to a model's vocabulary; each starts as the mean of the pieces that spelled it before."""
    extend(read_yaml(config, ExtendConfig, overrides))


if __name__ == "__main__":
    command_line(main)
