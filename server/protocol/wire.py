"""The wire models' common ground: strict types and finite numbers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Wire(BaseModel):
    """A JSON object of a request. Unknown keys are kept, to be refused or named in the log."""

    model_config = ConfigDict(
        strict=True,
        allow_inf_nan=False,
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,  # the sentences of /openapi.json
    )


def wrong(kind: str, path: str, got: object, **context: object) -> PydanticCustomError:
    """A fault at `path` below the field under validation, worded like pydantic's own `kind`."""
    context |= {"path": path, "got": got}
    return PydanticCustomError(kind, "{path}", context)
