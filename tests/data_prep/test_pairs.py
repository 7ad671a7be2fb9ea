"""Pairs of answers in the forms of public data sets, and what is none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.indexed import open_binary
from data_prep.pairs import turns_of
from data_prep.prepare import PrepareConfig, prepare
from mujina.user_input import UserError
from tokenization.load import load

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Be kind."}
EARLIER = [USER, {"role": "assistant", "content": "four"}, {"role": "user", "content": "In digits?"}]
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "ours": ({"messages": [USER], "chosen": "4", "rejected": "5"}, [USER]),
    "texts": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, [USER]),
    "ultrafeedback": ({"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0}, [USER]),
    "trl": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    "trl, a turn": ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, [USER]),
    "trl, without a prompt": ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
    "several turns": ({"prompt": "2 + 2?", "messages": EARLIER, "chosen": [GOOD], "rejected": [*EARLIER, BAD]}, EARLIER),
    "our steps'": ({"messages": [USER, GOOD, BAD]}, [USER]),
    "equal": ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, [USER]),
}


@pytest.mark.parametrize("form", FORMS)
def test_public_forms(form):
    fields, prompt = FORMS[form]
    assert turns_of(fields) == [*prompt, GOOD, GOOD if form == "equal" else BAD]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": "x", "chosen": "4"}, "`rejected` is no answer"),
        ({"prompt": "x", "chosen": 4, "rejected": "5"}, "`chosen`"),
        ({"prompt": "x", "chosen": [], "rejected": "5"}, "`chosen` is no answer"),
        ({"chosen": "4", "rejected": "5"}, "has no prompt"),
        (
            {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
            "`chosen` is not one turn of the assistant behind the prompt",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "`chosen` is not one turn"),
        ({"prompt": [USER], "chosen": [None], "rejected": [BAD]}, "`chosen` is not one turn"),
        ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "`prompt`"),
        ({"messages": [USER, GOOD]}, "`chosen` is no answer"),
        ({}, "`chosen` is no answer"),
    ],
)
def test_what_is_no_pair_is_told(fields, told):
    found = turns_of(fields)
    assert isinstance(found, str) and told in found


def test_a_pair_is_two_documents(tokenizer_folder: Path, tmp_path: Path) -> None:
    """And only what is said last, in each, is an answer."""
    tokenizer, name = load(tokenizer_folder), tmp_path / "pairs.jsonl"
    name.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": EARLIER, "chosen": "4", "rejected": "5"}, FORMS["texts"][0])))

    def prepared(**more: Any) -> Any:
        source = {"documents": [str(name)], "kind": "preferences", **more}
        values = {"tokenizer": str(tokenizer_folder), "output": str(tmp_path / "out"), "sources": {"pairs": source}}
        return prepare(PrepareConfig.model_validate(values))[0]

    for steps in ([], [{"step": "normalise"}]):
        manifest = prepared(steps=steps)
        binary = open_binary(tmp_path / "out/pairs")
        assert manifest.num_documents == 4 and manifest.template_hash
        for number, (prompt, said) in enumerate([(EARLIER, "4"), (EARLIER, "5"), ([USER], "4"), ([USER], "5")]):
            start, end = binary.bounds(number)
            ids, weights = binary.read(start, end - start), binary.read_channel("weights", start, end - start)
            turns = [*prompt, {"role": "assistant", "content": said}]
            assert ids.tolist() == [*tokenizer.render(turns).ids, tokenizer.eod_id]
            assert ids[weights == 1].tolist() == [*tokenizer.encode(said), tokenizer.end_of_turn_id, tokenizer.eod_id]
        shutil.rmtree(tmp_path / "out")

    name.write_text(json.dumps({"prompt": "x", "chosen": "4", "rejected": "4"}) + "\n" + json.dumps(FORMS["trl"][0]) + "\n")
    with pytest.raises(UserError, match="dialogue pairs.jsonl:1: has two equal answers: drop the row"):
        prepared()
    assert prepared(damaged="skip").num_damaged == 1
