"""Reading what other commands wrote, with an error that names the file and the remedy."""

import json
from pathlib import Path
from typing import Any

from mujina.user_input import UserError


def read_text(path: Path, remedy: str) -> str:
    """The text of `path`; raises UserError, ending with `remedy`, when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}): {remedy}") from None


def parse_object(text: str, where: str, remedy: str) -> dict[str, Any]:
    """The JSON object that `text` spells; raises UserError, naming `where`, when it is anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object: {remedy}")
    return value
