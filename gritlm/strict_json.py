"""JSON that says one thing: no key twice, no NaN or infinity."""

import json
from pathlib import Path
from typing import Any, NoReturn

from gritlm.errors import UserError


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, gives a key twice, or holds NaN or an infinity.
    """
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)


def read_json_object(path: str, flag: str = "", wanted: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in a file that the user has named.

    Args:
        flag: the flag that names the file, for the message.
        wanted: what the object is, for the message.
    Raises:
        UserError: there is no such file, or it holds something else.
    """
    place = f"{flag} {path}".strip()
    try:
        # The range of a flag names a NaN better.
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{place}: found {type(found).__name__}, wanted {wanted}")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")
