"""The tokens that a model directory declares beside its tokenizer.json, as transformers reads them:
in tokenizer_config.json, and in the special_tokens_map.json of older exports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from skipllm_core.errors import ConfigError

logger = logging.getLogger(__name__)

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def declare_tokens(
    tokenizer: Tokenizer, config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> dict[str, str]:
    """Adds what is declared to the tokenizer; returns the tokens that have names (`bos_token`, ...)
    by these. Raises ConfigError for a declaration that is none."""
    added = _added_tokens(config)
    # The map is what there was before tokens were declared in the configuration.
    if added:
        declared = {**special_tokens_map, **{k: v for k, v in config.items() if v is not None}}
    else:
        declared = {**config, **special_tokens_map}
    named = {name: value for name, value in declared.items() if name.endswith("_token")}
    others = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    if isinstance(others, dict):
        named |= others
        others = []
    before = tokenizer.get_added_tokens_decoder()
    spelled = {token.content: token for token in (*before.values(), *added.values())}
    names = {n: token for n, value in named.items() if (token := _special(value, spelled))}
    specials = [*names.values(), *filter(None, (_special(value, spelled) for value in others))]

    known = {repr(token) for token in before.values()}
    missing = [token for _, token in sorted(added.items()) if repr(token) not in known]
    tokenizer.add_tokens(missing)
    tokenizer.add_special_tokens(specials)
    for token_id, token in added.items():
        if (found := tokenizer.token_to_id(token.content)) != token_id:
            logger.warning(
                "tokenizer_config.json has %r as token %d, tokenizer.json makes it %s: it is %s",
                token.content, token_id, found, found,
            )  # fmt: skip
    return {name: token.content for name, token in names.items()}


def _added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    declared = config.get("added_tokens_decoder") or {}
    try:
        return {int(i): _token(value) for i, value in declared.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"tokenizer_config.json: added_tokens_decoder: {error}") from None


def _token(value: Mapping[str, Any]) -> AddedToken:
    content = value.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{value!r:.100} is no token")
    return AddedToken(content, **{flag: bool(value[flag]) for flag in _FLAGS if flag in value})


def _special(value: object, declared: Mapping[str, AddedToken]) -> AddedToken | None:
    """A token that is named as one of the special ones: plain, or as an object with its content;
    None for what is neither."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        return None
    if content in declared:
        token = declared[content]
    elif isinstance(value, dict):
        token = _token({"normalized": False, **value})
    else:
        token = AddedToken(content, normalized=False)
    token.special = True
    return token
