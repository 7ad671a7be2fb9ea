"""The token binaries of a run, opened and checked against its configuration."""

import numpy as np

from data_prep.indexed import Manifest, TokenBinary, open_binary
from megatron_jobs.config import RunConfig
from megatron_jobs.phases import Source
from tokenization.tokenizer import Tokenizer
from user_input import UserError

__all__ = ["TokenBinary", "facts", "open_sources", "read"]


def open_sources(config: RunConfig) -> dict[str, TokenBinary]:
    """Every source in `data.folder`, by name. Takes a time that does not depend on their size.

    Raises UserError when a binary is damaged or made with another tokenizer than the run's.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:  # imported models may have more rows than their tokenizer has pieces
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) must not be below the number of pieces of the tokenizer in {config.tokenizer} "
            f"({tokenizer.vocab_size}): change one of them"
        )
    used = {name for phase in config.phases for name in phase.sources}
    prefixes = {path.stem: path.with_suffix("") for path in sorted(config.data.folder.glob("*.json"))}
    return {name: open_binary(prefix, tokenizer.hash) for name, prefix in prefixes.items() if name in used}


def read(binaries: dict[str, TokenBinary], where: list[tuple[str, int]], length: int) -> np.ndarray:
    """The samples at (source, offset) of `DataOrder.samples`: int64 token ids, shape [samples, length + 1], the last one a label only."""
    return np.stack([binaries[name].tokens[at : at + length + 1] for name, at in where]).astype(np.int64)


def facts(binaries: dict[str, TokenBinary]) -> dict[str, Source]:
    return {name: _facts_of(name, binary.manifest) for name, binary in binaries.items()}


def _facts_of(name: str, m: Manifest) -> Source:
    labels = {"languages": tuple(m.languages), "licences": tuple(m.licences), "teachers": tuple(m.teachers)}
    return Source(name, m.num_tokens, m.kind, m.origin, checksum=m.bin_sha256, **labels)
