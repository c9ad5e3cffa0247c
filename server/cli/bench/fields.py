"""The fields that every request of a benchmark has, from its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from server.settings import SettingsError

# Objects as typed outputs have them, in a list that no answer completes.
UNENDING_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["person", "place", "thing"]},
            "count": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": False,
    },
}


def response_format(structured: str | None) -> dict[str, Any]:
    """The field that asks for answers under a schema: a file's, or "builtin". Raises
    SettingsError."""
    if structured is None:
        return {}
    if structured == "builtin":
        schema = UNENDING_SCHEMA
    else:
        try:
            text = Path(structured).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--structured: cannot read {structured}: {error}") from None
        schema = json_object(f"--structured {structured}", text)
    named = {"name": "benchmark", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def json_object(flag: str, text: str) -> dict[str, Any]:
    """What a flag holds. Raises SettingsError."""
    try:
        fields = orjson.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise SettingsError(f"{flag}: must be a JSON object, but got {text!r}")
    return fields
