"""A model with new pieces is the old model for old pieces, and needs fewer of them for the new language."""

import gzip
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mujina.user_input import UserError
from tokenization import extend as extend_module
from tokenization.extend import ExtendConfig, extend
from tokenization.load import load
from tokenization.merges import continue_merges
from tokenization.train import TrainConfig, train

CORPUS = Path(__file__).parents[2] / "examples/corpus"
NUM_NEW = 150
PADDED = 16  # rows of the embedding that belong to no piece


def texts(name: str) -> list[str]:
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line)["text"][:2_000] for line in list(stream)[:60]]


ENGLISH, JAPANESE = texts("web_en"), texts("web_ja")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training text of both languages, three English tokenizers, and a Japanese one to take unigram pieces from."""
    place = tmp_path_factory.mktemp("extend")
    for name, rows in (("en", ENGLISH), ("ja", JAPANESE)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    for name, size in (("en", 800), ("ja", 2_000)):
        train(TrainConfig(inputs=[str(place / f"{name}.jsonl")], output=str(place / f"unigram_{name}"), vocab_size=size))
    _train_llama2(place / "llama2")
    _train_byte_level(place / "byte_level")
    return place


def _train_llama2(folder: Path) -> None:
    """A sentencepiece BPE tokenizer.model, and the tokenizer.json that transformers makes of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in ENGLISH for line in text.splitlines() if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=1,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}')
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _train_byte_level(folder: Path) -> None:
    """As Llama 3: special tokens that are no pieces of the model, numbered behind it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=800, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(ENGLISH, trainer)
    backend.add_special_tokens(["<|begin|>", "</s>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')


def model_folder(tokenizer: Path, folder: Path, tied: bool, rows: int | None = None) -> Path:
    """A random Llama with this tokenizer, in several shards."""
    rows = rows or len(AutoTokenizer.from_pretrained(tokenizer)) + PADDED
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **sizes)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="80KB")
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def config(place: Path, kind: str, model: Path, output: Path, **values: object) -> ExtendConfig:
    source = (
        {"pieces_from": str(place / "unigram_ja")} if kind == "unigram_en" else {"inputs": [str(place / "ja.jsonl")], "presplit": "mecab"}
    )
    return ExtendConfig.model_validate({"model": str(model), "output": str(output), "num_new_pieces": NUM_NEW} | source | values)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["unigram_en", "llama2", "byte_level"])
def test_a_model_gets_new_pieces(kind: str, tied: bool, place: Path, tmp_path: Path) -> None:
    source = model_folder(place / kind, tmp_path / "old", tied)
    folder = extend(config(place, kind, source, tmp_path / "new"))
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    first = len(before)
    assert len(after) == first + NUM_NEW
    assert [before.convert_ids_to_tokens(i) for i in range(first)] == [after.convert_ids_to_tokens(i) for i in range(first)]
    assert before.all_special_ids == after.all_special_ids

    def ids(tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for text in JAPANESE + ENGLISH:
        assert after.decode(ids(after, text)) == text
        if max(ids(after, text), default=0) < first:
            assert ids(after, text) == ids(before, text)
    assert sum(max(ids(after, text)) < first for text in ENGLISH) > 30
    shrunk = sum(len(ids(after, text)) for text in JAPANESE) / sum(len(ids(before, text)) for text in JAPANESE)
    assert shrunk < 0.8, shrunk
    used = {token for text in JAPANESE for token in ids(after, text)} & set(range(first, first + NUM_NEW))
    assert len(used) > 0.9 * NUM_NEW, len(used)

    # The rows are what they are said to be; everything else is as it was, bit for bit.
    old, new = tensors(source), tensors(folder)
    assert old.keys() == new.keys() and ("lm_head.weight" in old) != tied
    manifest = json.loads((folder / "extension.json").read_text())
    assert manifest["first_new_id"] == first and after.convert_ids_to_tokens(first + 7) == manifest["pieces"][7]
    for name in old:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(old[name], new[name])
            continue
        assert len(new[name]) == first + NUM_NEW and torch.equal(new[name][:first], old[name][:first])
        for k, piece in enumerate(manifest["pieces"]):
            expected = old[name][spelled(place / kind, piece)].float().mean(dim=0).to(torch.bfloat16)
            assert torch.equal(new[name][first + k], expected), piece

    old_model, new_model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, folder))
    assert new_model.config.vocab_size == first + NUM_NEW
    inputs = torch.tensor([ids(before, JAPANESE[0])[:20] + ids(before, ENGLISH[0])[:20]])
    torch.testing.assert_close(new_model(inputs).logits[..., :first], old_model(inputs).logits[..., :first])


def spelled(folder: Path, piece: str) -> list[int]:
    """The ids by which the old tokenizer spells a piece, found another way than `extend` does."""
    if folder.name == "byte_level":
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.pre_tokenizer = None  # the piece is in the bytes' alphabet already
        return list(backend.encode(piece).ids)
    engine = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    guard = engine.encode("a\n")  # keeps the dummy prefix of Llama 2 away from the piece
    ids = engine.encode("a\n" + piece.replace("▁", " "))
    assert ids[: len(guard)] == guard
    return list(ids[len(guard) :])


@pytest.mark.parametrize("kind", ["unigram_en", "llama2"])
def test_tokenizer_model_and_tokenizer_json_stay_together(kind: str, place: Path, tmp_path: Path) -> None:
    source = model_folder(place / kind, tmp_path / "old", True)
    folder = extend(config(place, kind, source, tmp_path / "new", num_new_pieces=600))
    engine = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    loaded = AutoTokenizer.from_pretrained(folder)
    same = [engine.encode(text) == loaded.encode(text, add_special_tokens=False) for text in JAPANESE + ENGLISH]
    assert sum(same) >= 0.98 * len(same)  # a unigram may differ where two ways score within rounding
    for piece in json.loads((folder / "extension.json").read_text())["pieces"]:
        assert engine.encode_as_pieces("\n" + piece.replace("▁", " "))[-1] == piece
    if kind == "llama2":  # a new merge comes after every old one
        scores = [engine.get_score(token) for token in range(259, engine.vocab_size())]
        assert max(scores[-600:]) < min(scores[:-600])


def test_our_own_tokenizer_still_opens(place: Path, tmp_path: Path) -> None:
    folder = extend(config(place, "unigram_en", model_folder(place / "unigram_en", tmp_path / "old", True), tmp_path / "new"))
    old, new = load(place / "unigram_en"), load(folder)
    assert new.vocab_size == old.vocab_size + NUM_NEW
    ids = new.render([{"role": "user", "content": "猫は <|end|>"}]).ids.tolist()
    assert new.decode(ids) == "<|user|>猫は <|end|><|end|>" and ids.count(old.end_of_turn_id) == 1
    assert (new.eod_id, new.end_of_turn_id, ids[0]) == (
        old.eod_id,
        old.end_of_turn_id,
        old.render([{"role": "user", "content": ""}]).ids[0],
    )


def test_spare_rows_are_used_up_first(place: Path, tmp_path: Path) -> None:
    source = model_folder(place / "byte_level", tmp_path / "old", False, rows=1_024)
    folder = extend(config(place, "byte_level", source, tmp_path / "new"))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 1_024
    old, new = tensors(source)["lm_head.weight"], tensors(folder)["lm_head.weight"]
    assert torch.equal(old[:802], new[:802]) and torch.equal(old[952:], new[952:]) and not torch.equal(old[802:952], new[802:952])


def test_an_index_and_its_total_follow(place: Path, tmp_path: Path) -> None:
    source = model_folder(place / "llama2", tmp_path / "old", False)
    folder = extend(config(place, "llama2", source, tmp_path / "new"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(folder).values())
    assert set(index["weight_map"].values()) == {file.name for file in folder.glob("*.safetensors")}


def test_an_interruption_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_folder(place / "llama2", tmp_path / "old", False)
    monkeypatch.setattr(extend_module, "_write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend(config(place, "llama2", source, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_merging_goes_on_where_it_stopped() -> None:
    """ "lo" is old; "low" comes next (6), then "er" (5), then "lower" out of both (3); "lw" occurs once and "xl" may not be."""
    words = [(["lo", "w"], 3), (["lo", "w", "e", "r"], 3), (["e", "r"], 2), (["l", "w"], 1), (["x", "l"], 9)]
    assert continue_merges(words, {"lo", "l", "w", "e", "r"}, 9) == ["low", "er", "lower"]
    assert continue_merges(words, {"lo", "l", "w", "e", "r"}, 1) == ["low"]
    assert continue_merges([(list("aaaa"), 5)], {"a", "aa"}, 9) == [], "a known piece is not merged anew"


def test_what_cannot_be_extended_is_explained(place: Path, tmp_path: Path) -> None:
    source = model_folder(place / "byte_level", tmp_path / "old", False)
    with pytest.raises(UserError, match=r"num_new_pieces \(100000\).*repeat only \d+"):
        extend(config(place, "byte_level", source, tmp_path / "new", num_new_pieces=100_000))
    with pytest.raises(UserError, match="inputs is missing"):
        extend(config(place, "byte_level", source, tmp_path / "new", inputs=[]))
    unigram = model_folder(place / "unigram_en", tmp_path / "unigram", False)
    with pytest.raises(UserError, match="pieces_from is missing.*mujina tokenizer"):
        extend(config(place, "byte_level", unigram, tmp_path / "new"))
    (unigram / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.json: is no byte-level BPE.*tokenizer.model beside"):
        extend(config(place, "byte_level", unigram, tmp_path / "new"))
    small = model_folder(place / "byte_level", tmp_path / "small", False, rows=700)
    with pytest.raises(UserError, match=r"embeddings of \[700\] rows do not fit a tokenizer of 802 pieces"):
        extend(config(place, "byte_level", small, tmp_path / "new"))
    shards = list(small.glob("*.safetensors"))
    shards[0].write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=rf"{shards[0]}: is not a safetensors file .*copy it again"):
        extend(config(place, "byte_level", small, tmp_path / "new"))
    for shard in shards:
        shard.unlink()
    with pytest.raises(UserError, match="no \\*.safetensors"):
        extend(config(place, "byte_level", small, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
