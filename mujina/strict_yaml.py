"""YAML as people mean it: one reader, and the writer whose texts it reads back, for all configurations and overrides.

What stands there is plain: texts, whole numbers, numbers, true and false, null, lists, and mappings whose keys are always texts. YAML 1.1's
other readings are not taken: `no`, `on` and `24:00:00` are texts, `1e-4` is a number, and `30e9` and `1.5e6` are whole ones. Refused, with
the line: a key twice, a number that begins with 0 (1.1 reads 010 as 8, 1.2 as 10), one that is not finite or needs more than 64 bits, a
character that no text has, a tag, and aliases that make a small file a huge one.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NoReturn

import yaml

MOST_VALUES = 1_000_000  # in one text, aliases spelled out
_TAG = "tag:yaml.org,2002:"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# What a text without quotes is, and the characters that it may begin with.
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9][0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}
# What to do about what the parser says.
_REMEDIES = {
    "'\\t'": "write spaces in the place of the tab",
    "cannot start any token": "put the text in quotes",
    "mapping values are not allowed here": "put a text that holds a colon in quotes, and write one key a line",
    "unexpected end of stream": "close the quote or the bracket",
    "another document": "keep one of them in a file",
    "undefined alias": "put a text that begins with * in quotes, or write the anchor above it",
    "expected alphabetic or numeric character": "put a text that begins with * or & in quotes",
    "could not find expected ':'": "write a plain colon and a space behind a key, and a space behind the - of a list",
    "keys are not allowed here": "put a text that begins with ? in quotes",
    "entries are not allowed here": "write a list below its key, or put a text that begins with - in quotes",
    "expected a comment or a line break": "put a text that begins with | or > in quotes",
    "expected ',' or": "put texts that hold brackets or braces in quotes, and a comma behind each but the last",
    "expected <block end>": "give the keys of a section, or the entries of a list, one indentation",
    "hexadecimal": "write \\\\ for a backslash, or put the text in single quotes",
    "unknown escape character": "write \\\\ for a backslash, or put the text in single quotes",
    "expected '<document start>'": "write key: value in each line",
    "for merging": "name a mapping behind <<",
}


def load(text: str) -> Any:
    """What `text` holds. Raises yaml.YAMLError; `told` says it in one line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def dump(values: Any, **options: Any) -> str:
    """YAML that `load` reads back, and YAML 1.1 too; options are those of yaml.dump."""
    return str(yaml.dump(values, Dumper=_Dumper, allow_unicode=True, **options))


def told(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line, in one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {error.character:#06x} is none of a text: save the file as plain UTF-8, or take that out"
    mark = error.problem_mark or error.context_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if mark is None:
        return " ".join(str(error).split())
    assert isinstance(error, yaml.MarkedYAMLError)
    if error.context == "while scanning a simple key" and error.context_mark:  # whose problem is seen in a line behind it
        mark = error.context_mark
    problem = error.problem or ""
    remedy = next((f": {remedy}" for part, remedy in _REMEDIES.items() if part in problem), "")
    return f"line {mark.line + 1}: {', '.join(filter(None, (error.context, problem)))}{remedy}"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}
    yaml_constructors = {}


class _Dumper(yaml.SafeDumper):
    pass


def _refuse(node: yaml.Node, why: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def _check(node: yaml.Node, sizes: dict[yaml.Node, int], around: set[yaml.Node]) -> int:
    """How many values the node comes to. Refuses keys that stand twice or are no text, and what is too large."""
    if node in sizes:
        return sizes[node]
    if node in around:
        _refuse(node, "an alias stands within what it names: spell it out")
    around.add(node)
    size = 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key must be a text: put the braces or brackets in quotes")
            if key.value in seen and key.tag != f"{_TAG}merge":
                _refuse(key, f"key {key.value} stands twice, before in line {seen[key.value]}: take one of them out")
            seen[key.value] = key.start_mark.line + 1
            size += _check(value, sizes, around)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(value, sizes, around) for value in node.value)
    if size > MOST_VALUES:
        _refuse(node, f"aliases make more than {MOST_VALUES:,} values of it: spell out what is needed")
    around.remove(node)
    sizes[node] = size
    return size


def _null(loader: _Loader, node: yaml.ScalarNode) -> None:
    return None


def _bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return str(node.value).lower() == "true"


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = str(node.value).replace("_", "").lower()
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        _refuse(node, f'{node.value} begins with 0: leave the 0 out, or write "{node.value}" for a text')
    if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", text):
        _refuse(node, f"{node.value} is not a finite number: write one")
    is_whole, number = text.lstrip("-+").isdecimal(), float(text)
    if abs(number) == float("inf") or (is_whole and not -(2**63) <= int(text) < 2**63):
        _refuse(node, f"{node.value} is too large: write a smaller number")
    if is_whole or ("e" in text and 0 < abs(number) < 2**63 and number.is_integer()):
        return int(Decimal(text))
    return number


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if wrong := _NO_TEXT.search(node.value):
        _refuse(node, f"U+{ord(wrong[0]):04X} is no character of a text: take it out")
    return str(node.value)


def _list(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(value, deep=True) for value in node.value]


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    return {_text(loader, key): loader.construct_object(value, deep=True) for key, value in node.value}


def _tagged(loader: _Loader, node: yaml.Node) -> NoReturn:
    _refuse(node, f"the tag {node.tag.replace(_TAG, '!!')} is not read here: leave it out")


for name, (pattern, begins) in _PLAIN.items():
    for kind in (_Loader, _Dumper):  # a text that would be read as something else is written in quotes
        kind.add_implicit_resolver(f"{_TAG}{name}", re.compile(rf"^(?:{pattern})$"), begins)
_MAKE: dict[str, Callable[[Any, Any], Any]] = dict(null=_null, bool=_bool, int=_number, float=_number, str=_text, seq=_list, map=_mapping)
for name, make in _MAKE.items():
    _Loader.add_constructor(f"{_TAG}{name}", make)
_Loader.add_constructor(None, _tagged)
