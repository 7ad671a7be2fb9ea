"""Models of others: what training did not change comes back, other layouts of their files are read, and what contradicts itself is told."""

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs import config as configuration
from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.conversion import convert, import_hf, upcycle
from megatron_jobs.conversion.families import family_of
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.conversion.model_card import escaped
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE
from tests.megatron_jobs.test_train import train_here
from tests.ranks import run_ranks
from tokenization.load import load as load_tokenizer

SPECIAL = ["<s>", "</s>", "<pad>", "<|eom|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.1)
SIZES |= dict(vocab_size=270, bos_token_id=0, eos_token_id=1, pad_token_id=2)
SAMPLING = dict(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
GENERATION = SAMPLING | dict(bos_token_id=0, eos_token_id=[1, 3, 5])
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def save_model(folder: Path, model_type: str, **values: Any) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | values), dtype=torch.float32)
    model.generation_config = GenerationConfig(**GENERATION)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE one whose turns end with <|im_end|>, its eos_token; config.json's is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({piece: token for token, piece in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    named = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "added_tokens.json").write_text(json.dumps({piece: token for token, piece in enumerate(SPECIAL)}))


def run_of(root: Path, name: str, **values: Any) -> RunConfig:
    """Two steps of 8 × 32 tokens from the import `root`/NAME/in, as a user writes them."""
    phase = dict(name="only", tokens=2 * 8 * 32, sequence_length=32, global_batch_size=8, sources={"web": 1.0})
    phase["learning_rate"] = dict(start=1e-4, end=0.0)
    sections = dict(
        extends=str(root / name / "in/model.yaml"),
        run=str(root / name / "run"),
        end_of_document="</s>",
        data=dict(folder=str(root / "data"), block_length=64),
        train=dict(micro_batch_size=2, precision="fp32", checkpoint_interval=1),
        phases=[phase],
    )
    (root / f"{name}.yaml").write_text(yaml.safe_dump(sections | values))
    return configuration.load(root / f"{name}.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """`long` and `short`, models of contexts longer and shorter than the run's: model, import, run, and what the run is converted into.

    `long` also as a mixture that is upcycled from it.
    """
    root = tmp_path_factory.mktemp("trained")
    for name, context in (("long", 131_072), ("short", 16)):
        save_tokenizer(save_model(root / name / "model", "llama", max_position_embeddings=context))
    rows = [{"text": f"number {n}, and after it comes {n + 1}"} for n in range(200)]
    (root / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"web": {"documents": [str(root / "web.jsonl")], "kind": "web"}}
    settings = {"tokenizer": str(root / "long/model"), "end_of_document": "</s>", "output": str(root / "data"), "sources": sources}
    prepare(PrepareConfig.model_validate(settings))
    run_ranks(1, go, root)
    return root


def go(root: Path) -> None:
    import_hf.main(root / "long/model", root / "long/in")
    train_here(run_of(root, "long"), 1)
    shutil.move(root / "long/model/config.json", root / "away")  # nothing is asked of it again
    train_here(run_of(root, "long"))
    convert.main(root / "long/run/checkpoints/latest", root / "long/hf")
    shutil.move(root / "away", root / "long/model/config.json")
    import_hf.main(root / "short/model", root / "short/in", None, True, True)
    start = {"train": dict(micro_batch_size=2, precision="fp32", init_from=str(root / "short/in/checkpoints/latest"))}
    train_here(run_of(root, "short", **start))
    convert.main(root / "short/run/checkpoints/latest", root / "short/hf", True)
    run_of(root, "long", moe=MOE, train=dict(micro_batch_size=2, precision="fp32", init_from=None))
    upcycle.main(root / "long.yaml", root / "long/model", root / "long/mixture", True)


def test_what_training_did_not_change_comes_back(trained):
    before, after = (AutoConfig.from_pretrained(trained / "long" / name) for name in ("model", "hf"))
    assert after.max_position_embeddings == 131_072
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (0, 1, 2)
    unlike = {key for key, value in before.to_dict().items() if after.to_dict().get(key) != value} - {"_name_or_path"}
    assert unlike == set()
    generation = json.loads((trained / "long/hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 3, 5] and generation.items() >= SAMPLING.items() and generation["bos_token_id"] == 0
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer.json"):
        assert (trained / "long/hf" / name).read_bytes() == (trained / "long/model" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(trained / "long/hf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<|im_end|>", "<pad>")
    origin = Checkpoint(trained / "long/run/checkpoints/latest").ledger.origin
    assert origin.kind == "imported" and origin.hugging_face["config"]["bos_token_id"] == 0


def test_a_longer_context_is_merged(trained):
    assert AutoConfig.from_pretrained(trained / "short/hf").max_position_embeddings == 32
    assert AutoTokenizer.from_pretrained(trained / "short/hf").model_max_length == 32
    assert json.loads((trained / "short/hf/generation_config.json").read_text()).items() >= SAMPLING.items()


def test_a_mixture_has_what_the_dense_model_had(trained):
    config = AutoConfig.from_pretrained(trained / "long/mixture")
    assert (config.model_type, config.max_position_embeddings, config.bos_token_id, config.pad_token_id) == ("mixtral", 131_072, 0, 2)
    generation = json.loads((trained / "long/mixture/generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 3, 5] and generation["temperature"] == 0.6


def test_a_family_stays_itself_where_it_can():
    model = configuration.ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=8
    )
    assert family_of(model, None, "mistral") == "mistral" and family_of(model, None, "qwen2") == "llama"
    assert family_of(model, configuration.MoEConfig(**MOE), "mistral") == "mixtral"


def test_the_end_of_documents_is_told_and_chosen(trained, tmp_path, capsys):
    folder = trained / "long/model"
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eod_id, tokenizer.end_of_turn_id) == (5, 5)
    assert 'write end_of_document: "</s>"' in tokenizer.remark
    sources = {"web": {"documents": [str(trained / "web.jsonl")], "kind": "web"}}
    prepare(PrepareConfig.model_validate({"tokenizer": str(folder), "output": str(tmp_path), "sources": sources}))
    assert tokenizer.remark in capsys.readouterr().err
    chosen = load_tokenizer(folder, "</s>")
    assert (chosen.eod_id, chosen.end_of_turn_id, chosen.remark) == (1, 5, None) and chosen.hash != tokenizer.hash
    with pytest.raises(UserError, match=r"end_of_document \(</t>\) is no piece of tokenizer.json: did you mean </s>"):
        load_tokenizer(folder, "</t>")
    manifest = json.loads((trained / "data/web.json").read_text())
    assert manifest["end_of_document"] == "</s>"
    with pytest.raises(AssertionError, match="prepare the source again .* with begin_documents: auto and end_of_document"):
        run_ranks(1, train_here, run_of(trained, "long", end_of_document=None, run=str(trained / "other")))


@pytest.mark.parametrize("damage", ["gone", "changed", "unchecked"])
def test_there_already_is_said_of_what_was_written_and_compared(trained, tmp_path, capsys, damage):
    checkpoint, output = trained / "long/run/checkpoints/latest", tmp_path / "hf"
    shutil.copytree(trained / "long/hf", output)
    (output / "README.md").write_text("more about it")  # a card may be written on
    convert.main(checkpoint, output)
    assert "is there already" in capsys.readouterr().out
    weights = output / "model.safetensors"
    before = weights.read_bytes()
    if damage == "gone":
        weights.unlink()
    elif damage == "changed":
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    else:
        record = json.loads((output / convert.RECORD).read_text())
        (output / convert.RECORD).write_text(json.dumps(record | {"agreement": None}))
        convert.main(checkpoint, output, True)
        assert "is there already" in capsys.readouterr().out  # for who does not ask for the comparison
    assert not convert.is_written(output, Checkpoint(checkpoint).identity, no_check=False)
    if damage != "unchecked":
        convert.main(checkpoint, output, True)
        assert "it is converted again" in capsys.readouterr().out and weights.read_bytes() == before


def test_the_preset_names_no_folder_relative_to_another(trained):
    preset = yaml.safe_load((trained / "long/in/model.yaml").read_text())
    assert Path(preset["tokenizer"]).is_absolute() and Path(preset["train"]["init_from"]).is_absolute()


def test_a_card_spells_labels_as_they_are():
    assert escaped("a|b\n<i>*x*</i> `c` [d](e) &lt; web_ja _f_") == (r"a\|b \<i\>\*x\*\</i\> \`c\` \[d\](e) \&lt; web_ja \_f\_")


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    models_ = {
        "tied": save_model(root / "tied", "llama", tie_word_embeddings=True),
        "llama": save_model(root / "llama", "llama"),
        "mixtral": save_model(root / "mixtral", "mixtral", **EXPERTS),
        "qwen3_moe": save_model(root / "qwen3_moe", "qwen3_moe", **EXPERTS, moe_intermediate_size=24, head_dim=8),
    }
    for folder in models_.values():
        save_tokenizer(folder)
    return models_


Tensors = dict[str, torch.Tensor]


def with_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def fused(tensors: Tensors) -> Tensors:
    """The experts of a layer in one tensor, and the router beside them, as the modules of transformers 5 have them."""
    model = {name: tensor for name, tensor in tensors.items() if ".experts." not in name and ".block_sparse_moe.gate." not in name}
    names = ("w1", "w3", "w2") if any(".w1." in name for name in tensors) else ("gate_proj", "up_proj", "down_proj")
    for layer in range(2):
        here = f"model.layers.{layer}"
        block = "block_sparse_moe" if names[0] == "w1" else "mlp"
        gate, up, down = (torch.stack([tensors[f"{here}.{block}.experts.{n}.{name}.weight"] for n in range(4)]) for name in names)
        model |= {f"{here}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1), f"{here}.mlp.experts.down_proj": down}
        model[f"{here}.mlp.gate.weight"] = tensors[f"{here}.{block}.gate.weight"]
    return model


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "tied with its head": ("tied", with_head, "lm_head.weight is the embedding by another name"),
    "tied as its head alone": (
        "tied",
        lambda tensors: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()},
        "lm_head.weight is the embedding by another name",
    ),
    "compiled": ("llama", lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, "such as _orig_mod."),
    "compiled layers": (
        "llama",
        lambda tensors: {name.replace(".self_attn.", "._orig_mod.self_attn."): tensor for name, tensor in tensors.items()},
        "._orig_mod.self_attn",
    ),
    "DDP": ("llama", lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()}, "21 tensors .* such as module."),
    "doubled": ("llama", lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()}, "such as model.lm_head.weight as"),
    "bare": ("tied", lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, "as model.embed_tokens"),
    "fused": ("mixtral", fused, "the experts of 2 layers are read out of down_proj and gate_up_proj"),
    "fused qwen3": ("qwen3_moe", fused, "the experts of 2 layers are read out of down_proj and gate_up_proj"),
}


def laid_out(source: Path, folder: Path, change: Callable[[Tensors], Tensors], as_bin: bool = False) -> Path:
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, folder / "model.safetensors", {"format": "pt"})
    return folder


def same_model(one: Path, other: Path) -> bool:
    a, b = HuggingFaceFolder(one), HuggingFaceFolder(other)
    assert a.tensors.keys() == b.tensors.keys()
    return all(a.tensors[name][:].equal(b.tensors[name][:]) for name in a.tensors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_of_the_same_tensors_are_read(stock, tmp_path, name):
    source, change, remark = LAYOUTS[name]
    for as_bin in (False, True):
        folder = laid_out(stock[source], tmp_path / str(as_bin), change, as_bin)
        assert same_model(folder, stock[source])
        opened = HuggingFaceFolder(folder)
        assert re.search(remark, "\n".join(opened.tensors.remarks))
        box = Box(3, 9, 1, 5)
        matrix = "layers.1.experts.2.up" if "fused" in name else "layers.1.up"
        assert opened.read(matrix, box).equal(HuggingFaceFolder(stock[source]).read(matrix, box))


def test_other_layouts_pass_the_gate(stock, tmp_path):
    folders = {}
    for number, name in enumerate(("tied with its head", "fused", "compiled")):
        source, change, _ = LAYOUTS[name]
        folders[str(number)] = laid_out(stock[source], tmp_path / f"model-{number}", change, as_bin=number == 2)
    run_ranks(1, import_all, folders, tmp_path)


def import_all(folders: dict[str, Path], root: Path) -> None:
    for name, folder in folders.items():
        import_hf.main(folder, root / name)


def in_shards(source: Path, folder: Path, change: Callable[[list[Tensors], dict[str, str]], None]) -> Path:
    """The model in two files and an index, after `change` of both."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = [{name: tensors[name] for name in half} for half in (names[::2], names[1::2])]
    index = {name: f"model-{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
    change(shards, index)
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


NORM = "model.norm.weight"


def twice(shards: list[Tensors], index: dict[str, str], more: float = 0.0) -> None:
    has, other = sorted(shards, key=lambda shard: NORM not in shard)
    other[NORM] = has[NORM] + more


def test_a_tensor_in_two_shards_counts_once(stock, tmp_path):
    assert same_model(in_shards(stock["llama"], tmp_path / "model", twice), stock["llama"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda shards, index: twice(shards, index, 1.0), rf"{NORM} is there twice with other values .* remove the file"),
        (
            lambda shards, index: index.update({NORM: "model-1.safetensors"}),
            rf"index says that {NORM} is in model-1.* not there: copy both",
        ),
        (lambda shards, index: index.pop(NORM), rf"model-0.safetensors: holds {NORM}, of which the index says nothing"),
        (lambda shards, index: index.update({NORM: "../x"}), "has no weight_map of tensors to files beside it"),
    ],
    ids=["differs", "elsewhere", "unnamed", "outside"],
)
def test_files_that_disagree_are_refused_by_name(stock, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(in_shards(stock["llama"], tmp_path / "model", change))


@pytest.mark.parametrize("value, told", [(float("nan"), "2 NaN and 0 Inf"), (float("-inf"), "0 NaN and 2 Inf")])
def test_what_is_not_finite_is_refused_by_name_and_count(stock, tmp_path, value, told):
    def spoiled(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = value
        return tensors

    folder = laid_out(stock["llama"], tmp_path / "model", spoiled)
    with pytest.raises(UserError, match=rf"model.layers.1.mlp.up_proj.weight holds {told} among 3,840 values"):
        import_hf.main(folder, tmp_path / "in", None, True)


def test_a_head_of_its_own_in_a_tied_model_is_refused(stock, tmp_path):
    folder = laid_out(stock["tied"], tmp_path / "model", lambda tensors: with_head(tensors) | {"lm_head.weight": torch.ones(270, 48)})
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight, .* write false there"):
        HuggingFaceFolder(folder)


def test_a_bin_file_with_more_than_tensors_is_refused(stock, tmp_path):
    shutil.copytree(stock["llama"], tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    (tmp_path / "model/model.safetensors").unlink()
    for content, message in (
        (tensors | {"trained_by": "me"}, "holds trained_by, which is no tensor"),
        ({"run": Fraction(1), **tensors}, "holds more than tensors"),  # megatron-core lets paths pass
        ({3: torch.ones(2)}, "holds 3, which is no tensor with a name"),
        ([1], "holds a list and no tensors"),
        (b"no pickle", "is damaged"),
    ):
        if isinstance(content, bytes):
            (tmp_path / "model/pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, tmp_path / "model/pytorch_model.bin")
        with pytest.raises(UserError, match=f"{message}.* save_pretrained"):
            HuggingFaceFolder(tmp_path / "model")
