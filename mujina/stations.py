"""What a chain's YAML file holds, and the stations that it comes to: variables filled in, `for_each` spelled out."""

import fnmatch
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from mujina.cli import VERBS
from mujina.sbatch import SCRIPTS
from mujina.user_input import Section, UserError, nearest, read_yaml

MOST_ROUNDS = 1000

Scalar = bool | int | float | str


class JobConfig(Section):
    """How a station becomes a Slurm job."""

    script: str = "verb.sh"
    """A script of Mujina's folder slurm/, or a path with a slash. verb.sh runs any verb in one process and is given the whole command;
    every other one knows its verb and is given the arguments."""
    array: int | str | None = None
    """Tasks of a job array, for the scripts that share their work out."""
    sbatch: list[str] = []
    """Further options of sbatch, such as --time=24:00:00."""


class StationConfig(Section):
    """One verb with its arguments, or one for every value of `for_each`. All texts may have {variables}."""

    name: str
    """Stands in the journal and the summary; every name once."""
    run: str | list[str]
    """Verb and arguments: a text that is split as a shell would, or a list. A word that is nothing but {variable} becomes as many words
    as the variable has values."""
    for_each: dict[str, list[Scalar]] = {}
    """One station for every combination of these variables' values; `name` has to tell them apart."""
    rounds: int | str | None = None
    """How often this station runs, and those beside it that say the same: the first round of them all, then the second, and so on. Their
    texts may have {round}, from 1, and {before}, the number of the round before."""
    needs: list[str] | None = None
    """Names of earlier stations, or patterns such as "training *"; default: the station before, with all that its `for_each` makes."""
    outputs: list[str] = []
    """Files or folders that are there when the station is done."""
    slurm: JobConfig = JobConfig()
    """How the station becomes a Slurm job."""


class Chain(Section):
    """A chain. key=value on the command line sets a variable or one of these fields."""

    name: str
    """Stands in the names of its Slurm jobs."""
    folder: str
    """For the journal, the summary and the logs."""
    variables: dict[str, Scalar | list[Scalar] | None] = {}
    """Texts may use {variable}, and {variable.key}: the value of a key of the YAML file that the variable names. Variables may use those
    before them. null: has to be given on the command line."""
    sbatch: list[str] = []
    """Options of sbatch for every job."""
    stations: list[StationConfig] = pydantic.Field(min_length=1)
    """In order; each waits for what it needs."""

    @pydantic.field_validator("variables")
    @classmethod
    def _are_no_fields(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in variables if name in cls.model_fields]:
            raise ValueError(f"{taken[0]} is a field of the chain: give the variable another name")
        return variables


@dataclass(frozen=True)
class Station:
    name: str
    command: list[str]  # verb and arguments
    needs: list[str]  # names of earlier stations
    outputs: list[Path]
    script: Path
    array: int | None
    sbatch: list[str]

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name)

    @property
    def script_arguments(self) -> list[str]:
        return self.command if self.script.name == "verb.sh" else self.command[1:]


@dataclass(frozen=True)
class Plan:
    name: str
    folder: Path
    sbatch: list[str]
    stations: list[Station]  # none before one that it needs


def read_chain(path: Path, overrides: list[str]) -> Plan:
    """Raises UserError on a chain that does not fit, naming station and field."""
    variables = read_yaml(path, Chain).variables
    chain = read_yaml(path, Chain, [_override(text, list(variables)) for text in overrides])
    if missing := [name for name, value in chain.variables.items() if value is None]:
        remedy = " ".join(f"{name}=…" for name in missing)
        raise UserError(f"{path}: variables.{missing[0]} is not set: give it on the command line: mujina chain {path} {remedy}")
    known: dict[str, str | list[str]] = {}
    for name, value in chain.variables.items():
        assert value is not None
        where = f"{path}: variables.{name}"
        known[name] = _list(value, known, where) if isinstance(value, list) else _fill(_text(value), known, where)
    stations: list[Station] = []
    before: list[str] = []
    for config, of_round in _in_order(chain.stations, known, str(path)):
        made = []
        for values in itertools.product(*config.for_each.values()):
            its = known | of_round | dict(zip(config.for_each, map(_text, values), strict=True))
            made.append(_station(config, its, [station.name for station in stations], before, str(path)))
        before = [station.name for station in made]
        stations += made
    names = [station.name for station in stations]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: station {twice[0]}: two stations have this name: put the variables of `for_each`, or {{round}}, into it")
    return Plan(chain.name, Path(_fill(chain.folder, known, f"{path}: folder")), _list(chain.sbatch, known, f"{path}: sbatch"), stations)


def _in_order(
    configs: list[StationConfig], known: Mapping[str, str | list[str]], path: str
) -> Iterator[tuple[StationConfig, dict[str, str]]]:
    """Every station with what {round} and {before} are, once for each of its rounds."""
    for rounds, beside in itertools.groupby(configs, key=lambda config: config.rounds):
        together = list(beside)
        if rounds is None:
            yield from ((config, {}) for config in together)
            continue
        number = _fill(_text(rounds), known, f"{path}: station {together[0].name}: rounds")
        if not (number.isdecimal() and 0 < int(number) <= MOST_ROUNDS):
            raise UserError(f"{path}: station {together[0].name}: rounds ({number}) must be a number from 1 to {MOST_ROUNDS}: write one")
        for at in range(1, int(number) + 1):
            yield from ((config, {"round": str(at), "before": str(at - 1)}) for config in together)


def _override(text: str, variables: list[str]) -> str:
    """A key=value that `read_yaml` takes: what a variable is set to is a text, or a list where it looks like one."""
    key, separator, value = text.partition("=")
    if not separator or key.split(".")[0] in Chain.model_fields:
        return text
    if key not in variables:
        raise UserError(f"{key}={value}: the chain has no variable {key}: {nearest(key, variables)}")
    return f"variables.{key}={value if value.startswith('[') else json.dumps(value)}"


def _station(config: StationConfig, known: Mapping[str, str | list[str]], earlier: list[str], before: list[str], path: str) -> Station:
    name = _fill(config.name, known, f"{path}: name of station {config.name}")
    where = f"{path}: station {name}"
    command = _list(shlex.split(config.run) if isinstance(config.run, str) else config.run, known, f"{where}: run")
    verb = command[0] if command else ""
    if verb not in VERBS:
        raise UserError(f"{where}: run: no such verb: {verb}: {nearest(verb, list(VERBS))}")
    needs = before
    if config.needs is not None:
        patterns = _list(config.needs, known, f"{where}: needs")
        found = {pattern: fnmatch.filter(earlier, pattern) for pattern in patterns}
        for pattern in patterns:
            if not found[pattern]:
                raise UserError(f"{where}: needs: no station before it is called {pattern}: {nearest(pattern, earlier)}")
        needs = [one for one in earlier if any(one in names for names in found.values())]
    script = _fill(config.slurm.script, known, f"{where}: slurm.script")
    script_path = Path(script) if "/" in script else SCRIPTS / script
    if not script_path.is_file():
        here = sorted(one.name for one in SCRIPTS.glob("*.sh"))
        raise UserError(f"{where}: slurm.script ({script}): no such file: {nearest(script, here)}")
    array = _fill(_text(config.slurm.array), known, f"{where}: slurm.array") if config.slurm.array is not None else None
    if array is not None and not (array.isdecimal() and int(array)):
        raise UserError(f"{where}: slurm.array ({array}) must be a number of tasks: write for example 4")
    return Station(
        name,
        command,
        needs,
        [Path(one) for one in _list(config.outputs, known, f"{where}: outputs")],
        script_path,
        int(array) if array is not None else None,
        _list(config.slurm.sbatch, known, f"{where}: slurm.sbatch"),
    )


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(texts: list[Any], known: Mapping[str, str | list[str]], where: str) -> list[str]:
    """Each text filled in; {name} alone, of a variable with several values, becomes all of them."""
    filled: list[str] = []
    for text in map(_text, texts):
        whole = re.fullmatch(r"\{(\w+)\}", text)
        values = known.get(whole[1]) if whole else None
        filled += values if isinstance(values, list) else [_fill(text, known, where)]
    return filled


def _fill(text: str, known: Mapping[str, str | list[str]], where: str) -> str:
    """`text` with {name} and {name.key} filled in; other braces stay."""

    def value(found: re.Match[str]) -> str:
        name, key = found[1], found[2]
        if name not in known:
            raise UserError(f"{where}: no such variable: {{{name}}}: {nearest(name, list(known))}")
        of_variable = known[name]
        if isinstance(of_variable, list):
            raise UserError(f"{where}: {{{name}}} has several values: it may only stand as a word of its own")
        return _key_of(of_variable, key, where) if key else of_variable

    return re.sub(r"\{([A-Za-z_]\w*)(?:\.([\w.]+))?\}", value, text)


class _AnyKeys(Section):
    model_config = pydantic.ConfigDict(extra="allow")


def _key_of(path: str, key: str, where: str) -> str:
    """The value of a dotted key of a YAML file."""
    value: Any = read_yaml(path, _AnyKeys).model_extra
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, Scalar):
        raise UserError(f"{where}: {path} has no {key} with one value: add it, or write out what is meant")
    return _text(value)


def files_named(command: list[str]) -> list[Path]:
    """The YAML files that a command names, and those that they name in turn (relative to them, or to the working directory)."""
    found: dict[Path, None] = {}
    rest = [Path(word) for word in command if word.endswith((".yaml", ".yml"))]
    while rest:
        path = rest.pop(0)
        if path in found or not path.is_file():
            continue
        found[path] = None
        names = re.findall(r"[^\s'\"\[\]{},=]+\.ya?ml", path.read_text(encoding="utf-8", errors="replace"))
        rest += [folder / name for name in names for folder in (path.parent, Path())]
    return list(found)
