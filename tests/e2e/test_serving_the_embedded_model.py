"""What a stranger sees who types the README's first command."""

import json
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Served

pytestmark = pytest.mark.slow

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]


def chat(demo: Served, **body: Any) -> dict[str, Any]:
    body = {"messages": CAPITAL, "temperature": 0} | body
    reply = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    result: dict[str, Any] = reply.json()
    return result


def test_the_banner_tells_the_address_a_curl_to_copy_and_what_skipping_costs(demo: Served) -> None:
    assert demo.url in demo.log
    assert "curl" in demo.log
    assert "/v1/chat/completions" in demo.log
    assert "auto chose " in demo.log
    assert "there its profile has a top-1 agreement of 0.9" in demo.log


def test_a_question_is_answered_with_its_skip_ratio_in_the_usage(demo: Served) -> None:
    answer = chat(demo)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 0 < answer["usage"]["skip"]["skipped_ffn_share"] < 1


@pytest.mark.parametrize("policy", ["ffn_skip", "static"])
def test_under_a_policy_of_blocks_the_share_is_that_of_whole_blocks(
    demo: Served, policy: str
) -> None:
    skip = chat(demo, skip={"policy": policy, "ratio": 0.25})["usage"]["skip"]
    assert 0 < skip["skipped_ffn_blocks"] <= skip["total_ffn_blocks"]
    assert skip["skipped_ffn_share"] == skip["token_skip_ratio"]
    ratio = skip["skipped_ffn_blocks"] / skip["total_ffn_blocks"]
    assert skip["token_skip_ratio"] == pytest.approx(ratio, abs=1e-4)


def test_skipping_can_be_turned_off_per_request(demo: Served) -> None:
    answer = chat(demo, skip={"policy": "off"})
    assert answer["usage"]["skip"]["skipped_ffn_share"] == 0
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_follow_up_question_is_understood(demo: Served) -> None:
    answer = chat(
        demo,
        messages=[
            *CAPITAL,
            {"role": "assistant", "content": "The capital of France is Paris."},
            {"role": "user", "content": "And of Spain?"},
        ],
    )
    assert "Madrid" in answer["choices"][0]["message"]["content"]


def test_a_second_turn_reuses_the_first_turns_prompt(demo: Served) -> None:
    def cached(answer: dict[str, Any]) -> int:
        num_tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return num_tokens

    hits = demo.metric("skipllm_prefix_cache_hits_total")
    content = "Hello! I have a question for you about Europe: what is the capital of France?"
    question = {"role": "user", "content": content}
    first = chat(demo, messages=[question])
    num_prompt_tokens = first["usage"]["prompt_tokens"]
    assert num_prompt_tokens > 16, "less than a block"
    turns = [question, first["choices"][0]["message"], {"role": "user", "content": "And of Spain?"}]
    second, again = (chat(demo, messages=turns) for _ in range(2))
    assert cached(first) == 0
    assert cached(second) == (num_prompt_tokens - 1) // 16 * 16
    assert cached(again) >= cached(second)
    assert again["choices"][0]["message"] == second["choices"][0]["message"]
    assert again["usage"]["skip"] == second["usage"]["skip"]
    assert demo.metric("skipllm_prefix_cache_hits_total") == hits + cached(second) + cached(again)


def test_what_it_cannot_know_it_says_politely(demo: Served) -> None:
    question = {"role": "user", "content": "Who won the tennis match yesterday?"}
    answer = chat(demo, messages=[question])
    assert "know" in answer["choices"][0]["message"]["content"]


def test_curl_shows_the_answer_as_it_is_generated(demo: Served) -> None:
    curl = shutil.which("curl")
    assert curl is not None
    body = {"messages": STORY, "stream": True, "stream_options": {"include_usage": True}}
    reply = subprocess.run(
        [curl, "-sN", f"{demo.url}/v1/chat/completions", "--json", json.dumps(body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    events = reply.stdout.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert "fox" in text.lower()
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["skip"]["skipped_ffn_share"] > 0


def test_the_openai_client_gets_the_same_text_streaming_and_not(demo: Served) -> None:
    client = demo.openai()
    model = client.models.list().data[0].id
    request: dict[str, Any] = {"model": model, "messages": STORY, "seed": 7, "temperature": 0.8}
    whole = client.chat.completions.create(**request).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices
    ]
    assert len(parts) > 10
    assert "".join(parts) == whole


def test_eight_concurrent_streams_answer_as_each_alone_would(demo: Served) -> None:
    def ask(country: str) -> str:
        question = {"role": "user", "content": f"What is the capital of {country}?"}
        content: str = chat(demo, messages=[question])["choices"][0]["message"]["content"]
        return content

    countries = ["France", "Spain", "Italy", "Japan", "Egypt", "Norway", "Peru", "Canada"]
    alone = [ask(country) for country in countries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, countries)) == alone


def test_a_client_that_leaves_frees_its_place(demo: Served) -> None:
    aborted = demo.metric("skipllm_requests_total", finish_reason="abort")
    body = {"messages": STORY, "stream": True, "ignore_eos": True, "max_tokens": 400}
    with httpx.stream("POST", f"{demo.url}/v1/chat/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()  # held: httpx leaves as soon as its iterator is dropped
        next(lines)
        assert demo.metric("skipllm_requests_running") == 1
    time.sleep(0.25)
    assert demo.metric("skipllm_requests_running") == 0
    assert demo.metric("skipllm_kv_cache_usage_ratio") == 0
    assert demo.metric("skipllm_requests_total", finish_reason="abort") == aborted + 1


def test_the_metrics_tell_what_the_client_counted(demo: Served) -> None:
    names = [
        "skipllm_prompt_tokens_total",
        "skipllm_generated_tokens_total",
        "skipllm_time_to_first_token_seconds_count",
        "skipllm_inter_token_latency_seconds_count",
        "skipllm_request_skip_ratio_count",
        "skipllm_request_skip_ratio_sum",
    ]

    def read() -> dict[str, float]:
        return {name: demo.metric(name) for name in names} | {
            "skipped": demo.metric("skipllm_ffn_blocks_total", outcome="skipped"),
            "computed": demo.metric("skipllm_ffn_blocks_total", outcome="computed"),
        }

    before = read()
    usages = [chat(demo, messages=STORY, seed=seed, temperature=1)["usage"] for seed in range(3)]
    usages += [chat(demo)["usage"] for _ in range(2)]
    counted = {name: value - before[name] for name, value in read().items()}
    generated = sum(usage["completion_tokens"] for usage in usages)
    skipped = sum(usage["skip"]["skipped_ffn_blocks"] for usage in usages)
    total = sum(usage["skip"]["total_ffn_blocks"] for usage in usages)
    ratios = sum(usage["skip"]["skipped_ffn_share"] for usage in usages)
    assert counted == pytest.approx(
        {
            "skipllm_prompt_tokens_total": sum(usage["prompt_tokens"] for usage in usages),
            "skipllm_generated_tokens_total": generated,
            "skipllm_time_to_first_token_seconds_count": 5,
            "skipllm_inter_token_latency_seconds_count": generated - 5,
            "skipllm_request_skip_ratio_count": 5,
            "skipllm_request_skip_ratio_sum": ratios,
            "skipped": skipped,
            "computed": total - skipped,
        },
        abs=1e-3,
    )


def test_bad_requests_leave_the_server_as_it_was(demo: Served) -> None:
    golden = chat(demo)["choices"]
    for body in (b"{", b"[]", b'{"messages": []}', b'{"messages": 3, "max_tokens": NaN}'):
        reply = httpx.post(f"{demo.url}/v1/chat/completions", content=body)
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert demo.status("/health") == 200
    assert chat(demo)["choices"] == golden


def test_the_http_process_stays_answering_while_tokens_are_computed(demo: Served) -> None:
    body = {"messages": STORY, "ignore_eos": True, "max_tokens": 200}
    generation = threading.Thread(target=chat, args=(demo,), kwargs=body)
    generation.start()
    slowest = 0.0
    while generation.is_alive():
        start = time.monotonic()
        assert demo.status("/health") == 200
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 0.5


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer"},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": WEATHER}])
@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_asked_for_is_made_and_follows_its_schema(
    demo: Served, choice: Any, seed: int
) -> None:
    answer = chat(
        demo,
        tools=[{"type": "function", "function": WEATHER}],
        tool_choice=choice,
        temperature=1,
        seed=seed,
    )
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["city"], str)
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert set(arguments) <= {"city", "unit", "days"}


def test_a_chat_page_may_send_tools_with_every_message(demo: Served) -> None:
    answer = chat(demo, tools=[{"type": "function", "function": WEATHER}])
    assert answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
