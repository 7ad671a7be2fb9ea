"""Opens a tokenizer folder with the engine that it is for."""

from pathlib import Path

from mujina.user_input import UserError, reading, stand_in
from tokenization.hf import HfTokenizer
from tokenization.sentence_piece import ForeignModel, SentencePieceTokenizer
from tokenization.tokenizer import BeginDocuments, Tokenizer


def load(folder: str | Path, end_of_document: str | None = None, begin_documents: BeginDocuments = "auto") -> Tokenizer:
    """Opens `folder`/tokenizer.model where it is one of ours, else its tokenizer.json. Raises UserError on a missing or unfit one.

    `end_of_document` is the piece that ends documents; None: the folder's `eos_token`. `begin_documents` says whether its `bos_token`
    begins them.
    """
    model_file = Path(folder) / "tokenizer.model"
    has_json = (Path(folder) / "tokenizer.json").exists()
    with reading(folder, "a tokenizer's folder", "copy it again, or train a tokenizer"):
        if model_file.exists():
            try:
                return SentencePieceTokenizer(model_file, end_of_document, begin_documents)
            except ForeignModel:
                if not has_json:
                    raise
        if has_json:
            return HfTokenizer(Path(folder), end_of_document, begin_documents)
    for name in ("tokenizer.json", "tokenizer.model"):
        if problem := stand_in(Path(folder) / name):
            raise UserError(problem)
    slow = [name for name in ("vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json") if (Path(folder) / name).exists()]
    if slow:
        remedy = f"open it with transformers' AutoTokenizer, which reads {slow[0]}, and save it with save_pretrained, which writes one"
    else:
        remedy = "check the path, copy a model's own tokenizer there, or train one with `mujina tokenizer`"
    raise UserError(f"{folder}: holds no tokenizer (tokenizer.json, or tokenizer.model of ours): {remedy}")
