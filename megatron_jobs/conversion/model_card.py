"""The README.md of an exported folder: what the checkpoint's configuration and ledger, the data's manifests and the comparison say.

Nothing else: what is not known there is left out.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import yaml

from data_prep.indexed import Manifest, read_manifest
from megatron_jobs.config import RunConfig
from megatron_jobs.data.ledger import Ledger
from mujina.matrices import TensorSource


class Exportable(TensorSource, Protocol):
    """What can become a folder: a checkpoint, or the mixture that `upcycle.py` makes of a dense model."""

    config: RunConfig
    shapes: dict[str, tuple[int, int]]
    step: int
    tokens: int

    @property
    def ledger(self) -> Ledger: ...

    @property
    def identity(self) -> dict[str, Any]:
        """Tells the model from any other."""
        ...


def model_card(checkpoint: Exportable, architecture: str, agreement: dict[str, Any] | None, library: str = "transformers") -> str:
    """Markdown; `agreement` is that of the gate, None where the logits were not compared; `library` is what loads the folder."""
    run = checkpoint.config
    manifests = {
        name: manifest
        for phase in checkpoint.ledger.phases
        for name, consumed in phase.sources.items()
        if (manifest := _manifest(run.data.folder / f"{name}.json", consumed.checksum))
    }
    known = {language for manifest in manifests.values() for language in manifest.languages if re.fullmatch("[a-z]{2}", language)}
    head = {"library_name": library, "pipeline_tag": "text-generation"} | ({"language": sorted(known)} if known else {})
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {escaped(run.run.name)}",
        _model(checkpoint, architecture),
        _training(checkpoint, manifests),
        _agreement(agreement),
    ]
    return "\n\n".join(parts) + "\n"


def _model(checkpoint: Exportable, architecture: str) -> str:
    model, moe = checkpoint.config.model, checkpoint.config.moe
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size * (1 if model.tie_embeddings else 2)
    facts = {
        "architecture": architecture,
        "parameters": f"{sum(rows * columns for rows, columns in checkpoint.shapes.values()) - padding:,}",
        "layers, width, FFN width": f"{model.num_layers}, {model.hidden_size:,}, {model.ffn_hidden_size:,}",
        "heads, key-value heads, head size": f"{model.num_attention_heads}, {model.num_query_groups}, {model.head_size}",
        "vocabulary": f"{model.vocab_size:,}" + (" (embeddings tied)" if model.tie_embeddings else ""),
        "rotary base": f"{model.rope_theta:,.0f}",
    }
    if model.rope_scaling:
        facts["rotary scaling"] = f"Llama 3.1's, factor {model.rope_scaling.factor:g} beyond {model.rope_scaling.original_length:,} tokens"
    if moe:
        facts["experts"] = f"{moe.num_experts}, {moe.top_k} of them for each token, {moe.expert_width(model):,} wide"
        if moe.normalize_logits:
            facts["**not stock**"] = "each token's router logits are normalised (`moe.normalize_logits`); no inference engine does that"
    return _table(["model", ""], facts.items())


def _training(checkpoint: Exportable, manifests: dict[str, Manifest]) -> str:
    ledger = checkpoint.ledger
    told = f"Step {checkpoint.step:,}, {checkpoint.tokens:,} tokens" if checkpoint.step else "Not trained"
    if ledger.origin:
        told += f", {escaped(str(ledger.origin))}"
    rows = []
    for phase in ledger.phases:
        for name, consumed in phase.sources.items() if phase.steps else ():
            about: list[str] = ["", "", ""]
            if manifest := manifests.get(name):
                about = [f"{manifest.kind}, {manifest.origin}", _counted(manifest.languages), _counted(manifest.licences)]
            rows.append(map(escaped, (phase.name, name, f"{consumed.tokens:,}", *about)))
    if not rows:
        return f"{told}."
    return f"{told}.\n\n" + _table(["phase", "source", "tokens", "kind and origin", "languages", "licences of the data"], rows)


def _agreement(agreement: dict[str, Any] | None) -> str:
    if agreement is None:
        return "The logits of this folder have not been compared with those of the checkpoint."
    return (
        f"Logits of this folder in transformers, against the checkpoint's in megatron-core, in float32: they differ by "
        f"{agreement['max_relative_error']:.1e} at most and {agreement['mean_relative_error']:.1e} on average, relative to the largest; "
        f"mean loss {agreement['loss_after']:.6f} against {agreement['loss_before']:.6f}."
    )


def escaped(label: str) -> str:
    """A label of others on one line of Markdown, as it is spelled: no markup, no HTML, no cell of a table of its own."""
    return re.sub(r"([\\`*\[\]<>&|~#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(label.split()))


def _manifest(path: Path, checksum: str) -> Manifest | None:
    """What is known of a source, where it is still the one that was consumed."""
    if not path.exists():
        return None
    manifest = read_manifest(path.with_suffix(""))
    return manifest if manifest.bin_sha256 == checksum else None


def _counted(documents: dict[str, int]) -> str:
    """The labels of a source's documents, the most frequent first."""
    return ", ".join(label for label, _ in Counter(documents).most_common() if label != "unknown")


def _table(head: list[str], rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
