"""Tells what may be written into a configuration: type, default, rule and meaning of each field, as the models themselves say it.

    mujina explain                                   # the sections of a run's configuration
    mujina explain phases.loss train.precision       # what may stand there
    mujina explain --of prepare sources.steps.japanese_quality
    mujina explain --schema > run.schema.json        # JSON Schema, for editors

The configurations are those of the verbs in CONFIGURATIONS. Meaning is the string under a field in its model. Imports no room by itself.
"""

import dataclasses
import importlib
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import typer
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from mujina import strict_yaml
from mujina.user_input import Section, UserError, command_line, nearest

CONFIGURATIONS = {
    "train": "megatron_jobs.config:RunConfig",
    "prepare": "data_prep.config:PrepareConfig",
    "tokenizer": "tokenization.train:TrainConfig",
    "extend-vocabulary": "tokenization.extend:ExtendConfig",
    "preferences": "evaluation.preferences.config:PreferencesConfig",
    "chain": "mujina.stations:Chain",
}
BOUNDS = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Lt: ("below", "lt"), Le: ("at most", "le")}
PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", type(None): "null"}
EXAMPLES = {bool: True, float: 0.1, str: "NAME", Path: "PATH"}
WIDTH = 100


def configuration(verb: str) -> type[Section]:
    """The model of what `verb` reads; raises UserError for one that reads none."""
    if verb not in CONFIGURATIONS:
        raise UserError(f"--of ({verb}): no verb with a configuration: {nearest(verb, list(CONFIGURATIONS))}")
    module, _, name = CONFIGURATIONS[verb].partition(":")
    found: type[Section] = getattr(importlib.import_module(module), name)
    return found


@dataclasses.dataclass(frozen=True)
class Entry:
    """A field at its place in a configuration, or a section that stands among others and is chosen by its tag (`step: language`)."""

    names: tuple[str, ...]
    info: FieldInfo | None  # none of a section that a tag chooses, and of the whole configuration
    sections: tuple[type[Section], ...]  # that may stand here

    @property
    def path(self) -> str:
        return ".".join(self.names)

    @property
    def documentation(self) -> str:
        """Of the field; of what is no field, the section's own."""
        text = self.info.description if self.info else self.sections[0].__doc__
        return " ".join((text or "").split())

    @property
    def type(self) -> str:
        return _type(self.info.annotation, self.info.metadata) if self.info else "section"

    @property
    def default(self) -> str | None:
        """As YAML; None where a value must be given."""
        if self.info is None or self.info.is_required():
            return None
        return "computed" if self.info.default_factory else _yaml(self.info.default)

    def inside(self) -> Iterator["Entry"]:
        """The fields of the section; where there are several, the sections by their tags."""
        if len(self.sections) > 1:
            for section in self.sections:
                yield Entry((*self.names, tag(section) or section.__name__), None, (section,))
        else:
            for section in self.sections:
                for name, info in section.model_fields.items():
                    if not _is_tag(info):
                        yield Entry((*self.names, name), info, tuple(sections_in(info.annotation)))

    def everything(self) -> Iterator["Entry"]:
        """This entry and all inside it, depth first."""
        yield self
        for entry in self.inside():
            yield from entry.everything()


def whole(model: type[Section]) -> Entry:
    return Entry((), None, (model,))


def find(model: type[Section], path: str) -> Entry:
    """What stands at `path` (`phases.loss`; positions in lists are passed over). Raises UserError, with the nearest name."""
    entry = whole(model)
    for name in filter(lambda name: not name.isdigit(), path.split(".")):
        inside = {inner.names[-1]: inner for inner in entry.inside()}
        if name not in inside:
            where = f"in {entry.path}" if entry.path else "here"
            elsewhere = [one.path for one in whole(model).everything() if one.names[-1:] == (name,)]
            near = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(name, list(inside))
            if not inside:
                near = f"{entry.path} is {entry.type}, and nothing stands inside it"
            raise UserError(f"{path}: there is no {name} {where}: {near}")
        entry = inside[name]
    return entry


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that may stand in a field of this type, within lists and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)] if get_origin(annotation) else []


def tag(section: type[Section]) -> str | None:
    """The value that chooses this section among others."""
    return next((get_args(info.annotation)[0] for info in section.model_fields.values() if _is_tag(info)), None)


def schema(model: type[Section]) -> dict[str, Any]:
    """JSON Schema of a file: nothing is required, for a file may leave it to the one that it extends."""
    made: dict[str, Any] = _without_required(model.model_json_schema())
    files = {"type": "array", "items": {"type": "string"}}
    about = "The file, or files, that this one is laid over; relative to this file."
    for name in model.from_file:
        field = made["properties"][name]
        made["properties"][name] = {"description": field.pop("description", ""), "anyOf": [field, {"type": "string"}]}
    made["properties"] = {"extends": {"anyOf": [{"type": "string"}, files], "description": about}} | made["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | made


def _without_required(node: Any) -> Any:
    if isinstance(node, dict):
        kept = {key: _without_required(value) for key, value in node.items() if key != "required" or not isinstance(value, list)}
        return {"anyOf" if key == "oneOf" else key: value for key, value in kept.items()}  # without its tag a section may be several
    return [_without_required(value) for value in node] if isinstance(node, list) else node


def _is_tag(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1 and not info.is_required()


def _type(annotation: Any, rules: Sequence[Any] = ()) -> str:
    """In words, bounds included: `whole number above 0, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if rules:
        bounds = [f"{word} {_number(getattr(rule, name))}" for kind, (word, name) in BOUNDS.items() for rule in rules if type(rule) is kind]
        bounds += ["not empty" for rule in rules if isinstance(rule, MinLen)]
        return f"{_type(annotation)} {' and '.join(bounds)}".strip()
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(str, arguments[:-1])), str(arguments[-1])]))
    if origin in (typing.Union, types.UnionType):
        if len(tagged := [name for one in arguments if isinstance(one, type) and issubclass(one, Section) and (name := tag(one))]) > 1:
            return f"one of the sections {', '.join(tagged)}"
        return ", or ".join(map(_type, arguments))
    if origin is dict:
        return f"NAME: {_type(arguments[1])}"
    if origin in (list, tuple):
        return f"list of: {_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return "section"
    return PLAIN.get(annotation, str(annotation))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _yaml(value: Any) -> str:
    if isinstance(value, pydantic.BaseModel):
        value = {name: _plain(inner) for name, inner in value if inner != type(value).model_fields[name].default}
    return strict_yaml.dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


def example(model: type[Section], entry: Entry) -> str:
    """Lines of YAML that write the field where it stands."""
    lines, entries = [], [find(model, ".".join(entry.names[: depth + 1])) for depth in range(len(entry.names))]
    indent, dash = "", ""
    for one in entries:
        value = ""
        if one.names == entry.names and one.info is not None:
            value = _example(one)
        if one.info is None:
            lines.append(f"{indent}{dash}{_tag_field(one.sections[0])}: {one.names[-1]}")
            indent, dash = indent + " " * len(dash), ""
            continue
        lines.append(f"{indent}{dash}{one.names[-1]}: {value}".rstrip())
        indent, dash = indent + " " * len(dash) + "  ", ""
        container = _container(one.info.annotation)
        if container is dict and one.names != entry.names:
            lines.append(f"{indent}NAME:")
            indent += "  "
        elif container is not None:
            dash = "- "
    return "\n".join(lines)


def _tag_field(section: type[Section]) -> str:
    return next(name for name, info in section.model_fields.items() if _is_tag(info))


def _container(annotation: Any) -> type | None:
    """dict or list, where sections stand in a mapping or list."""
    origin = get_origin(annotation)
    if origin is dict:
        return dict
    if origin in (list, tuple):
        return list
    found = (_container(argument) for argument in get_args(annotation)) if origin in (Annotated, typing.Union, types.UnionType) else ()
    return next(filter(None, found), None)


def _example(entry: Entry) -> str:
    assert entry.info is not None
    if entry.default not in (None, "null", "computed"):
        return str(entry.default)
    return _yaml(_value(entry.info.annotation, entry.info.metadata))


def _value(annotation: Any, rules: Sequence[Any] = ()) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _value(arguments[0])
    if origin is Literal:
        return arguments[0]
    if origin is dict:
        return {"NAME": _value(arguments[1])}
    if origin in (list, tuple):
        return [_value(arguments[0])]
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return {name: _value(info.annotation, info.metadata) for name, info in annotation.model_fields.items() if info.is_required()}
    if annotation is int:
        bounds: list[Any] = [rule.gt for rule in rules if isinstance(rule, Gt)]
        return max([1, *(bound + 1 for bound in bounds)])
    return EXAMPLES.get(annotation, "…")


def _show(model: type[Section], entry: Entry) -> None:
    if entry.names:
        default = "must be given" if entry.default is None else f"default {entry.default}"
        print(f"{entry.path}    {entry.type}" + (f"; {default}" if entry.info else "") + "\n")
    for paragraph in filter(None, [entry.documentation, _about(entry)]):
        print(textwrap.fill(paragraph, WIDTH) + "\n")
    inside = list(entry.inside())
    width = max((len(inner.names[-1]) for inner in inside), default=0)
    for inner in inside:
        text = inner.documentation.partition(". ")[0].rstrip(".")
        print(f"  {inner.names[-1]:<{width}}  {textwrap.shorten(text, WIDTH + 20 - width, placeholder=' …')}")
    if entry.info:
        print(("\n" if inside else "") + textwrap.indent(example(model, entry), "    "))


def _about(entry: Entry) -> str:
    """What the section says of itself, behind what its field says."""
    if entry.info is None or len(entry.sections) != 1:
        return ""
    return " ".join((entry.sections[0].__doc__ or "").split())


def main(
    fields: Annotated[list[str] | None, typer.Argument(help="such as train.precision or phases.loss; without one: the sections")] = None,
    of: Annotated[str, typer.Option(help=f"whose configuration: {', '.join(CONFIGURATIONS)}")] = "train",
    schema_: Annotated[bool, typer.Option("--schema", help="print JSON Schema of the whole configuration")] = False,
) -> None:
    """Explains fields of a configuration: type, default, meaning, and how they are written."""
    model = configuration(of)
    if schema_:
        print(json.dumps(schema(model), indent=2, ensure_ascii=False))
        return
    for number, entry in enumerate([find(model, path) for path in fields] if fields else [whole(model)]):
        print("\n" * (number > 0), end="")
        _show(model, entry)
    if not fields:
        others = ", ".join(f"--of {verb}" for verb in CONFIGURATIONS if verb != of)
        print(f"\n`mujina explain FIELD` explains one; other configurations: {others}")


if __name__ == "__main__":
    command_line(main)
