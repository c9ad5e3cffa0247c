"""LangChain's own standard tests for chat models, with tools and structured output on.

They run on the scripted model: some of them want an answer that understands the question
(`magic_function(3)` called with 3, a city for the weather), which it gives by construction."""

from collections.abc import AsyncIterator
from typing import Any, ClassVar

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.e2e.serving import Served

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class TestChatCompletions(ChatModelIntegrationTests):
    url: ClassVar[str]
    http: httpx.AsyncClient

    @pytest.fixture(autouse=True)
    async def closed_with_its_event_loop(self) -> AsyncIterator[None]:
        """LangChain's own asynchronous client outlives a test, and so the test's event loop."""
        async with httpx.AsyncClient() as self.http:
            yield

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def address(cls, scripted: Served) -> None:
        cls.url = scripted.url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "scripted",
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "max_retries": 0,
            "stream_usage": True,  # LangChain asks no server but OpenAI's own for it
            "http_async_client": self.http,
        }

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # one model is served; another name of it answers under its first

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestToolsForStructuredOutput(TestChatCompletions):
    """Structured output the older way: by calling a tool whose arguments are the object."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestResponses(TestChatCompletions):
    """The same client over /v1/responses."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return super().chat_model_params | {"use_responses_api": True}
