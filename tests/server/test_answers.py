"""What the two generating endpoints answer, streaming and not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.protocol.sampling import SamplingDefaults
from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.sequence import Sequence
from skipllm_core.skip.resolve import SkipDefaults
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import TokenLogprobs
from tests.fakes import FakeRunner, count_up
from tests.server.conftest import MODEL, Server, make_profile, running
from tests.skip.profiles import neuron_point, point, profile

SONG = "Füchse 🦊 jump over the dog.\nThe end. "


def sing(seq: Sequence) -> int:
    """SONG over and over: an answer with characters of several bytes."""
    return SONG.encode()[seq.num_output_tokens % len(SONG.encode())]


def events(text: str) -> list[Any]:
    """The JSON of every event, after checking how they are framed."""
    *blocks, last = text.split("\n\n")
    assert last == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@pytest.fixture
async def singer() -> AsyncIterator[Server]:
    async with running(sing, skip_profile=make_profile()) as server:
        yield server


async def test_a_chat_answer_has_openais_form(singer: Server) -> None:
    reply = await singer.chat(max_tokens=6, model=MODEL)
    assert reply.status_code == 200
    content = reply.json()
    assert content["id"].startswith("chatcmpl-")
    assert list(content)[:4] == ["id", "object", "created", "model"]
    assert content["object"] == "chat.completion"
    assert content["model"] == MODEL
    assert content["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Füchs", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
        }
    ]
    for key in ("prompt_logprobs", "prompt_token_ids", "kv_transfer_params", "service_tier"):
        assert content[key] is None, "vLLM's clients look for it"
    num_prompt_tokens = len(ByteTokenizer().encode("user: hi\nassistant: "))
    assert content["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": num_prompt_tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "skip": {
            "skipped_ffn_share": 0.0,
            "token_skip_ratio": 0.0,
            "skipped_ffn_blocks": 0,
            "total_ffn_blocks": 5 * 4,
            "warmup_tokens": 0,
        },
    }


async def test_a_stream_opens_with_the_role_and_ends_with_reason_usage_and_done() -> None:
    async with running(sing, runner={"step_s": 0.005}) as server:
        reply = await server.chat(max_tokens=6, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    first, *texts, last, usage = events(reply.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert "skip" in usage["usage"]
    assert len(texts) > 1
    for chunk in (first, *texts, last):
        assert chunk["usage"] is None
        assert list(chunk)[:4] == ["id", "object", "created", "model"]
        assert chunk["object"] == "chat.completion.chunk"
        assert (chunk["id"], chunk["created"]) == (first["id"], first["created"])
        (choice,) = chunk["choices"]
        assert set(choice) == {"index", "delta", "logprobs", "finish_reason", "stop_reason"}
    deltas = [chunk["choices"][0]["delta"]["content"] for chunk in texts]
    assert "".join(deltas) == "Füchs"
    assert all(deltas), "no empty chunk where half a character came"


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    max_tokens=st.integers(1, 60),
    stop=st.lists(st.sampled_from(["🦊", "The", "dog.\n", "zzz", "e"]), max_size=3),
    include=st.booleans(),
)
async def test_streaming_and_not_give_the_same_text(
    singer: Server, max_tokens: int, stop: list[str], include: bool
) -> None:
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "stop": stop,
        "include_stop_str_in_output": include,
    }
    whole = (await singer.complete(**options)).json()["choices"][0]
    chunks = events((await singer.complete(**options, stream=True)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [r for r in reasons if r] == [whole["finish_reason"]]
    song = (SONG * 3).encode()[:max_tokens].decode(errors="ignore")
    ends = [song.find(s) + len(s) for s in stop if s in song]
    if ends:
        end = min(ends)
        begin = min(end - len(s) for s in stop if song[:end].endswith(s))
        song = song[: end if include else begin]
    assert whole["text"] == song
    assert whole["finish_reason"] == ("stop" if ends else "length")


async def test_a_stop_string_ends_the_sequence_in_the_engine_too() -> None:
    async with running(sing, runner={"step_s": 0.002}) as server:
        content = (await server.complete(max_tokens=100, stop="🦊")).json()
        assert content["choices"][0]["text"] == "Füchse "
        assert content["usage"]["completion_tokens"] == len("Füchse 🦊".encode())
        assert content["usage"]["skip"]["total_ffn_blocks"] > 0
        assert server.engine.num_unfinished == 0


async def test_an_end_of_sequence_token_ends_the_text_unless_ignored() -> None:
    def ending(seq: Sequence) -> int:
        return ByteTokenizer.EOS if seq.num_output_tokens == 3 else ord("x")

    async with running(ending) as server:
        content = (await server.chat()).json()
        assert content["choices"][0]["message"]["content"] == "xxx"
        assert content["choices"][0]["finish_reason"] == "stop"
        assert content["usage"]["completion_tokens"] == 4
        chunks = events((await server.chat(stream=True)).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas.pop() == {}
        assert all(deltas), "the end has no text, so it is the last chunk alone"
        ignoring = await server.chat(ignore_eos=True, max_tokens=6)
        assert ignoring.json()["choices"][0]["message"]["content"] == "xxxxx"
        shown = await server.complete(
            ignore_eos=True, skip_special_tokens=False, max_tokens=4, min_tokens=4
        )
        assert shown.json()["choices"][0]["text"] == "xxx</s>"
        own = (await server.complete(stop_token_ids=[ord("x")])).json()["choices"][0]
        assert (own["text"], own["finish_reason"]) == ("", "stop")


async def test_without_max_tokens_a_chat_fills_the_context_and_a_completion_gives_16(
    server: Server,
) -> None:
    chat = (await server.chat()).json()["usage"]
    assert chat["total_tokens"] == server.engine.info.max_model_len
    assert (await server.complete()).json()["usage"]["completion_tokens"] == 16
    beyond = (await server.complete(max_tokens=10**7)).json()["usage"]
    assert beyond["total_tokens"] == server.engine.info.max_model_len


async def test_n_choices_and_several_prompts_are_numbered_prompt_by_prompt(server: Server) -> None:
    content = (await server.complete(["a", "k"], n=2, max_tokens=2)).json()
    assert [(c["index"], c["text"]) for c in content["choices"]] == [
        (0, "bc"),
        (1, "bc"),
        (2, "lm"),
        (3, "lm"),
    ]
    assert content["usage"]["prompt_tokens"] == 2 * 2
    assert content["usage"]["completion_tokens"] == 4 * 2
    chunks = events((await server.complete(["a", "k"], n=2, max_tokens=2, stream=True)).text)
    texts = ["", "", "", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["bc", "bc", "lm", "lm"]


async def test_choices_differ_by_their_seeds_and_seeds_are_never_shared(server: Server) -> None:
    await server.complete(n=3, seed=5, max_tokens=1)
    seeds = [row.seq.params.seed for batch in server.runner.batches for row in batch.rows]
    assert sorted(set(seeds)) == [5, 6, 7]
    server.runner.batches.clear()
    await server.complete(max_tokens=1)
    await server.complete(max_tokens=1)
    seeds = [row.seq.params.seed for batch in server.runner.batches for row in batch.rows]
    assert len(set(seeds)) == 2


async def test_a_prompt_of_ids_is_continued_inside_a_character() -> None:
    raw = "a🚀".encode()

    def finish(seq: Sequence) -> int:
        return raw[len(seq.token_ids)] if len(seq.token_ids) < len(raw) else ord("!")

    async with running(finish) as server:
        for num_given in range(1, len(raw)):
            for echo in (False, True):
                prompt = list(raw[:num_given])
                reply = await server.complete(prompt, max_tokens=5, echo=echo)
                expected = "🚀" + "!" * num_given
                assert reply.json()["choices"][0]["text"] == "a" * echo + expected


async def test_a_stop_string_that_is_a_special_token_ends_at_its_id() -> None:
    async with running(lambda seq: ByteTokenizer.EOS) as server:
        body = {"stop": ["</s>"], "max_tokens": 12, "ignore_eos": True}
        for more in ({}, {"skip_special_tokens": False}, {"include_stop_str_in_output": True}):
            reply = (await server.complete("Hi", **body, **more)).json()
            assert reply["choices"][0]["text"] == "</s>" * ("include_stop_str_in_output" in more)
            assert reply["choices"][0]["finish_reason"] == "stop"
            assert reply["choices"][0]["stop_reason"] == "</s>"
            assert reply["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [256, 97, 98, 99], [[256, 97, 98, 99]]])
async def test_a_prompt_may_be_text_or_ids_one_or_several(server: Server, prompt: Any) -> None:
    content = (await server.complete(prompt, max_tokens=2)).json()
    assert content["object"] == "text_completion"
    assert content["choices"][0]["text"] == "de"


async def test_special_tokens_are_added_to_a_prompt_unless_refused(server: Server) -> None:
    with_bos = (await server.complete("abc", max_tokens=1)).json()
    without = (await server.complete("abc", max_tokens=1, add_special_tokens=False)).json()
    assert (with_bos["usage"]["prompt_tokens"], without["usage"]["prompt_tokens"]) == (4, 3)


async def test_echo_puts_the_prompt_before_the_text(server: Server) -> None:
    whole = await server.complete("abc", echo=True, max_tokens=2)
    assert whole.json()["choices"][0]["text"] == "abcde"
    chunks = events((await server.complete("abc", echo=True, max_tokens=2, stream=True)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcde"


async def test_every_sampling_parameter_reaches_the_engine(server: Server) -> None:
    await server.chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, logit_bias={"65": -100, "66": 3.5}, seed=-1, min_tokens=1,
        max_completion_tokens=2, stop_token_ids=[9], logprobs=True, top_logprobs=3,
    )  # fmt: skip
    params = server.runner.batches[0].rows[0].seq.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.repetition_penalty == 1.1
    assert params.logit_bias == ((65, -100.0), (66, 3.5))
    assert params.seed == 2**63 - 1
    assert (params.min_tokens, params.max_tokens, params.logprobs) == (1, 2, 3)
    assert params.stop_token_ids == (9, ByteTokenizer.EOS)


async def test_a_top_p_of_0_is_the_best_token(server: Server) -> None:
    assert (await server.complete(top_p=0, max_tokens=1)).status_code == 200
    (seq,) = server.runner.batches[-1].rows
    assert seq.seq.params.top_p == 0.0


async def test_the_models_recommendations_are_the_defaults() -> None:
    async with running(sampling_defaults=SamplingDefaults(temperature=0.6, top_k=20)) as server:
        await server.chat(max_tokens=1)
        await server.chat(max_tokens=1, temperature=1, top_k=-1)
        found = [batch.rows[0].seq.params for batch in server.runner.batches]
    assert (found[0].temperature, found[0].top_k, found[0].top_p) == (0.6, 20, 1.0)
    assert (found[1].temperature, found[1].top_k) == (1.0, 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            '{"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}',
            {"temperature": 0.6, "top_k": 20},
        ),
        ('{"do_sample": false}', {"temperature": 0.0}),
        ('{"top_p": 0.9, "top_k": null, "temperature": null}', {"top_p": 0.9}),
        ('\ufeff{"top_k": 7}', {"top_k": 7}),
    ],
)
def test_recommendations_are_read_from_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str, expected: dict[str, float]
) -> None:
    assert SamplingDefaults.of_model(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text(config)
    assert SamplingDefaults.of_model(tmp_path) == SamplingDefaults(**expected)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("odd", "value"),
    [
        ("top_k", 20.0),
        ("top_k", True),
        ("temperature", "hot"),
        ("top_p", 7),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1.1]),
        ("temperature", float("nan")),
    ],
)
def test_an_odd_recommendation_is_told_and_left_out_and_the_others_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: str, value: object
) -> None:
    usable = {"temperature": 0.6, "top_p": 0.8, "top_k": 5, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps({**usable, odd: value}))
    usable.pop(odd, None)
    assert SamplingDefaults.of_model(tmp_path) == SamplingDefaults(**usable)
    (told,) = caplog.messages
    assert f"generation_config.json: {odd} is left out" in told
    assert "\n" not in told


@pytest.mark.parametrize("content", ["[]", "{"])
def test_recommendations_that_cannot_be_read_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    assert SamplingDefaults.of_model(tmp_path) == SamplingDefaults()
    (told,) = caplog.messages
    assert "no recommendations are read" in told


class Opinionated(FakeRunner):
    """A fake model with log probabilities: the token itself, an accent's half, and never."""

    def run(self, batch: Batch) -> StepResult:
        result = super().run(batch)
        rows = tuple(
            row
            if row.token_id is None
            else replace(
                row,
                logprobs=TokenLogprobs(
                    -0.5, (row.token_id, 0xC3, 300), (-0.5, -2.0, float("-inf"))
                ),
            )
            for row in result.rows
        )
        return replace(result, rows=rows)


@pytest.fixture
async def opinionated() -> AsyncIterator[Server]:
    async with running(runner_type=Opinionated) as server:
        yield server


async def test_chat_logprobs_have_openais_form_and_stay_finite(opinionated: Server) -> None:
    content = (await opinionated.complete("a", max_tokens=2, logprobs=3)).json()
    assert content["choices"][0]["logprobs"] == {
        "tokens": ["b", "c"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [
            {"b": -0.5, "bytes:\\xc3": -2.0, "": -9999.0},
            {"c": -0.5, "bytes:\\xc3": -2.0, "": -9999.0},
        ],
        "text_offset": [0, 1],
    }
    chat = (await opinionated.chat("a", max_tokens=1, logprobs=True, top_logprobs=2)).json()
    (entry,) = chat["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("!", -0.5, [33])
    assert entry["top_logprobs"][1]["bytes"] == [0xC3]


async def test_logprobs_name_tokens_by_their_ids_if_asked(opinionated: Server) -> None:
    options = {"max_tokens": 2, "return_tokens_as_token_ids": True}
    content = (await opinionated.complete("a", logprobs=2, **options)).json()
    told = content["choices"][0]["logprobs"]
    assert told["tokens"] == ["token_id:98", "token_id:99"]
    assert told["top_logprobs"][0] == {"token_id:98": -0.5, "token_id:195": -2.0}
    assert told["text_offset"] == [0, 1]
    chat = (await opinionated.chat("a", logprobs=True, top_logprobs=2, **options)).json()
    for entry in chat["choices"][0]["logprobs"]["content"]:
        assert entry["token"] == f"token_id:{entry['bytes'][0]}"
        assert entry["top_logprobs"][1]["token"] == "token_id:195"


async def test_streamed_logprobs_come_with_their_text(opinionated: Server) -> None:
    reply = await opinionated.complete("a", max_tokens=5, logprobs=0, stop="zz", stream=True)
    tokens = []
    for chunk in events(reply.text):
        choice = chunk["choices"][0]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        tokens += choice["logprobs"]["tokens"]
    assert tokens == ["b", "c", "d", "e", "f"]


async def test_text_offsets_count_the_characters_of_the_text_streamed_and_whole() -> None:
    written = "é🚀a".encode()

    def write(seq: Sequence) -> int:
        return written[seq.num_output_tokens % len(written)]

    body = {"max_tokens": 10, "logprobs": 0, "stop": "zz"}
    async with running(write, runner_type=Opinionated) as server:
        whole = (await server.complete("x", **body)).json()["choices"][0]
        reply = await server.complete("x", stream=True, **body)
    assert whole["text"] == "é🚀aé"  # the last character is not finished
    assert whole["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 4]
    choices = [chunk["choices"][0] for chunk in events(reply.text)]
    assert [o for choice in choices for o in choice["logprobs"]["text_offset"]] == (
        whole["logprobs"]["text_offset"]
    )


async def test_token_ids_are_returned_when_asked_for(server: Server) -> None:
    prompt_ids = ByteTokenizer().encode("user: a\nassistant: ")
    whole = (await server.chat("a", max_tokens=2, return_token_ids=True)).json()
    assert whole["prompt_token_ids"] == prompt_ids
    assert whole["choices"][0]["token_ids"] == [33, 34]
    chunks = events((await server.chat("a", max_tokens=2, return_token_ids=True, stream=True)).text)
    assert chunks[0]["prompt_token_ids"] == prompt_ids
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == [33, 34]


@pytest.mark.parametrize("echo", [False, True])
async def test_the_first_chunk_of_each_streamed_text_has_its_prompts_tokens(
    server: Server, echo: bool
) -> None:
    options = {"n": 2, "max_tokens": 3, "return_token_ids": True, "echo": echo}
    whole = (await server.complete(["a", "k"], **options)).json()["choices"]
    chunks = events((await server.complete(["a", "k"], **options, stream=True)).text)
    for choice in whole:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        first, *others = own
        assert first["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in other for other in others)
        assert [i for part in own for i in part["token_ids"]] == choice["token_ids"]


@pytest.mark.parametrize(
    ("body", "reason", "finish_reason"),
    [
        ({"stop": ["zz", "d"]}, "d", "stop"),
        ({"stop_token_ids": [100]}, 100, "stop"),
        ({"max_tokens": 3}, None, "length"),
        ({"prompt": [126]}, None, "stop"),  # the model's own end
    ],
)
async def test_what_stopped_an_answer_is_told(
    body: dict[str, Any], reason: str | int | None, finish_reason: str
) -> None:
    def ending(seq: Sequence) -> int:
        return ByteTokenizer.EOS if seq.token_ids[-1] == 126 else count_up(seq)

    async with running(ending) as server:
        body = {"prompt": "a", "max_tokens": 9} | body
        (whole,) = (await server.post("/v1/completions", body)).json()["choices"]
        chunks = events((await server.post("/v1/completions", body | {"stream": True})).text)
    assert (whole["stop_reason"], whole["finish_reason"]) == (reason, finish_reason)
    reasons = [chunk["choices"][0]["stop_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [reason]


async def test_a_chats_stop_is_told_in_its_last_chunk(server: Server) -> None:
    chunks = events((await server.chat(stop="#", max_tokens=9, stream=True)).text)
    ends = [chunk["choices"][0] for chunk in chunks]
    assert [(end["stop_reason"], end["finish_reason"]) for end in ends if end["finish_reason"]] == [
        ("#", "stop")
    ]
    assert (await server.chat(stop="#")).json()["choices"][0]["stop_reason"] == "#"


async def test_prompts_are_truncated_to_their_last_tokens(server: Server) -> None:
    content = (await server.complete("x" * 90 + "a", truncate_prompt_tokens=3)).json()
    assert content["usage"]["prompt_tokens"] == 3
    assert content["choices"][0]["text"].startswith("bcd")


@pytest.mark.parametrize("prompt", ["x" * 10_000 + "abc", [*b"x" * 10_000, *b"abc"]])
@pytest.mark.parametrize(("side", "used"), [(None, b"abc"), ("left", b"abc"), ("right", b"xxx")])
async def test_a_prompt_beyond_the_context_is_truncated_to_what_is_asked_for(
    server: Server, prompt: Any, side: str | None, used: bytes
) -> None:
    options = {"truncate_prompt_tokens": 3, "truncation_side": side, "add_special_tokens": False}
    reply = await server.complete(prompt, max_tokens=1, return_token_ids=True, **options)
    content = reply.json()
    assert content["usage"]["prompt_tokens"] == 3
    assert content["choices"][0]["prompt_token_ids"] == list(used)
    echoed = (await server.complete(prompt, max_tokens=1, echo=True, **options)).json()
    assert echoed["choices"][0]["text"] == (used + bytes([used[-1] + 1])).decode()


async def test_a_conversation_beyond_the_context_is_truncated_too(server: Server) -> None:
    options = {"truncate_prompt_tokens": 16, "return_token_ids": True}
    content = (await server.chat("x" * 10_000, max_tokens=1, **options)).json()
    assert content["prompt_token_ids"] == ByteTokenizer().encode("x" * 100 + "\nassistant: ")[-16:]
    assert (await server.chat("x" * 10_000)).json()["error"]["code"] == "context_length_exceeded"


async def test_a_final_message_is_continued(server: Server) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "abc"}]},
    ]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 3}
    content = (await server.post("/v1/chat/completions", body)).json()
    assert content["choices"][0]["message"]["content"] == "def"


async def test_a_request_may_name_its_answer(server: Server) -> None:
    content = (await server.chat(max_tokens=1, request_id="job-7")).json()
    assert content["id"] == "chatcmpl-job-7"


async def test_skipping_is_as_the_request_says_and_the_usage_tells(server: Server) -> None:
    content = (await server.chat(max_tokens=6, skip={"ratio": 0.2, "warmup_tokens": 3})).json()
    # Five decode steps, of which two fall into the warm-up; the fake skips one layer in the rest.
    assert content["usage"]["skip"] == {
        "skipped_ffn_share": 3 / 20,
        "token_skip_ratio": 3 / 20,
        "skipped_ffn_blocks": 3,
        "total_ffn_blocks": 20,
        "warmup_tokens": 3,
    }
    off = (await server.chat(max_tokens=6, skip={"policy": "off"})).json()
    zero = (await server.chat(max_tokens=6, skip={"ratio": 0})).json()
    assert off["usage"] == zero["usage"]
    assert off["choices"][0]["message"] == zero["choices"][0]["message"]
    assert off["usage"]["skip"]["skipped_ffn_blocks"] == 0


async def test_a_request_may_leave_the_policy_to_the_profile(server: Server) -> None:
    skip = {"policy": "auto", "warmup_tokens": 0}
    usage = (await server.chat(max_tokens=6, skip=skip)).json()["usage"]["skip"]
    assert usage["token_skip_ratio"] > 0, "blocks have the lower KL"
    refused = await server.chat(skip={"policy": "neurons", "max_skips": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "skip.max_skips"


async def test_auto_gives_no_request_a_policy_that_the_engine_does_not_run() -> None:
    best = profile(
        point(0.25, 0.9, kl=0.5, region=(1, 3)), neurons=(neuron_point(0.3),), num_layers=6
    )
    options: dict[str, Any] = {"skip_profile": best, "skip_defaults": SkipDefaults(policy="auto")}
    async with running(**options) as server:
        usage = (await server.chat(max_tokens=9)).json()["usage"]["skip"]
        assert usage["skipped_ffn_share"] > usage["token_skip_ratio"] == 0
    blocks_only = {"skip_policies": ("never", "ffn_skip", "static")}
    async with running(runner=blocks_only, **options) as server:
        usage = (await server.chat(max_tokens=9)).json()["usage"]["skip"]
        assert usage["skipped_ffn_share"] == usage["token_skip_ratio"] > 0
        refused = await server.chat(skip={"policy": "neurons"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "skip.policy"


async def test_a_trace_tells_the_layers_skipped_for_every_token(server: Server) -> None:
    options = {"max_tokens": 5, "skip": {"ratio": 0.2, "trace": True}}
    whole = (await server.chat(**options)).json()
    assert whole["choices"][0]["skip"] == {"skipped_layers": [[], [], [2], [2], [2]]}
    chunks = events((await server.chat(**options, stream=True)).text)
    layers = [row for chunk in chunks if "skip" in chunk for row in chunk["skip"]["skipped_layers"]]
    assert layers == [[], [], [2], [2], [2]]


async def test_neurons_left_out_are_told_as_a_share_of_the_weights_over_all_choices(
    server: Server,
) -> None:
    skip = {"policy": "neurons", "ratio": 0.25, "warmup_tokens": 3}
    body = {"prompt": "hi", "max_tokens": 6, "skip": skip}
    content = (await server.post("/v1/completions", body | {"n": 2})).json()
    # Of five decode steps three leave out of layer l, with its 48 rows, l + 3 neurons before up and
    # 1 before down: 7, 9, 11 and 13 rows.
    assert content["usage"]["skip"] == {
        "skipped_ffn_share": pytest.approx(2 * 3 * (7 + 9 + 11 + 13) / (2 * 5 * 4 * 48)),
        "token_skip_ratio": 0.0,
        "skipped_ffn_blocks": 0,
        "total_ffn_blocks": 40,
        "warmup_tokens": 6,
    }


NEURONS_OF_A_TOKEN = [[3, 1], [4, 1], [5, 1], [6, 1]]


async def test_a_trace_tells_by_layer_how_many_neurons_each_token_left_out(server: Server) -> None:
    options = {"max_tokens": 4, "skip": {"policy": "neurons", "ratio": 0.2, "trace": True}}
    expected = {
        "skipped_layers": [[]] * 4,
        "skipped_neurons": [[], [], NEURONS_OF_A_TOKEN, NEURONS_OF_A_TOKEN],
    }
    chats = [(await server.chat(**options)).json(), (await server.complete(**options)).json()]
    for whole in chats:
        assert whole["choices"][0]["skip"] == expected
    for send in (server.chat, server.complete):
        chunks = events((await send(**options, stream=True)).text)
        traces = [chunk["skip"] for chunk in chunks if "skip" in chunk]
        for name, of_tokens in expected.items():
            assert [of_token for trace in traces for of_token in trace[name]] == of_tokens


async def test_the_trace_of_an_answer_that_a_stop_string_ends_goes_as_far_as_it(
    server: Server,
) -> None:
    skip = {"policy": "neurons", "ratio": 0.2, "trace": True}
    whole = (await server.complete("a", max_tokens=9, stop=["de"], skip=skip)).json()
    trace = whole["choices"][0]["skip"]
    assert whole["usage"]["completion_tokens"] == 4
    assert len(trace["skipped_layers"]) == len(trace["skipped_neurons"]) == 4


async def test_usage_can_be_told_in_every_chunk(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await server.chat(max_tokens=3, stream=True, stream_options=options)).text)
    assert all(chunk["usage"]["prompt_tokens"] for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["usage"]["completion_tokens"] == 0
    assert chunks[-1]["usage"]["completion_tokens"] == 3
