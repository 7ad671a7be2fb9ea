"""YAML as people mean it: what a text is read as, what is refused, and that what is written is read back."""

from typing import Any

import pytest
import yaml

from mujina import strict_yaml


@pytest.mark.parametrize(
    "text, value",
    [
        ("30e9", 30_000_000_000),
        ("1.5e6", 1_500_000),
        ("-2E3", -2000),
        ("30_000", 30_000),
        ("9223372036854775807", 2**63 - 1),
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("1.0", 1.0),
        (".5", 0.5),
        ("0.10", 0.1),
        ("1.5e0", 1.5),
        ("24:00:00", "24:00:00"),
        ("1:30", "1:30"),
        ("2026-11-26", "2026-11-26"),
        ("0x10", "0x10"),
        ("0o10", "0o10"),
        ("'010'", "010"),
        ("no", "no"),
        ("YES", "YES"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'true'", "true"),
        ("inf", "inf"),
        ("=", "="),
        ("[ja, no, 1]", ["ja", "no", 1]),
        ("{no: 1, 010: 2, 1e3: 3, null: 4}", {"no": 1, "010": 2, "1e3": 3, "null": 4}),
    ],
)
def test_a_value_is_what_people_mean(text: str, value: Any) -> None:
    found = strict_yaml.load(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


def test_anchors_and_merges_are_as_ever() -> None:
    text = "base: &base {a: 1, b: [x]}\none:\n  <<: *base\n  a: 2\nboth: {<<: [{c: 3}, *base]}\nagain: *base\n"
    found = strict_yaml.load(text)
    assert found["one"] == {"a": 2, "b": ["x"]} and found["both"] == {"a": 1, "b": ["x"], "c": 3} and found["again"] == found["base"]


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(12))


@pytest.mark.parametrize(
    "text, told",
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: key c stands twice, before in line 3: take one of them out"),
        ("1: x\n'1': y\n", "line 2: key 1 stands twice, before in line 1"),
        ("a: {b: 1, b: 1}", "line 1: key b stands twice"),
        ("a: 010", 'line 1: 010 begins with 0: leave the 0 out, or write "010" for a text'),
        ("a: -007", "line 1: -007 begins with 0"),
        ("a: .inf", "line 1: .inf is not a finite number"),
        ("a: [1, -.INF]", "line 1: -.INF is not a finite number"),
        ("a:\n- .nan", "line 2: .nan is not a finite number"),
        ("a: 1e999", "line 1: 1e999 is too large"),
        ("a: 9223372036854775808", "line 1: 9223372036854775808 is too large"),
        ("a: " + "1" * 5000, "is too large"),
        ('a: "\\0"', "line 1: U\\+0000 is no character of a text"),
        ('a: "\\uD800"', "line 1: U\\+D800 is no character of a text"),
        ("a: !!python/object:os.system {}", "line 1: the tag !!python/object:os.system is not read here"),
        ("? [a]\n: b", "line 1: a key must be a text"),
        ("a: &a [*a]", "line 1: an alias stands within what it names"),
        (BOMB, "line 7: aliases make more than 1,000,000 values of it"),
        ("[" * 3_000, "nested too deeply"),
        ("a: [", "line 1: "),
        ("a: 1\n\tb: 2", "line 2: .*: write spaces in the place of the tab"),
        ("--- a\n--- b", "line 2: .*: keep one of them in a file"),
        ("a: @b", "line 1: .*: put the text in quotes"),
        ("a: b: c", "line 1: .*: put a text that holds a colon in quotes"),
        ("a: *b", "line 1: .*: put a text that begins with \\* in quotes"),
        ("a: 'b", "line 1: .*: close the quote"),
        ("a: 1\nb:1\nc: 2", "line 2: .*: write a plain colon and a space behind a key"),
        ("a: 1\nb：2\nc: 2", "line 2: .*: write a plain colon and a space behind a key"),
        ("a:\n-b\nc: 2", "line 2: .*, and a space behind the - of a list"),
        ("a: ? b", "line 1: .*: put a text that begins with . in quotes"),
        ("a: - b", "line 1: .*: write a list below its key"),
        ("a: | b", "line 1: .*: put a text that begins with | or > in quotes"),
        ("a: [*.jsonl]", "line 1: .*: put a text that begins with . or & in quotes"),
        ("a: [{b}.jsonl]", "line 1: .*: put texts that hold brackets or braces in quotes"),
        ("a: 1\n- b", "line 2: .*: give the keys of a section, or the entries of a list, one indentation"),
        ('a: "C:\\x.jsonl"', r"line 1: .*: write .. for a backslash, or put the text in single quotes"),
        ('a: "C:\\data"', r"line 1: .*: write .. for a backslash, or put the text in single quotes"),
        ("[sources]\nweb = 1", "line 2: .*: write key: value in each line"),
        ("a: {<<: 3}", "line 1: .*: name a mapping behind <<"),
        ("a: \x07", "the character 0x0007 is none of a text: save the file as plain UTF-8"),
    ],
)
def test_what_is_refused_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(yaml.YAMLError) as error:
        strict_yaml.load(text)
    found = strict_yaml.told(error.value)
    assert "\n" not in found
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(found)


@pytest.mark.parametrize(
    "value", ["010", "08", "1e3", "no", "24:00:00", "1_000", ".5", "<<", "~", "true", "", 1e-5, 1e16, 5, None, True, ["1"]]
)
def test_what_is_written_is_read_back_here_and_elsewhere(value: Any) -> None:
    text = strict_yaml.dump({"a": value, "1e3": 1})
    assert strict_yaml.load(text) == {"a": value, "1e3": 1} == yaml.safe_load(text)
