"""Opens a tokenizer folder with the engine that it is for."""

from pathlib import Path

from mujina.user_input import UserError, reading
from tokenization.hf import HfTokenizer
from tokenization.sentence_piece import SentencePieceTokenizer
from tokenization.tokenizer import Tokenizer


def load(folder: str | Path) -> Tokenizer:
    """Opens `folder`/tokenizer.model, or the BPE tokenizer.json of a folder without one. Raises UserError on a missing or unfit one."""
    model_file = Path(folder) / "tokenizer.model"
    with reading(folder, "a tokenizer's folder", "copy it again, or train a tokenizer"):
        if model_file.exists():
            return SentencePieceTokenizer(model_file)
        if (Path(folder) / "tokenizer.json").exists():
            return HfTokenizer(Path(folder))
    raise UserError(f"{model_file}: no such file: train a tokenizer into {folder} with python -m tokenization.train")
