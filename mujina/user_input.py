"""What users give us, and how we answer when it is wrong: strict YAML, and errors in their terms.

Every room may import this file; it imports no room and nothing heavy.
"""

import difflib
import errno
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

import pydantic
import typer
import yaml

from mujina.exits import MISTAKE


class UserError(Exception):
    """A mistake that the user can mend. The message names the field or file, the value, the rule and the remedy."""


class Section(pydantic.BaseModel):
    """One section of a configuration: frozen, and an unknown key is an error.

    The string under a field is its documentation: what it means, its unit, the rule it obeys (`mujina explain` reads it).
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    from_file: ClassVar[tuple[str, ...]] = ()  # fields for which a file may name another that holds them, and nothing else


def _is_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text) or len(text.encode()) > 200:
        raise ValueError("becomes the name of a file: write letters, digits and _, behind the first also . and -, at most 200 bytes")
    return text


Name = Annotated[str, pydantic.AfterValidator(_is_name)]  # of whatever becomes the name of a file or a folder, and stays where it is put

T = TypeVar("T", bound=Section)


def read_yaml(path: str | Path, model: type[T], overrides: list[str] | None = None) -> T:
    """Reads `path` into `model`, with `extends:` resolved and dotted `key=value` overrides on top.

    `extends: other.yaml` (or a list of files, the later over the earlier) lays this file over another one, section by section.
    A field of the model's `from_file` may be the path of a file that holds it: `phases: phases.yaml`.
    What a file includes is relative to that file; in an override a path is relative to the working directory.
    Raises UserError when the file is missing, is not YAML, or does not fit the model.
    """
    values = _load(Path(path), model.from_file)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form key=value: write for example optimizer.max_norm=1.0")
        given = yaml.safe_load(text)
        given = _included(override, Path(), key, given) if key in model.from_file and isinstance(given, str) else given
        values = _merge(values, _nested(key.split("."), given))
    return parse(values, model, str(path))


def parse(values: dict[str, Any], model: type[T], where: str) -> T:
    """Validates `values` against `model`; raises one UserError that lists every problem in `where`."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problems = [_explain(problem, model) for problem in error.errors()]
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems)) from None


def command_line(*mains: Callable[..., None]) -> None:
    """Runs `main` as a command line (typer reads its annotations); a UserError or a full disk ends it with one line and status MISTAKE.

    Of several, the first argument chooses one by its name.
    """
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        for main in mains:
            app.command()(main)
        app(prog_name=sys.argv[0] if sys.argv[0].startswith("mujina ") else None)
    except (UserError, OSError) as error:
        told = explain(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(MISTAKE)


def explain(error: BaseException) -> str | None:
    """What to tell the user about an error that they can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error}: make space on the disk (or raise the quota) and start again: what is whole stays"
    return None


def nearest(name: str, known: list[str]) -> str:
    """The remedy clause for a name that is not among the `known` ones."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known)) or 'none'}"


def _load(path: Path, from_file: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys: a configuration is a YAML mapping")
    parents = values.pop("extends", [])
    for key in from_file:
        if isinstance(values.get(key), str):
            values[key] = _included(str(path), path.parent, key, values[key])
    layers = [_load(path.parent / parent, from_file) for parent in ([parents] if isinstance(parents, str) else parents)]
    return functools.reduce(_merge, [*layers, values])


def _included(where: str, folder: Path, key: str, name: str) -> Any:
    """What the file `name` holds for `key`."""
    path = folder / name
    if not path.exists() and Path(name).exists():
        raise UserError(f"{where}: {key} ({name}): what a file includes is relative to that file: write {os.path.relpath(name, folder)}")
    values = _load(path)
    if set(values) != {key}:
        raise UserError(f"{path}: must hold {key} and nothing else, for {where} includes it as that; it holds {', '.join(values)}")
    return values[key]


def _merge(base: Any, top: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: _merge(base.get(key), value) for key, value in top.items()}


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _explain(problem: Any, model: type[pydantic.BaseModel]) -> str:
    field = ".".join(str(part) for part in (problem["loc"][:-2] if problem["loc"][-1:] == ("[key]",) else problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(model, problem["loc"][:-1]).model_fields)
        return f"unknown key {field}: {nearest(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{field} is missing: add it"
    value = "" if isinstance(problem["input"], (dict, pydantic.BaseModel)) else f" ({problem['input']!r})"
    return f"{field}{value}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _section_at(model: type[pydantic.BaseModel], loc: tuple[Any, ...]) -> type[pydantic.BaseModel]:
    """The section that a pydantic error location points into (list positions and dict keys are passed over)."""
    models = [model]
    for part in loc:
        inside = [m for one in models if part in one.model_fields for m in _models_in(one.model_fields[part].annotation)]
        # of several sections that may stand here, the location names the one whose tag (a field with one literal value) was given
        tagged = [m for m in models if any(get_args(field.annotation) == (part,) for field in m.model_fields.values())]
        models = inside or tagged or models
    return models[0]


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, typing.Union, types.UnionType, list, dict, tuple):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []
