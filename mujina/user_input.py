"""What users give us, and how we answer when it is wrong: strict YAML, files of others, and errors in the users' terms.

Every room may import this file; it imports no room and nothing heavy.
"""

import contextlib
import difflib
import errno
import functools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

import pydantic
import typer
import yaml

from mujina import strict_yaml
from mujina.disks import TRANSIENT, patiently
from mujina.exits import MISTAKE

SHOWN = 100  # characters of a value in an error
PIECE = 1 << 20  # bytes of a text that are read at a time
LFS = b"version https://git-lfs.github.com/spec/"
MOST = 64 << 20  # bytes of a configuration, or of a description in JSON; /dev/zero has more
SPACE = "make space on the disk (or raise the quota) and start again: what is whole stays"
# What the system says no to, and what the user can do.
REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.EINVAL), "check the path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check who may read and write there"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "name another place, or remove what is there"),
    **dict.fromkeys((errno.ENODEV, errno.ENXIO, errno.EISDIR), "name a file"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), SPACE),
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "the link leads to itself: check the path",
    errno.EROFS: "name a place that can be written",
    errno.EXDEV: "name a place on the same disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
PYDANTIC = re.compile(r"[\[\]()]|^constrained-")  # what its own parts of a place hold: `function-after[_fits(), Part]`
# Of pydantic's messages, by their type: the rule, where pydantic's own words are none for users, and the remedy.
RULES = {
    "bool_type": "must be true or false: write one of them",
    "int_type": "must be a whole number: write one, without quotes",
    "int_from_float": "must be a whole number: write one",
    "float_type": "must be a number: write one, without quotes",
    "string_type": "must be a text: put it in quotes",
    "path_type": "must be a path: write one",
    "finite_number": "must be a finite number: write one",
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list: write one"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a section: write its keys below it"),
    **dict.fromkeys(("too_short", "string_too_short"), "must not be empty: write something there"),
    "string_pattern_mismatch": "may hold letters, digits, _, - and . only: take the other characters out",
}


class UserError(Exception):
    """A mistake that the user can mend. The message names the field or file, the value, the rule and the remedy."""


def _strict(schema: Any) -> Any:
    """A pydantic-core schema in which numbers and truth values are made of nothing else."""
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(one) for one in schema)
    if not isinstance(schema, dict):
        return schema
    kept = ("metadata", "default", "expected")
    strict = {"strict": True} if schema.get("type") in ("bool", "int", "float") else {}
    return {key: value if key in kept else _strict(value) for key, value in schema.items()} | strict


class Section(pydantic.BaseModel):
    """One section of a configuration: frozen, and an unknown key is an error. A number is finite; a text is none, and 1 is not true.

    The string under a field is its documentation: what it means, its unit, the rule it obeys (`mujina explain` reads it).
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    from_file: ClassVar[tuple[str, ...]] = ()  # fields for which a file may name another that holds them, and nothing else

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return _strict(handler(source))


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
            raise UserError(f"override {override!r} is not of the form key=value: write for example {next(iter(model.model_fields))}=…")
        given = _from_yaml(text, f"override {override!r}")
        given = _included(override, Path(), key, given) if key in model.from_file and isinstance(given, str) else given
        values = _merge(values, functools.reduce(lambda inside, name: {name: inside}, reversed(key.split(".")), given))
    return parse(values, model, str(path))


def parse(values: Any, model: type[T], where: str) -> T:
    """Validates `values` against `model`; raises one UserError that lists every problem in `where`."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problems = [_explain(problem, model) for problem in error.errors()]
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems)) from None


def read_text(path: str | Path, remedy: str = "check the path", most: int = -1) -> str:
    """The text of a file. Raises UserError, ending with `remedy`, when it cannot be read or has more than `most` bytes (-1: any number);
    OSError when its disk is not well."""

    def read() -> bytes:
        data = bytearray()
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                data += piece
                if 0 <= most < len(data):
                    raise UserError(f"{path}: is longer than {most >> 20} MiB: {remedy}")
                if (zero := piece.find(0)) >= 0:  # as in UTF-16, in a binary file, and in a device that never ends
                    where = len(data) - len(piece) + zero
                    raise UnicodeDecodeError("utf-8", data, where, where + 1, "no text has it")
        return bytes(data)

    try:
        data = patiently(path, read)
        return data.decode().replace("\r\n", "\n")
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        raise UserError(f"{path}: {_reason(error)}: {remedy}") from None
    except UnicodeDecodeError as error:
        told = f"{path}: is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start})"
        raise UserError(f"{told}: save it as UTF-8 if it is a text, else {remedy}") from None


def stand_in(path: str | Path) -> str | None:
    """What stands in the place of a file where a copy has left only a link or a pointer to it, and the remedy; None where it is a file."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path}: is a link to {os.readlink(path)}, which is not there: copy the folder so that links are followed (cp -rL)"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            return f"{path}: is a pointer of git-lfs in the place of the file: run `git lfs pull` in its repository"
    return None


def parse_object(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """The JSON object that `text` spells; raises UserError, naming `where` and ending with `remedy`, when it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object ({_shown(value)}): {remedy}")
    return value


def read_object(path: str | Path, remedy: str = "check the path") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, ending with `remedy`."""
    if problem := stand_in(path):
        raise UserError(problem)
    return parse_object(read_text(path, remedy, MOST), str(path), remedy)


@contextlib.contextmanager
def reading(path: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Around the code that takes apart what somebody else has written: where `path` is not `what`, it ends with one UserError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, EOFError) as error:
        told = " ".join(str(error).split())[:SHOWN]
        raise UserError(f"{path}: is not {what} ({type(error).__name__}: {told}): {remedy}") from None


def command_line(*mains: Callable[..., None]) -> None:
    """Runs `main` as a command line (typer reads its annotations); what the user can mend ends it with one line and status MISTAKE, a
    file system that is not well with one line and status 1: it may be well when the same is tried again.

    Of several, the first argument chooses one by its name.
    """
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        for main in mains:
            app.command()(main)
        app(prog_name=sys.argv[0] if sys.argv[0].startswith("mujina ") else None)
    except (UserError, OSError, UnicodeEncodeError) as error:
        told = explain(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1 if isinstance(error, OSError) and error.errno in TRANSIENT else MISTAKE)


def explain(error: BaseException) -> str | None:
    """What to tell the user about an error that they can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":  # as Python reads such names
        return f"{os.fsencode(error.object)!r}: is a name that is not UTF-8: give it another"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{where}{where and ': '}{_reason(error)}: {REMEDIES.get(error.errno, 'look at the disk or the network, and start again')}"
    return None


def nearest(name: str, known: list[str]) -> str:
    """The remedy clause for a name that is not among the `known` ones."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean {by_lower[close[0]]}?" if close else f"there are: {', '.join(sorted(known)) or 'none'}"


def _load(path: Path, from_file: tuple[str, ...] = (), below: tuple[str, ...] = ()) -> dict[str, Any]:
    place = os.path.realpath(path)
    if place in below:
        raise UserError(f"{path}: extends itself, by way of {below[-1]}: take that `extends:` out")
    values = _from_yaml(read_text(path, most=MOST), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys: a configuration is a YAML mapping")
    parents = values.pop("extends", [])
    for key in from_file:
        if isinstance(values.get(key), str):
            values[key] = _included(str(path), path.parent, key, values[key])
    parents = [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise UserError(f"{path}: extends ({_shown(parents)}) must be the path of a file, or a list of them: write one")
    for parent in parents:
        _require(str(path), "extends", path.parent, parent)
    layers = [_load(path.parent / parent, from_file, (*below, place)) for parent in parents]
    return functools.reduce(_merge, [*layers, values])


def _from_yaml(text: str, where: str) -> Any:
    try:
        return strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: cannot be read as YAML: {strict_yaml.told(error)}") from None


def _included(where: str, folder: Path, key: str, name: str) -> Any:
    """What the file `name` holds for `key`."""
    _require(where, key, folder, name)
    path = folder / name
    values = _load(path)
    if set(values) != {key}:
        raise UserError(f"{path}: must hold {key} and nothing else, for {where} includes it as that; it holds {', '.join(values)}")
    return values[key]


def _require(where: str, key: str, folder: Path, name: str) -> None:
    """Raises UserError where the file `name` that `where` names is not there."""
    if not (name and (folder / name).exists()):
        remedy = "check the path"
        if name and Path(name).exists():
            remedy = f"what a file includes is relative to that file: write {os.path.relpath(name, folder)}"
        raise UserError(f"{where}: {key} ({name}): no such file: {remedy}")


def _merge(base: Any, top: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: _merge(base.get(key), value) for key, value in top.items()}


def _explain(problem: Any, model: type[pydantic.BaseModel]) -> str:
    field = ".".join(str(part) for part in problem["loc"] if not PYDANTIC.search(str(part)))
    if not field.isprintable():
        field = _shown(field)
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(model, problem["loc"][:-1]).model_fields)
        section, dot, inside = str(problem["loc"][-1]).partition(".")
        if dot and section in known:  # as overrides are written
            return f"unknown key {field}: write {section}: and {inside}: below it"
        return f"unknown key {field}: {nearest(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{field} is missing: add it"
    value = "" if isinstance(problem["input"], (dict, pydantic.BaseModel)) else f" ({_shown(problem['input'])})"
    return f"{field}{value}: {RULES.get(problem['type'], problem['msg'].removeprefix('Value error, '))}".removeprefix(": ")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _reason(error: OSError) -> str:
    """What the system says, in its words."""
    return (error.strerror or str(error)).lower()


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
