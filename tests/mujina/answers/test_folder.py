"""Answers of a folder, against greedy decoding by hand and known distributions."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mujina.answers import Answer, Conversation, FolderAnswerer, Message, Sampling, open_answerer, question
from mujina.answers import folder as folder_answers
from mujina.user_input import UserError
from tests.chat_folder import WORDS, save_chain, save_random

GREEDY = Sampling(max_new_tokens=8)
LONG = [question(text) for text in ("one", "one two three four five one two", "two three", "four four four four", "five")] + [
    Conversation(tuple(Message(role=role, content=text) for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))))
]


def greedily(folder: Path, max_new_tokens: int = 8) -> Answer:
    [[answer]] = open_answerer(str(folder)).answer([question("five")], Sampling(max_new_tokens))
    return answer


def test_stops_at_the_end_of_the_turn(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "<|end|>", "<|end|>": "three"})
    assert greedily(folder) == Answer("one two", "stop", num_prompt_tokens=4, num_answer_tokens=3)


def test_stops_at_the_end_of_the_sequence(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "</s>", "</s>": "three"})
    assert greedily(folder) == Answer("one", "stop", 4, 2)


@pytest.mark.parametrize("place", ["template", "generation_config", "list"])
def test_stops_at_the_end_of_turn_of_any_family(tmp_path: Path, place: str) -> None:
    """Told by the template that writes it behind an answer, or by the folder's list of what ends one."""
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "<|system|>", "<|system|>": "three"})
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the family has no <|end|>, and <|system|> has another part
        (folder / name).write_text((folder / name).read_text().replace("<|end|>", "<|over|>"))
    if place == "template":
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|end|>", "<|system|>"))
    else:
        asked = {"eos_token_id": WORDS.index("<|system|>") if place == "generation_config" else [1, WORDS.index("<|system|>")]}
        (folder / "generation_config.json").write_text(json.dumps(asked))
    assert greedily(folder).text == "one" and greedily(folder).stopped


def test_a_template_that_fails_is_told_and_one_that_wants_a_system_turn_has_its_end(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "<|system|>", "<|system|>": "three"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|end|>", "<|over|>"))
    path = folder / "chat_template.jinja"
    first = "{% if messages[0].role != 'system' %}{{ raise_exception('first') }}{% endif %}"
    path.write_text(first + path.read_text().replace("<|end|>", "<|system|>"))
    conversation = Conversation((Message(role="system", content="two"), *question("five").messages))
    [[answer]] = open_answerer(str(folder)).answer([conversation], GREEDY)
    assert (answer.text, answer.finish_reason) == ("one", "stop")
    path.write_text("{{ 1 / 0 }}")
    with pytest.raises(UserError, match=r"its chat template fails \(ZeroDivisionError: division by zero\): mend chat_template.jinja"):
        greedily(folder)


def test_a_prompt_beyond_the_context_is_told(tmp_path: Path) -> None:
    """The context is 64 tokens; the template adds three to the prompt."""
    answerer = open_answerer(str(save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "one"})))
    with pytest.raises(UserError, match=r"prompt 'five five.*' has 64 tokens, .* holds 64 together with the answer: shorten it"):
        list(answerer.answer([question("five " * 61)], GREEDY))
    [[long], [short]] = answerer.answer([question("five " * 55), question("five")], GREEDY)
    assert (long.finish_reason, long.num_answer_tokens) == ("context", 6) and not long.stopped
    assert (short.finish_reason, short.num_answer_tokens) == ("length", 8)


def test_a_base_model_completes_plain_text(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"five": "one", "one": "two", "two": "</s>"})
    (folder / "chat_template.jinja").unlink()
    answerer = open_answerer(str(folder), completes=True)
    [[answer]] = answerer.answer([question("four five")], GREEDY)
    assert answer == Answer("one two", "stop", num_prompt_tokens=2, num_answer_tokens=3)
    with pytest.raises(UserError, match="a prompt without a token"):
        list(answerer.answer([question("")], GREEDY))


def test_says_when_the_answer_was_cut_off(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "one", "one": "two", "two": "one"})
    answer = greedily(folder, 4)
    assert answer == Answer("one two one two", "length", 4, 4) and not answer.stopped


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    assert greedily(save_chain(tmp_path, {"<|assistant|>": "<|end|>"})) == Answer("", "stop", 4, 1)


def test_role_tokens_in_an_answer_are_seen(tmp_path: Path) -> None:
    folder = save_chain(tmp_path, {"<|assistant|>": "<|user|>", "<|user|>": "one", "one": "<|end|>"})
    assert "<|user|>" in greedily(folder).text


def by_hand(folder: Path, conversation: Conversation, max_new_tokens: int) -> Answer:
    """The answer without batches, padding, masks or caches: the likeliest token, again and again."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    messages = [message.model_dump() for message in conversation.messages]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    said: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(torch.tensor([ids + said])).logits[0, -1].argmax().item()
        if WORDS[token] in ("<|end|>", "</s>"):
            return Answer(tokenizer.decode(said), "stop", len(ids), len(said) + 1)
        said.append(token)
    return Answer(tokenizer.decode(said), "length", len(ids), len(said))


def test_padding_changes_no_answer_and_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path)
    expected = [by_hand(tmp_path, conversation, 6) for conversation in LONG]
    assert len({answer.text for answer in expected}) > 3  # the answers do depend on the prompts
    monkeypatch.setattr(folder_answers, "BATCH_SIZE", 4)
    assert [found for [found] in FolderAnswerer(tmp_path).answer(LONG, Sampling(6))] == expected


def test_draws_have_the_models_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_answers, "BATCH_SIZE", 1500)
    probabilities = {"one": 0.64, "two": 0.16, "three": 0.15, "<|end|>": 0.05}
    answerer = FolderAnswerer(save_chain(tmp_path, {"<|assistant|>": probabilities}))

    def shares(**changes: float) -> dict[str, float]:
        [found] = answerer.answer([question("five")], Sampling(1, num_answers=1500, **changes))
        return {word: count / 1500 for word, count in Counter(answer.text for answer in found).items()}

    # Of 1500 draws a share of one half varies by .013 (standard deviation).
    assert shares(temperature=1.0) == pytest.approx({"one": 0.64, "two": 0.16, "three": 0.15, "": 0.05}, abs=0.05)
    roots = {word: probability**0.5 for word, probability in probabilities.items()}
    expected = {word.replace("<|end|>", ""): root / sum(roots.values()) for word, root in roots.items()}
    assert shares(temperature=2.0) == pytest.approx(expected, abs=0.05)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx({"one": 0.8, "two": 0.2}, abs=0.05)


def test_a_draw_depends_on_neither_batch_nor_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer, drawn = FolderAnswerer(save_random(tmp_path)), Sampling(6, temperature=4.0, num_answers=3, seed=7)
    found = list(answerer.answer(LONG, drawn))
    assert len({answer.text for few in found for answer in few}) > 10
    monkeypatch.setattr(folder_answers, "BATCH_SIZE", 5)  # cuts the answers to one conversation apart
    assert list(answerer.answer(LONG[::-1], drawn)) == found[::-1]
    assert list(answerer.answer(LONG[2:3], drawn)) == found[2:3]
    assert list(answerer.answer(LONG, Sampling(6, temperature=4.0, num_answers=3, seed=8))) != found


def test_answers_come_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = FolderAnswerer(save_chain(tmp_path, {"<|assistant|>": "one", "one": "<|end|>"}))
    monkeypatch.setattr(folder_answers, "BATCH_SIZE", 2)
    found = answerer.answer(LONG, GREEDY)
    next(found)
    answerer._model = None  # the second answer is of the first batch, the third would need the model
    assert next(found)[0].text == "one"
    with pytest.raises(AttributeError):
        next(found)
    assert list(answerer.answer([], GREEDY)) == []


def test_a_folder_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json.*mujina convert"):
        open_answerer(str(tmp_path / "nowhere"))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    save_chain(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        open_answerer(str(tmp_path))


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    save_chain(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        open_answerer(str(tmp_path))


def test_a_tokenizer_without_a_token_to_stop_at(tmp_path: Path) -> None:
    save_chain(tmp_path, {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("<|end|>", "<|over|>"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="neither its tokenizer nor its generation_config.json names a token that ends an answer"):
        open_answerer(str(tmp_path))
