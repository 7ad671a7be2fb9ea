"""A model whose next token is a fixed function of the current one, so that every answer is known;
and a random one for padding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation import generate
from evaluation.generate import Answer, answers
from mujina.user_input import UserError

WORDS = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "zero", "one", "two", "three", "four", "five"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="zero"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = WORDS[2:6]
    # The padding token is the end of the turn: a mask made from padding ids would then hide the ends of turns in the prompt.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<|end|>", additional_special_tokens=roles
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def config(hidden_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )


def save_chain(folder: Path, follows: dict[str, str]) -> Path:
    """A model that says `follows[word]` after `word`: embeddings are one-hot, the layers add nothing, the output layer holds the table."""
    model = LlamaForCausalLM(config(hidden_size=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        for number in range(len(WORDS)):
            model.model.embed_tokens.weight[number, number] = 1.0
        for word, following in follows.items():
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 1.0
    # What a folder asks for in its generation configuration must not matter.
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=1, no_repeat_ngram_size=1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def ask(*words: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": word}] for word in words]


def test_stops_at_the_end_of_the_turn(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "<|end|>", "<|end|>": "three"})
    assert answers(folder, ask("five"), 8) == [Answer("one two", stopped=True)]


def test_stops_at_the_end_of_the_sequence(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "</s>", "</s>": "three"})
    assert answers(folder, ask("five"), 8) == [Answer("one", stopped=True)]


def test_says_when_the_answer_was_cut_off(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "one"})
    assert answers(folder, ask("five"), 4) == [Answer("one two one two", stopped=False)]


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "<|end|>"})
    assert answers(folder, ask("five"), 4) == [Answer("", stopped=True)]


def test_role_tokens_in_an_answer_are_seen(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "<|user|>", "<|user|>": "one", "one": "<|end|>"})
    assert "<|user|>" in answers(folder, ask("five"), 8)[0].text


def greedy(folder: Path, conversation: list[dict[str, str]], max_new_tokens: int) -> Answer:
    """The answer without batches, padding, masks or caches: the likeliest token, again and again."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    said: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(torch.tensor([ids + said])).logits[0, -1].argmax().item()
        if WORDS[token] in ("<|end|>", "</s>"):
            return Answer(tokenizer.decode(said), stopped=True)
        said.append(token)
    return Answer(tokenizer.decode(said), stopped=False)


def test_padding_changes_no_answer_and_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_dict(config(32).to_dict() | {"initializer_range": 1.0})).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    conversations = ask("one", "one two three four five one two", "two three", "four four four four", "five") + [
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    ]
    expected = [greedy(tmp_path, conversation, 6) for conversation in conversations]
    assert len({answer.text for answer in expected}) > 3  # the answers do depend on the prompts
    monkeypatch.setattr(generate, "BATCH_SIZE", 4)
    assert answers(tmp_path, conversations, 6) == expected


def test_the_command_prints_prompts_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "one"})
    generate.main(folder, ["five", "four"], max_new_tokens=2)
    assert capsys.readouterr().out == "> five\none two … (cut off after 2 tokens)\n\n> four\none two … (cut off after 2 tokens)\n\n"


def test_a_folder_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json.*mujina convert"):
        answers(tmp_path / "nowhere", ask("one"), 4)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    save_chain(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        answers(tmp_path, ask("one"), 4)


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    save_chain(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        answers(tmp_path, ask("one"), 4)


def test_a_tokenizer_without_a_token_to_stop_at(tmp_path: Path) -> None:
    save_chain(tmp_path, {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("<|end|>", "<|over|>"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"neither <\|end\|> nor"):
        answers(tmp_path, ask("one"), 4)


def test_no_new_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_new_tokens \(0\)"):
        answers(tmp_path, ask("one"), 0)


@pytest.mark.parametrize("module", ["generate", "arithmetic", "report"])
def test_importing_the_commands_is_light(module: str) -> None:
    """`--help` answers at once: none of the heavy libraries is imported with the module."""
    code = f"import sys, evaluation.{module}; sys.exit(str({{'torch', 'transformers', 'numpy'}} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert not done.stderr.strip()
