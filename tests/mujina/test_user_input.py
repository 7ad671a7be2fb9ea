"""A configuration and its overrides are read strictly, by one reader; what the system or a file of others says no with is one line."""

import errno
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Gt

from mujina.user_input import Section, UserError, explain, read_object, read_text, read_yaml, reading


class Part(Section):
    share: float = 0.5


class Settings(Section):
    from_file: ClassVar = ("parts",)

    count: int = 1
    rate: float = 1.0
    is_on: bool = False
    name: str = "x"
    place: Path = Path("here")
    languages: tuple[Literal["ja", "no"], ...] = ()
    weights: dict[str, Annotated[float, Gt(0)] | Part] = {}
    limit: int | None = None
    parts: list[Part] = []


def read(folder: Path, text: str, *overrides: str) -> Settings:
    (folder / "a.yaml").write_text(text)
    return read_yaml(folder / "a.yaml", Settings, list(overrides))


def test_values_are_what_people_mean(tmp_path: Path) -> None:
    text = "count: 30e9\nrate: 1e-4\nname: 24:00:00\nlanguages: [no, ja]\nweights: {no: 1, 010: {share: 1}}\nplace: a/b\n"
    found = read(tmp_path, text, "limit=1.5e3", "is_on=true", "weights.yes=2")
    assert (found.count, found.rate, found.name, found.languages) == (30_000_000_000, 1e-4, "24:00:00", ("no", "ja"))
    assert (found.limit, found.is_on, found.place) == (1500, True, Path("a/b"))
    assert found.weights == {"no": 1.0, "010": Part(share=1.0), "yes": 2.0}


@pytest.mark.parametrize(
    "text, told",
    [
        ("count: true", "count (True): must be a whole number"),
        ("count: 1.5", "count (1.5): must be a whole number"),
        ("count: '3'", "count ('3'): must be a whole number: write one, without quotes"),
        ("rate: yes", "rate ('yes'): must be a number"),
        ("rate: true", "rate (True): must be a number"),
        ("is_on: 1", "is_on (1): must be true or false: write one of them"),
        ("is_on: yes", "is_on ('yes'): must be true or false: write one of them"),
        ("languages: ja", "languages ('ja'): must be a list: write one"),
        ("weights: [1]", "weights ([1]): must be a section: write its keys below it"),
        ("weights: {a: x}", "weights.a ('x'): must be a number: write one, without quotes"),
        ("name: 3", "name (3): must be a text: put it in quotes"),
        ("rate: .inf", "a.yaml: cannot be read as YAML: line 1: .inf is not a finite number"),
        ("count: 010", "a.yaml: cannot be read as YAML: line 1: 010 begins with 0"),
        ("name: x\ncount: 1\nname: y", "line 3: key name stands twice, before in line 1"),
        ("extends: a.yaml", "a.yaml: extends itself"),
        ("extends: {b: 1}", "a.yaml: extends ({'b': 1}) must be the path of a file, or a list of them"),
        ("extends: none.yaml", "a.yaml: extends (none.yaml): no such file: check the path"),
        ("extends: ''", "a.yaml: extends (): no such file"),
        ("weights.a: 1", "unknown key weights.a: write weights: and a: below it"),
        ('"a\\nb": 1', r"unknown key 'a\nb': there are: "),
        ("LIMIT: 1", "unknown key LIMIT: did you mean limit?"),
        ("- a", "a.yaml: holds no keys"),
        ("limit: " + str(list(range(1000))), "limit ([0, 1, 2, 3, "),
    ],
)
def test_what_does_not_fit_is_told_with_field_value_and_rule(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as error:
        read(tmp_path, text)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "override, told",
    [
        ("count", "override 'count' is not of the form key=value: write for example count=…"),
        ("count=[", "override 'count=[': cannot be read as YAML: line 1: "),
        ("count=010", "override 'count=010': cannot be read as YAML: line 1: 010 begins with 0"),
        ("rate=.nan", "override 'rate=.nan': cannot be read as YAML"),
        ("cuont=1", "unknown key cuont: did you mean count?"),
        ("parts=none.yaml", "parts=none.yaml: parts (none.yaml): no such file: check the path"),
        ("=1", "unknown key "),
        ("count" + ".a" * 5000 + "=1", "count: must be a whole number"),
    ],
)
def test_an_override_is_read_as_a_file_is(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        read(tmp_path, "count: 1", override)


def test_a_number_is_finite_however_it_came() -> None:
    with pytest.raises(ValueError, match="finite"):
        Settings(rate=float("inf"))


def test_files_of_others_are_told_with_their_path(tmp_path: Path) -> None:
    for data, told in ((b"\xff", "is not UTF-8 text"), (b"[1]", "is not a JSON object ([1])"), (b"{", "is not JSON")):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path}/x.json: {told}") + ".*build it again"):
            read_object(tmp_path / "x.json", "build it again")
    for data in ('{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-16-le"), b"PK\x03\x04\0"):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(UserError, match="is not UTF-8 text .*: save it as UTF-8 if it is a text, else build it again"):
            read_object(tmp_path / "x.json", "build it again")
    (tmp_path / "x.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "link.json").symlink_to("../blobs/0")
    for name, told in (("x", "is a pointer of git-lfs .*: run `git lfs pull`"), ("link", "is a link to ../blobs/0, .*: copy the folder")):
        with pytest.raises(UserError, match=f"{name}.json: {told}"):
            read_object(tmp_path / f"{name}.json")
    (tmp_path / "x.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="x.json: is not JSON .*: build it again"):
        read_object(tmp_path / "x.json", "build it again")
    for path, told in ((tmp_path, "is a directory"), (tmp_path / "x.json/y", "not a directory"), (tmp_path / ("y" * 300), "too long")):
        with pytest.raises(UserError, match=f"{told}: check the path"):
            read_text(path)
    values: Any = {"a": 1}
    told = r"file: is not a list of jobs \(.*\): take it out"
    for wrong in (lambda: values["b"], lambda: values["a"]["b"], lambda: values.c, lambda: int("x"), lambda: 10.0**400):
        with pytest.raises(UserError, match=told), reading("file", "a list of jobs", "take it out"):
            wrong()


def test_what_the_system_refuses_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.EIO):
        error = OSError(number, "No", "a/file")
        told = explain(error)
        assert told and re.fullmatch(r"a/file: no: [^\n]+", told)
    assert explain(ConnectionResetError(errno.ECONNRESET, "No")) is None
    assert explain(ValueError("ours")) is None
    with pytest.raises(UnicodeEncodeError) as name:
        "a/\udcff".encode()
    assert explain(name.value) == r"b'a/\xff': is a name that is not UTF-8: give it another"


@pytest.mark.parametrize("read", [lambda path: read_yaml(path, Section), read_object, read_text])
def test_a_file_without_an_end_is_no_text(read):
    with pytest.raises(UserError, match="/dev/zero: is not UTF-8 text"):
        read("/dev/zero")


def test_a_configuration_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_bytes(b" " * ((64 << 20) + 1))
    with pytest.raises(UserError, match="long.yaml: is longer than 64 MiB: check the path"):
        read_yaml(tmp_path / "long.yaml", Section)
