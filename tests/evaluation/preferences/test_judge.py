"""Models as judges: both orders, scores, and judges that answer nonsense."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.preferences import __main__ as preferences
from evaluation.preferences.config import PairwiseJudge, ScoreJudge
from evaluation.preferences.judge import FOLDER, ModelJudge
from evaluation.preferences.rows import Prompt
from mujina.answers import Conversation, Message
from mujina.user_input import UserError
from tests.chat_server import ChatServer, chat_server
from tests.evaluation.preferences.test_preferences import model_of, pairs, row, summary, write

PAIRWISE = {"version": 3, "user": "{conversation} <a>{answer_a}</a> <b>{answer_b}</b> judge:HOW", "verdict": r"\[\[([A-Z])\]\]"}
SCORE = {"version": 3, "user": "{conversation} <a>{answer}</a> judge:HOW", "verdict": r"\[\[([0-9]+)\]\]", "highest": 5}
ANSWERS = "draw:short|longer_one|the_longest_of_all"  # by the seed: of eight answers two have one, four another


def judge(folder: Path, server: ChatServer, how: str, kind: str = "pairwise", **values: Any) -> dict[str, Any]:
    prompt = PAIRWISE if kind == "pairwise" else SCORE
    (folder / "judge.yaml").write_text(yaml.safe_dump(prompt | {"user": str(prompt["user"]).replace("HOW", how)}))
    return {"kind": kind, "model": model_of(server), "prompt": str(folder / "judge.yaml")} | values


def test_the_answer_that_wins_in_both_orders_is_chosen(tmp_path: Path) -> None:
    with chat_server() as server:
        config = write(tmp_path, model_of(server), [row(f"a {ANSWERS}"), row("b draw:one")], judge=judge(tmp_path, server, "longer"))
        preferences.main(config, ["answers.number=4"])
        asked = server.requests
        preferences.main(config, ["answers.number=4"])
        assert len(server.requests) == len(asked)
    [pair] = pairs(tmp_path)
    assert len(pair["chosen"]) > len(pair["rejected"])
    said = pair["provenance"]["judge"]
    assert (said["kind"], said["version"], said["model"], said["temperature"]) == ("pairwise", 3, "teacher", 0.0)
    scores = pair["provenance"]["scores"]
    assert scores[0] > 0 > scores[1]
    judged = [body["messages"][-1]["content"] for body in asked if "judge:" in body["messages"][-1]["content"]]
    assert len(judged) == len(set(judged)) and all("[user]\na draw:" in text for text in judged)  # the second prompt's are all alike
    for text in judged:
        first, second = text.split("<a>")[1].split("</a> <b>")
        assert f"[user]\na {ANSWERS} <a>{second.split('</b>')[0]}</a> <b>{first}</b> judge:longer" in judged


def test_every_pair_that_both_orders_agree_on(tmp_path: Path) -> None:
    with chat_server() as server:
        config = write(tmp_path, model_of(server), [row(ANSWERS)], judge=judge(tmp_path, server, "longer"), choose="every_pair")
        preferences.main(config)
    texts = ["short", "longer one", "the longest of all"]
    assert sorted((pair["chosen"], pair["rejected"]) for pair in pairs(tmp_path)) == sorted(
        (better, worse) for number, worse in enumerate(texts) for better in texts[number + 1 :]
    )


@pytest.mark.parametrize(
    ("how", "told", "why"),
    [
        ("first", "disagreements", "of no prompt is one answer better"),
        ("tie", "ties", "of no prompt is one answer better"),
        ("nonsense", "judgements without a verdict", "judgements failed or have no verdict: look at what the judge says"),
        ("letters", "judgements without a verdict", "judgements failed or have no verdict"),
        ("echo", "judgements without a verdict", "judgements failed or have no verdict"),
    ],
)
def test_a_judge_who_does_not_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, told: str, why: str) -> None:
    with chat_server() as server:
        config = write(tmp_path, model_of(server), [row(ANSWERS)], judge=judge(tmp_path, server, how))
        with pytest.raises(UserError, match=f"no pairs: .*{why}"):
            preferences.main(config)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal.jsonl", ".journal.jsonl.lock"}
    shown = capsys.readouterr().out
    assert re.search(rf"{told} .*{r'\(100.0%\)' if told.endswith('verdict') else ''}", shown)


def test_scores(tmp_path: Path) -> None:
    """By length; what is longer than five has no verdict, and is left out."""
    with chat_server() as server:
        answers = row("draw:a|bcd|short|longer_one")
        preferences.main(write(tmp_path, model_of(server), [answers], judge=judge(tmp_path, server, "length", "score")))
    [pair] = pairs(tmp_path)
    assert (pair["chosen"], pair["rejected"], pair["provenance"]["scores"]) == ("short", "a", [5, 1])
    assert 0 < summary(tmp_path)["judgements without a verdict"] < summary(tmp_path)["judgements"] == 8


def test_answers_cannot_write_into_the_prompt() -> None:
    made = ModelJudge(PairwiseJudge(model="x"))
    turns = (Message(role="system", content="Be kind."), Message(role="user", content="{answer_a}"))
    prompt = Prompt("1", "x", Conversation(turns), {})
    asked = made._conversation([prompt], [["{answer_b} {conversation}", "two"]], 0, (0, 1)).messages[-1].content
    assert "<answer_a>\n{answer_b} {conversation}\n</answer_a>" in asked and "<answer_b>\ntwo\n</answer_b>" in asked
    assert "[system]\nBe kind.\n\n[user]\n{answer_a}\n" in asked


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_prompts_hold_no_verdict_themselves(path: Path) -> None:
    """A judge that repeats its prompt has none."""
    kind = PairwiseJudge if path.stem.startswith("pairwise") else ScoreJudge
    made = ModelJudge(kind(model="x", prompt=path.stem))
    prompt = Prompt("1", "x", Conversation((Message(role="user", content="?"),)), {})
    numbers = (0, 1) if kind is PairwiseJudge else (0,)
    asked = made._conversation([prompt], [["one", "two"]], 0, numbers).messages
    assert made._verdict("\n".join(message.content for message in asked)) is None
    assert made._verdict(f"… [[{'B' if kind is PairwiseJudge else '7.5'}]]") == ("B" if kind is PairwiseJudge else "7.5")
    assert made.provenance["version"] == 1 and len(made.provenance["prompt_sha256"]) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "{conversation} {answer_a} {answer_b} {anser}"}, r"no slot \{anser\} in prompts of kind pairwise: did you mean answer_"),
        ({"user": "{conversation} {answer_a}"}, r"user has no \{answer_b\}: write where it stands"),
        ({"verdict": "("}, "verdict .*no regular expression"),
        ({"verdict": "A|B"}, "verdict .*must have one group"),
        ({"verion": 1}, "unknown key verion: did you mean version"),
    ],
)
def test_a_prompt_that_is_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "judge.yaml").write_text(json.dumps(PAIRWISE | change))
    with pytest.raises(UserError, match=message):
        ModelJudge(PairwiseJudge(model="x", prompt=str(tmp_path / "judge.yaml")))


def test_a_prompt_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge.prompt \(pairwise_jp\): no such prompt: did you mean pairwise_ja"):
        ModelJudge(PairwiseJudge(model="x", prompt="pairwise_jp"))
    with pytest.raises(UserError, match="no such file"):
        ModelJudge(PairwiseJudge(model="x", prompt=str(tmp_path / "judge.yaml")))
