"""The asyncio side of the bridge: submit token ids, iterate over what comes back."""

from skipllm_core.client.base import EngineClient
from skipllm_core.client.in_process import InProcessEngineClient
from skipllm_core.client.process import ProcessEngineClient
from skipllm_core.client.stream import RequestStream

__all__ = ["EngineClient", "InProcessEngineClient", "ProcessEngineClient", "RequestStream"]
