"""A client of any OpenAI-compatible server that times what it streams."""

from __future__ import annotations

import os
from typing import Any, Self

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from skipllm_core.bench.latency import RequestRecord
from skipllm_core.bench.load import clock
from skipllm_core.errors import ConfigError

_QUESTION_TIMEOUT = aiohttp.ClientTimeout(total=10)  # of everything that generates nothing
_MAX_ERROR_CHARS = 200

WEIGHT_READS = "skipllm_ffn_weight_reads_total"
STEP_SECONDS = "skipllm_engine_step_seconds_sum"

Counters = dict[tuple[str, str], float]  # (name, value of its only label) -> value


class Client:
    """One server and the connections to it. Use as a context manager, inside an event loop."""

    def __init__(self, base_url: str, endpoint: str, api_key: str | None, timeout_s: float) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._endpoint = self.base_url + endpoint
        self._timeout_s = timeout_s
        headers = {"content-type": "application/json"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            # Idle connections are left before the 5 s after which many servers close theirs: a
            # request on a connection just closed would count as the server's error.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # What the server says of itself ------------------------------------------------------------

    async def first_model(self) -> str:
        """The id of the first model it names. Raises ConfigError where there is none."""
        url = f"{self.base_url}/v1/models"
        try:
            async with self._session.get(url, timeout=_QUESTION_TIMEOUT) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self.not_there(_reason(error)) from None
        try:
            return str(orjson.loads(content)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ConfigError(
                f"{url} names no model, but answers {response.status}: {_message(content)}"
            ) from None

    def not_there(self, reason: str) -> ConfigError:
        return ConfigError(
            f"no server answers at {self.base_url} ({reason}): start one, as with `skipllm serve`, "
            "or name another with --base-url"
        )

    async def tokenize(self, text: str, model: str) -> list[int] | None:
        """The text's token ids; None from a server that has no such endpoint."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            async with self._session.post(
                f"{self.base_url}/tokenize", data=orjson.dumps(body), timeout=_QUESTION_TIMEOUT
            ) as response:
                return [int(token_id) for token_id in (await response.json())["tokens"]]
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return None

    async def counters(self) -> Counters | None:
        """What a SkipLLM server counts of its engine; None from any other."""
        found: Counters = {}
        try:
            async with self._session.get(
                f"{self.base_url}/metrics", timeout=_QUESTION_TIMEOUT
            ) as response:
                for family in text_string_to_metric_families(await response.text()):
                    for sample in family.samples:
                        if sample.name in (WEIGHT_READS, STEP_SECONDS):
                            found[sample.name, next(iter(sample.labels.values()))] = sample.value
        except (aiohttp.ClientError, OSError, ValueError, LookupError):
            return None
        return found or None

    # Requests ----------------------------------------------------------------------------------

    async def send(self, body: bytes, intended_s: float) -> RequestRecord:
        """Streams the answer to one request, and says how it went. Raises nothing."""
        record = RequestRecord(intended_s, sent_s=clock())
        try:
            async with self._session.post(self._endpoint, data=body) as response:
                if response.status == 200:
                    await _read_events(response.content, record)
                else:
                    message = _message(await response.read())
                    record.fail(f"http_{response.status}", message)
        except TimeoutError:
            record.fail("timeout", f"no end after {self._timeout_s:g} s")
        except aiohttp.ClientPayloadError as error:
            record.fail("truncated", str(error))
        except (aiohttp.ClientError, OSError) as error:
            record.fail("connection", _reason(error))
        if record.ended_s is None:
            record.ended_s = clock()
        return record


async def _read_events(content: aiohttp.StreamReader, record: RequestRecord) -> None:
    """Reads the stream to its end, so that the connection can be used again."""
    rest = b""
    async for data in content.iter_any():
        now_s = clock()  # of all events that came in one read
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                record.ended_s = now_s
                continue
            try:
                _read_chunk(orjson.loads(payload), record, now_s)
            except (ValueError, LookupError, TypeError, AttributeError):
                record.fail("malformed", payload[:_MAX_ERROR_CHARS].decode(errors="replace"))
    if record.ended_s is None:
        record.fail("truncated", "the stream ended without [DONE]")


def _read_chunk(chunk: Any, record: RequestRecord, now_s: float) -> None:
    if error := chunk.get("error"):
        record.fail("error_event", str(error.get("message"))[:_MAX_ERROR_CHARS])
        return
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        has_text = choice.get("text") or delta.get("content") or delta.get("tool_calls")
        has_text = has_text or delta.get("reasoning_content") or delta.get("reasoning")
        if has_text or (choice.get("finish_reason") and record.first_chunk_s is None):
            record.add_chunk(now_s)
    if usage := chunk.get("usage"):
        record.num_prompt_tokens = usage.get("prompt_tokens") or 0
        record.usage_output_tokens = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        record.num_cached_tokens = details.get("cached_tokens") or 0
        if skip := usage.get("skip"):
            record.skipped_ffn_blocks = skip["skipped_ffn_blocks"]
            record.total_ffn_blocks = skip["total_ffn_blocks"]
            record.skipped_ffn_share = skip["skipped_ffn_share"]


def _message(content: bytes) -> str:
    """The message of OpenAI's error object, or what there is instead."""
    try:
        return str(orjson.loads(content)["error"]["message"])[:_MAX_ERROR_CHARS]
    except (ValueError, LookupError, TypeError):
        return content[:_MAX_ERROR_CHARS].decode(errors="replace")


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # asyncio's own text is about its call
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
