"""What operators ask, and whether the metrics tell what the clients counted."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from server.app import build_app
from skipllm_core.client import InProcessEngineClient
from skipllm_core.engine.engine import Engine
from skipllm_core.skip.resolve import SkipDefaults
from skipllm_core.tokenizer import ByteTokenizer
from tests.server.conftest import MODEL, Server, make_profile, running

HI = {"role": "user", "content": "hi"}


async def test_before_the_engine_is_ready_only_liveness_is_green() -> None:
    def never() -> Engine:
        raise AssertionError("not started in this test")

    app = build_app(InProcessEngineClient(never), ByteTokenizer(), model_name=MODEL)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as http:
        body = {"prompt": "a"}
        statuses = {
            path: (await http.get(path)).status_code
            for path in ("/live", "/health", "/ready", "/version", "/metrics", "/v1/models")
        }
        refused = await http.post("/v1/completions", json=body)
    assert statuses == {
        "/live": 200, "/health": 503, "/ready": 503, "/version": 200, "/metrics": 200,
        "/v1/models": 503,
    }  # fmt: skip
    assert refused.status_code == 503
    assert "being loaded" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]


async def test_a_dead_engine_turns_health_and_readiness_red(server: Server) -> None:
    await server.engine.close()
    assert (await server.http.get("/health")).json()["status"] == "dead"
    assert (await server.http.get("/ready")).status_code == 503
    assert (await server.http.get("/live")).status_code == 200
    assert (await server.complete()).status_code == 503


async def test_server_info_tells_limits_policy_and_profile(server: Server) -> None:
    info = (await server.http.get("/server_info")).json()
    assert info["model"] == MODEL
    assert info["engine"]["max_model_len"] == 128
    assert info["skip"]["defaults"]["policy"] == "never"
    policies = info["skip"]["profile"]["policies"]
    assert policies["ffn_skip"]["points"][0]["threshold"] == 0.9
    assert policies["neurons"]["max_ratio"] == 0.25
    assert policies["neurons"]["points"][0]["kl"] == 0.02
    assert policies["neurons"]["points"][0]["weight_skip_ratio"]["1"] == 0.25
    assert set(policies) == {"ffn_skip", "neurons"}, "those that were measured"


async def test_server_info_tells_what_auto_has_chosen() -> None:
    defaults = SkipDefaults(policy="auto", min_agreement=0.98)
    async with running(skip_profile=make_profile(), skip_defaults=defaults) as server:
        info = (await server.http.get("/server_info")).json()
    assert info["skip"]["defaults"]["min_agreement"] == 0.98
    assert info["skip"]["chosen"] == {"policy": "neurons", "ratio": 0.25, "threshold": None}


async def test_the_model_card_is_constant_and_knows_its_context(server: Server) -> None:
    listed = (await server.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert card["id"] == MODEL
    assert card["max_model_len"] == 128
    assert (await server.http.get(f"/v1/models/{MODEL}")).json() == card
    missing = await server.http.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_tokenizing_tells_what_a_request_would_cost(server: Server) -> None:
    found = (await server.post("/tokenize", {"messages": [HI]})).json()
    usage = (await server.chat(max_tokens=1)).json()["usage"]
    assert found["count"] == len(found["tokens"]) == usage["prompt_tokens"]
    assert found["max_model_len"] == 128
    for name in ("prompt", "content"):
        ids = (await server.post("/tokenize", {name: "hé"})).json()["tokens"]
        assert ids == ByteTokenizer().encode("hé")
    told = (await server.post("/tokenize", {"prompt": "hé", "return_token_strs": True})).json()
    assert told["token_strs"] == ["<s>", "h", "Ã", "©"]
    assert found["token_strs"] is None
    text = (await server.post("/detokenize", {"tokens": [104, 0xC3, 0xA9]})).json()
    assert text == {"prompt": "hé"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"messages": [HI], "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
    ],
)
async def test_tokenizing_ignores_nothing_that_would_change_the_answer(
    server: Server, path: str, body: dict[str, object], param: str
) -> None:
    reply = await server.post(path, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "content": "b"}, {"prompt": 3}])
async def test_tokenizing_wants_exactly_one_text(server: Server, body: dict[str, object]) -> None:
    assert (await server.post("/tokenize", body)).status_code == 400


async def test_the_metrics_tell_what_the_clients_counted() -> None:
    async with running(
        skip_profile=make_profile(), max_num_seqs=4, runner={"step_s": 0.001}
    ) as server:
        replies = await asyncio.gather(
            *(
                server.complete("p" * (i + 1), max_tokens=5 + i, skip={"ratio": 0.2}, stop=stop)
                for i, stop in enumerate([None, None, None, "zzz", "~"])
            )
        )
        refused = await server.complete(max_tokens=0)
        assert refused.status_code == 400
        usages = [reply.json()["usage"] for reply in replies]
        assert replies[-1].json()["choices"][0]["finish_reason"] == "length"

        def value(name: str, **labels: str) -> float:
            registry = server.app.state.metrics.registry
            found = registry.get_sample_value(f"skipllm_{name}", labels)
            assert found is not None, name
            return float(found)

        def total(key: str) -> int:
            return sum(usage[key] for usage in usages)

        assert value("prompt_tokens_total") == total("prompt_tokens")
        assert value("generated_tokens_total") == total("completion_tokens")
        assert value("time_to_first_token_seconds_count") == 5
        assert value("inter_token_latency_seconds_count") == total("completion_tokens") - 5
        assert value("request_latency_seconds_count") == 5
        ratios = [usage["skip"]["skipped_ffn_share"] for usage in usages]
        assert value("request_skip_ratio_count") == 5
        assert value("request_skip_ratio_sum") == pytest.approx(sum(ratios))
        outcomes = {"computed": 0.0, "skipped": 0.0}
        for outcome in outcomes:
            for layer in range(4):
                outcomes[outcome] += value("ffn_blocks_total", layer=str(layer), outcome=outcome)
        skips = [usage["skip"] for usage in usages]
        assert outcomes["skipped"] == sum(skip["skipped_ffn_blocks"] for skip in skips)
        assert sum(outcomes.values()) == sum(skip["total_ffn_blocks"] for skip in skips)
        labels = {"endpoint": "completions"}
        assert value("requests_total", **labels, status="200", finish_reason="length") == 5
        assert value("requests_total", **labels, status="400", finish_reason="none") == 1
        assert value("requests_running") == value("requests_waiting") == 0
        assert value("kv_cache_usage_ratio") == 0


async def test_a_sequence_ended_by_a_stop_string_is_counted_as_its_client_saw_it() -> None:
    async with running(skip_profile=make_profile(), runner={"step_s": 0.001}) as server:
        reply = await server.complete("a", max_tokens=90, stop="p", skip={"ratio": 0.2})
        usage = reply.json()["usage"]
        registry = server.app.state.metrics.registry
        assert reply.json()["choices"][0]["text"] == "bcdefghijklmno"
        assert usage["completion_tokens"] == 15
        assert registry.get_sample_value("skipllm_generated_tokens_total") == 15
        ratio = registry.get_sample_value("skipllm_request_skip_ratio_sum")
        assert ratio == pytest.approx(usage["skip"]["token_skip_ratio"])
        assert ratio > 0


async def test_names_that_clients_send_make_no_metric_series(server: Server) -> None:
    def num_series() -> int:
        return len(server.app.state.metrics.render().splitlines())

    await server.chat(max_tokens=1, user="u")
    await server.chat(model="x")
    before = num_series()
    for i in range(50):
        await server.chat(model=f"model-{i}", user=f"user-{i}")
        await server.http.get(f"/v1/models/{i}", headers={"x-request-id": f"id-{i}"})
    assert num_series() == before


async def test_the_log_tells_why_a_request_was_refused(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.metrics")
    bodies: list[dict[str, object]] = [{"n": 0}, {"model": "x"}, {"max_tokens": 1}]
    told = [(await server.chat(**body)).json().get("error") for body in bodies]
    logged = [vars(record)["error"] for record in caplog.records]
    assert logged == [error and error["message"] for error in told]
    assert logged[0].startswith("Invalid 'n'")
