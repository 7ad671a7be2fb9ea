"""Reading a GGUF file: transformers and the package gguf unpack it to a Hugging Face folder. Needs no torch before that."""

import json
from pathlib import Path
from typing import Any

from mujina.user_input import UserError

# How texts are cut before BPE, by the GGUF's `tokenizer.ggml.pre`: transformers takes every one of them for GPT-2's.
PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}


def unpack(file: Path, folder: Path) -> None:
    """A GGUF file as a Hugging Face folder in float32, its tokenizer with it; folder/config.json says what it is.

    Raises UserError when it is no GGUF file, or one whose model or tokenizer transformers would read wrongly.
    """
    try:
        import accelerate  # noqa: F401  transformers wants it for this
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{file}: reading GGUF needs packages ({error}): pip install -c constraints.txt -e '.[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        reader = GGUFReader(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a GGUF file ({error}): name one, or a Hugging Face folder") from None
    # transformers passes over both, and would give a model that differs from the file's.
    if any(".rope.scaling." in name for name in reader.fields) or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UserError(f"{file}: its rotary positions are scaled, which is not supported: take another model")
    cut = reader.fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in reader.fields else None
    if cut not in PRE_TOKENIZERS:
        raise UserError(
            f"{file}: tokenizer.ggml.pre ({cut}) is not known, only {', '.join(PRE_TOKENIZERS)}: take the model's Hugging Face folder"
        )
    del reader
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True)
    model.hf_quantizer = model.quantization_method = None  # with them save_pretrained refuses, though nothing is quantized any more
    del model.config.quantization_config
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # GGUF has float32: 9.99999974e-06
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(folder)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["pre_tokenizer"] = PRE_TOKENIZERS[cut]
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
