"""Every field says what it means, and `mujina explain` finds it, with its type, default and place in YAML."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from mujina import explain
from mujina.user_input import UserError

ALL = [(verb, entry) for verb in explain.CONFIGURATIONS for entry in explain.whole(explain.configuration(verb)).everything()]


@pytest.mark.parametrize("verb, entry", ALL, ids=[f"{verb}:{entry.path}" for verb, entry in ALL])
def test_every_field_and_section_is_documented(verb, entry):
    assert len(entry.documentation) > 4, f"write a string under {entry.path or 'the class'} ({verb})"


@pytest.mark.parametrize("verb", explain.CONFIGURATIONS)
def test_every_field_is_found_and_its_example_is_what_the_schema_accepts(verb):
    model = explain.configuration(verb)
    validator = jsonschema.Draft202012Validator(explain.schema(model))
    for entry in list(explain.whole(model).everything())[1:]:
        assert explain.find(model, entry.path) == entry
        value = yaml.safe_load(explain.example(model, entry))
        validator.validate(value)
        told = iter(words(value))
        assert all(name in told for name in entry.names), (entry.path, value)


def words(value):
    """The keys and values, from the outside in."""
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in (key, *words(inner))]
    return [word for inner in value for word in words(inner)] if isinstance(value, list) else [value]


def explained(capsys, *fields, of="train"):
    explain.main(list(fields), of)
    return " ".join(capsys.readouterr().out.split())


def test_a_field_shows_type_default_meaning_and_an_example(capsys):
    shown = explained(capsys, "train.precision")
    assert shown.startswith("train.precision fp32, bf16 or fp8; default bf16 ") and "Transformer Engine" in shown
    assert shown.endswith("train: precision: bf16")
    assert "whole number above 0, or null; default null" in explained(capsys, "phases.sources.tokens")
    assert "whole number above 0 and at most 10,000; must be given" in explained(capsys, "model.num_layers")
    assert "copy, noise, drop or granular" in explained(capsys, "moe.upcycling.operator")
    assert "sources: NAME: steps: - step: language threshold: 0.65" in explained(capsys, "sources.steps.language.threshold", of="prepare")


def test_a_section_shows_its_fields(capsys):
    shown = explained(capsys, "phases.loss.next_token", "phases.0.sources")
    assert "z_loss Coefficient of the mean square of log Z" in shown and "weight Share of what the amounts leave" in shown
    assert "phases The stretches of the training" in explained(capsys)
    assert "japanese_quality Keeps Japanese prose" in explained(capsys, "sources.steps", of="prepare")


@pytest.mark.parametrize(
    "field, message",
    [
        ("train.precison", r"train.precison: there is no precison in train: did you mean precision\?"),
        ("precision", r"there is no precision here: did you mean train.precision\?"),
        ("train.precision.x", "train.precision is fp32, bf16 or fp8, and nothing stands inside it"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(field, message):
    with pytest.raises(UserError, match=message):
        explain.main([field])
    with pytest.raises(UserError, match=r"--of \(prepar\): no verb with a configuration: did you mean prepare\?"):
        explain.configuration("prepar")


def test_the_schema_accepts_the_shipped_files_and_refuses_an_unknown_key(capsys):
    explain.main(schema_=True)
    schema = json.loads(capsys.readouterr().out)
    values = yaml.safe_load(open("megatron_jobs/configs/tanuki_8x8b.yaml"))
    jsonschema.validate(values, schema)
    jsonschema.validate({"extends": "base.yaml", "seed": 3}, schema)
    with pytest.raises(jsonschema.ValidationError, match="micro_batch"):
        jsonschema.validate(values | {"train": {"micro_batch": 1}}, schema)
    assert schema["$defs"]["TrainConfig"]["properties"]["checkpoint_interval"]["description"].startswith("Steps between checkpoints")


@pytest.mark.parametrize("verb", explain.CONFIGURATIONS)
def test_nothing_heavy_is_imported(verb):
    code = f"import sys; from mujina import explain; explain.main(None, '{verb}'); print({{'torch', 'transformers'}} & {{*sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert shown.stdout.endswith("set()\n"), shown


def test_the_keys_that_errors_name_exist() -> None:
    """Every `train.precision` in an error of ours is a field of a run's configuration."""
    run = explain.configuration("train")
    sections = [name for name, info in run.model_fields.items() if explain.sections_in(info.annotation)]
    named = re.compile(rf"(?<![\w./])({'|'.join(sections)})\.[a-z_]\w*(\.[a-z_]\w*)*(?!\w*[({{/])")
    found = []
    for room in ("mujina", "data_prep", "tokenization", "moe", "megatron_jobs", "evaluation", "slurm"):
        for path in Path(room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise):
                    texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                    found += [key[0] for text in texts for key in named.finditer(text)]
    for key in found:
        if not key.endswith((".safetensors", ".json")):
            explain.find(run, key)
    assert len(found) > 20
