"""Hugging Face chat folders so small that every answer is known: a word's successor is a table's, or the weights are random."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        bos_token_id=0,
        eos_token_id=1,
    )


def save_chain(folder: Path, follows: dict[str, str | dict[str, float]]) -> Path:
    """A model that says `follows[word]` after `word`, or draws from its {word: probability}.

    Embeddings are one-hot, the layers add nothing, the output layer holds the table. The normalized embedding is the square root of its
    width, by which the table is divided, so that it holds logits.
    """
    model = LlamaForCausalLM(config(hidden_size=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        for number in range(len(WORDS)):
            model.model.embed_tokens.weight[number, number] = 1.0
        for word, following in follows.items():
            if isinstance(following, str):
                model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 1.0
                continue
            model.lm_head.weight[:, WORDS.index(word)] = -100.0
            for name, probability in following.items():
                model.lm_head.weight[WORDS.index(name), WORDS.index(word)] = torch.tensor(probability).log() / 4
    # What a folder asks for in its generation configuration must not matter.
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=1, no_repeat_ngram_size=1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_random(folder: Path) -> Path:
    """A model of random weights, whose answers depend on the whole prompt."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_dict(config(32).to_dict() | {"initializer_range": 1.0})).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
