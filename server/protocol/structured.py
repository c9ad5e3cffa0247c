"""What an answer has to look like, in the forms that clients write: OpenAI's `response_format`,
vLLM's `structured_outputs`, and what `guided_*` and llama.cpp's fields hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from server.protocol.wire import Wire, wrong

MAX_CHOICES = 4096


def _schema(value: Any) -> Any:
    """A JSON Schema: an object, or its text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except ValueError:
            raise wrong("schema_type", "", value) from None
    if not isinstance(value, dict):
        raise wrong("schema_type", "", value)
    return value


JSONSchema = Annotated[dict[str, Any], BeforeValidator(_schema, dict[str, Any] | str)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]


class SchemaFormat(Wire):
    name: str | None = None
    """A name of the schema; it changes nothing."""
    description: str | None = None
    """What the schema is for; it changes nothing."""
    schema_: JSONSchema = Field(alias="schema")
    """The JSON schema itself."""
    strict: bool | None = None
    """Accepted: schemas are always kept to."""


class ResponseFormat(Wire):
    """OpenAI's; a `schema` beside `type` is llama.cpp's way of writing it."""

    type: Literal["text", "json_object", "json_schema"]
    """Any text, any JSON object, or JSON under a schema."""
    json_schema: SchemaFormat | None = None
    """The schema, with its name."""
    schema_: JSONSchema | None = Field(None, alias="schema")
    """The schema alone, as llama.cpp takes it."""

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise wrong("missing", ".json_schema", None)
        return self


class StructuredOutputs(Wire):
    """vLLM's: one of the first five."""

    model_config = ConfigDict(extra="forbid")

    json_: JSONSchema | None = Field(None, alias="json")
    """A JSON schema."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: Choices | None = None
    """Texts, one of which is the answer."""
    grammar: str | None = None
    """A grammar, in Lark's or GBNF's notation."""
    json_object: bool | None = None
    """Whether the answer is any JSON object."""
    whitespace_pattern: str | None = None
    """What may stand between the parts of JSON, as a regex."""
    disable_any_whitespace: bool | None = None
    """Whether JSON is written without white space."""
    disable_fallback: bool | None = None
    """Accepted: there is nothing to fall back to."""
    disable_additional_properties: bool | None = None
    """Not supported by this server."""
    structural_tag: Any = None
    """Not supported by this server."""

    @model_validator(mode="after")
    def _is_known(self) -> StructuredOutputs:
        for name in ("structural_tag", "disable_additional_properties"):
            if getattr(self, name):
                raise wrong("unsupported", f".{name}", None)
        return self
