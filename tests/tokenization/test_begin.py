"""What begins documents: in training, and in the folder that transformers opens, it is the same."""

import json
from pathlib import Path
from typing import get_args

import pytest
import tokenizers
from transformers import AutoTokenizer

from data_prep.config import PrepareConfig
from data_prep.indexed import open_binary
from data_prep.prepare import prepare
from mujina.user_input import UserError, read_yaml
from tests.tokenization.conftest import SPECIAL
from tokenization.load import load
from tokenization.tokenizer import BeginDocuments, beginning

CHOICES = get_args(get_args(BeginDocuments)[0])
CHAT = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
TEMPLATES = {
    "writes": "{{ bos_token }}" + CHAT,
    "writes a sum": CHAT.replace("<|{{", "{{ (bos_token if loop.first else '') + '<|' }}{{", 1),
    "none": CHAT,
}
MESSAGES = [{"role": "user", "content": "12 <s>"}, {"role": "assistant", "content": "15"}]
TEXT = "The cat"


def folder_of(bpe_folder: Path, folder: Path, adds: bool, template: str) -> Path:
    backend = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    if adds:
        backend.post_processor = beginning("<s>", 1)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [True, False])
def test_the_exported_folder_begins_as_training_does(bpe_folder: Path, tmp_path: Path, choice: str, template: str, adds: bool) -> None:
    tokenizer = load(folder_of(bpe_folder, tmp_path / "in", adds, TEMPLATES[template]), begin_documents=choice)
    tokenizer.save_hf(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    document = [SPECIAL.index("<s>")] * tokenizer.begins_texts + tokenizer.encode(TEXT)
    assert loaded(TEXT)["input_ids"] == document
    dialogue = tokenizer.encode_chat(MESSAGES).tolist()
    assert loaded.apply_chat_template(MESSAGES[1:], return_dict=False) == tokenizer.encode_chat(MESSAGES[1:]).tolist()
    begun = {"auto": (adds, template != "none"), "yes": (True, True), "no": (False, False)}[choice]
    assert (tokenizer.begins_texts, dialogue[0] == tokenizer.bos_id) == begun
    assert dialogue.count(tokenizer.bos_id) == begun[1]
    assert loaded.bos_token == (None if choice == "no" else "<s>")  # what lm-eval puts before a text
    assert load(tmp_path / "out").begins_texts == tokenizer.begins_texts


@pytest.mark.parametrize("choice", CHOICES)
def test_our_own_names_a_bos_token_only_where_documents_have_it(folder: Path, tmp_path: Path, choice: str) -> None:
    tokenizer = load(folder, begin_documents=choice)
    tokenizer.save_hf(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.bos_token == ("<s>" if choice == "yes" else None)
    assert loaded(TEXT)["input_ids"] == [1] * (choice == "yes") + tokenizer.encode(TEXT)
    written = loaded.apply_chat_template(MESSAGES[1:], return_dict=False)
    assert written == tokenizer.encode_chat(MESSAGES[1:]).tolist() and written.count(1) == (choice == "yes")


def test_a_full_disk_is_an_error_of_the_system(folder: Path, tmp_path: Path) -> None:
    """Which is told in one line, and one of the tokenizers library is not."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        load(folder).save_hf(tmp_path)


def test_what_cannot_be_chosen_is_told(bpe_folder: Path, tmp_path: Path) -> None:
    spelled = folder_of(bpe_folder, tmp_path / "spelled", True, "<s>" + CHAT)
    with pytest.raises(UserError, match=r"begin_documents \(no\): its chat template spells <s> itself: take it out"):
        load(spelled, begin_documents="no")
    (spelled / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"begin_documents \(yes\) needs a bos_token"):
        load(spelled, begin_documents="yes")


@pytest.mark.parametrize("choice", CHOICES)
def test_the_manifest_tells_what_documents_begin_with(bpe_folder: Path, tmp_path: Path, choice: str) -> None:
    """A tokenizer that begins texts, and a template that does not write it; yes and no as YAML has them."""
    folder = folder_of(bpe_folder, tmp_path / "tokenizer", True, CHAT)
    (tmp_path / "web.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    sources = {name: {"documents": [str(tmp_path / f"{name}.jsonl")], "kind": name} for name in ("web", "chat")}
    settings = {"tokenizer": str(folder), "output": str(tmp_path / "out"), "sources": sources}
    (tmp_path / "data.yaml").write_text(json.dumps(settings)[:-1] + f", begin_documents: {choice}}}")
    manifests = {manifest.name: manifest for manifest in prepare(read_yaml(tmp_path / "data.yaml", PrepareConfig))}
    assert {name: manifest.num_begun for name, manifest in manifests.items()} == {
        "auto": {"web": 2, "chat": 0},
        "yes": {"web": 2, "chat": 1},
        "no": {"web": 0, "chat": 0},
    }[choice]
    tokenizer = load(folder, begin_documents=choice)
    document = open_binary(tmp_path / "out/web", tokenizer.hash).document(1).tolist()
    assert document == [1] * (choice != "no") + [*tokenizer.encode("two"), tokenizer.eod_id]
    other = "no" if choice == "yes" else "yes"
    with pytest.raises(UserError, match=f'with begin_documents: {choice} and end_of_document: "</s>"'):
        open_binary(tmp_path / "out/web", load(folder, begin_documents=other).hash)
