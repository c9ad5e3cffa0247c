"""Any OpenAI-compatible server: asked as a judge is, and this one as the model under test."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from skipllm_core.chat_template import Message
from skipllm_core.errors import ConfigError
from skipllm_core.evals.records import Record, Setting, Timing
from skipllm_core.evals.runner import messages_of, seed_of, skip_wish
from skipllm_core.evals.tasks import Item


class ChatClient:
    """Asks POST /chat/completions of `base_url` (which ends in /v1)."""

    def __init__(self, base_url: str, model: str, api_key: str | None = None) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"{base_url!r} is not an http URL")
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def complete(self, messages: Sequence[Message], **fields: object) -> dict[str, Any]:
        """The response body; greedy. Raises ConfigError with what the server says."""
        body = {"model": self._model, "messages": messages, "temperature": 0, **fields}
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
            self._url, json.dumps(body).encode(), self._headers
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:  # noqa: S310
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace")
            raise ConfigError(f"{self._url} answers {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._url} cannot be asked: {error}") from None


class HttpBackend:
    """A running `skipllm serve`; each request names its own skipping."""

    def __init__(
        self, client: ChatClient, max_tokens: int, concurrency: int, seed: int = 0
    ) -> None:
        self._client = client
        self._seed = seed
        self._max_tokens = max_tokens
        self._concurrency = concurrency

    def lead(
        self, items: Sequence[Item], setting: Setting, budget_tokens: int | None = None
    ) -> Iterator[Record | Timing]:
        if any(item.choices for item in items):
            raise ConfigError("multiple_choice is scored in this process only, not with --base-url")
        started, tokens = time.perf_counter(), 0
        with ThreadPoolExecutor(self._concurrency) as pool:
            jobs = [pool.submit(self._lead_one, item, setting, budget_tokens) for item in items]
            try:
                for job in as_completed(jobs):
                    record = job.result()
                    tokens += record.num_tokens
                    yield record
            finally:
                pool.shutdown(cancel_futures=True)
        yield Timing(
            setting=setting,
            task=items[0].task,
            num_tokens=tokens,
            duration_s=time.perf_counter() - started,
            ffn_weight_reads=0,  # not told per request
            ffn_weight_reads_avoided=0,
        )

    def _lead_one(self, item: Item, setting: Setting, budget_tokens: int | None) -> Record:
        skip = skip_wish(setting, budget_tokens)
        answers: list[str] = []
        tokens = total = 0
        skipped = 0.0
        for turn in range(len(item.turns)):
            body = self._client.complete(
                messages_of(item, answers),
                max_tokens=self._max_tokens,
                seed=seed_of(self._seed, item.id, turn),
                skip=skip,
            )
            try:
                answers.append(body["choices"][0]["message"]["content"] or "")
                usage = body["usage"]
                tokens += usage["completion_tokens"]
                num_blocks = usage["skip"]["total_ffn_blocks"]
                skipped += usage["skip"]["skipped_ffn_share"] * num_blocks
                total += num_blocks
            except (KeyError, IndexError, TypeError) as error:
                raise ConfigError(f"the server's answer lacks {error}: not skipllm?") from None
        return Record(
            setting=setting,
            task=item.task,
            item_id=item.id,
            answers=tuple(answers),
            num_tokens=tokens,
            skipped_ffn_blocks=skipped,
            total_ffn_blocks=total,
        )
