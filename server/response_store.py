"""Answers that are kept, so that a later request can go on from them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import orjson

from server.protocol.items import Item

_OVERHEAD_BYTES = 1024  # of an entry, its ids and their places in the dictionaries


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """As JSON: a fraction of what the objects take, and as large as it says."""

    response_json: bytes
    input_json: bytes
    output_jsons: dict[str, bytes]  # by the items' ids, for those who refer to one

    @property
    def num_bytes(self) -> int:
        outputs = sum(map(len, self.output_jsons.values()))
        return len(self.response_json) + len(self.input_json) + outputs + _OVERHEAD_BYTES

    @property
    def response(self) -> dict[str, Any]:
        content: dict[str, Any] = orjson.loads(self.response_json)
        return content

    @property
    def input_items(self) -> list[Item]:
        """All that the answer was given to, earlier turns included."""
        items: list[Item] = orjson.loads(self.input_json)
        return items

    @property
    def conversation(self) -> list[Item]:
        return self.input_items + [orjson.loads(item) for item in self.output_jsons.values()]


class ResponseStore:
    """In memory, bounded by count and by bytes: the least recently used go first. An answer bears
    its whole conversation, so that it can be continued for as long as it is there itself."""

    def __init__(self, *, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._response_of_item: dict[str, str] = {}
        self._num_bytes = 0

    @property
    def is_on(self) -> bool:
        return self._max_responses > 0

    def keep(self, response: dict[str, Any], input_items: list[Item]) -> bool:
        """Whether there is room: one response may take an eighth of it, so that going on from it
        never means to parse much."""
        stored = StoredResponse(
            orjson.dumps(response),
            orjson.dumps(input_items),
            {item["id"]: orjson.dumps(item) for item in response["output"]},
        )
        if stored.num_bytes > self._max_bytes // 8:
            return False
        self._stored[response["id"]] = stored
        self._num_bytes += stored.num_bytes
        self._response_of_item |= dict.fromkeys(stored.output_jsons, response["id"])
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            self.delete(next(iter(self._stored)))
        return True

    def get(self, response_id: str) -> StoredResponse | None:
        stored = self._stored.get(response_id)
        if stored is not None:
            self._stored.move_to_end(response_id)
        return stored

    def output_item(self, item_id: str) -> Item | None:
        """The item of that id in some stored answer's output."""
        stored = self.get(self._response_of_item.get(item_id, ""))
        if stored is None:
            return None
        item: Item = orjson.loads(stored.output_jsons[item_id])
        return item

    def delete(self, response_id: str) -> bool:
        stored = self._stored.pop(response_id, None)
        if stored is None:
            return False
        self._num_bytes -= stored.num_bytes
        for item_id in stored.output_jsons:
            del self._response_of_item[item_id]
        return True
