"""A real model is calibrated in a small form, and then leaves neurons out as it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.serving import REPO, Served, serve
from tests.real.texts import STORY

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

QUESTIONS = [
    "What is the capital of Japan?", "Why is the sky blue?", "Name three fruits.",
    "What is photosynthesis?", "Write a sentence about the sea.", "How do I boil an egg?",
    "What is a prime number?", "Who wrote Hamlet?", "What do bees do?",
    "Explain gravity to a child.", "What is a triangle?", "Give advice for a good sleep.",
]  # fmt: skip


@pytest.fixture(scope="module")
def profile(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    prompts = folder / "prompts.jsonl"
    chats = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    prompts.write_text("\n".join(map(json.dumps, chats)))
    options = {"prompts": str(prompts), "out": str(folder / "skip.yaml"), "policies": "neurons"}
    sizes = {"max-tokens": "24", "warmup-tokens": "2"}
    flags = [part for name, value in (options | sizes).items() for part in (f"--{name}", value)]
    run = subprocess.run(
        [sys.executable, "-m", "server.cli", "calibrate", str(smollm2), *flags],
        cwd=REPO,
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    return folder / "skip.yaml"


@pytest.fixture(scope="module")
def skipping(
    smollm2: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("skipping")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        options = ("--skip-profile", str(profile), "--skip-ratio", "0.2")
        sizes = ("--max-model-len", "512", "--max-num-seqs", "2")
        with serve(folder / "log", str(smollm2), *options, *sizes, wait=False) as server:
            server.wait_until_ready(240)
            yield server


def answer(served: Served, **skip: Any) -> tuple[str, dict[str, Any]]:
    """32 tokens, and what was left out of them."""
    with served.openai() as client:
        completion = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=STORY,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=32,
            extra_body={"skip": skip, "ignore_eos": True} if skip else {"ignore_eos": True},
        )
    assert completion.usage is not None
    assert completion.usage.model_extra is not None
    return completion.choices[0].message.content or "", completion.usage.model_extra["skip"]


def test_its_profile_tells_what_leaving_neurons_out_costs(profile: Path) -> None:
    points = yaml.safe_load(profile.read_text())["neurons"]
    assert len(points) > 4
    assert points[0]["top1_agreement"] > 0.9, "5 % are hardly missed"
    assert points[0]["kl"] < points[-1]["kl"]


def test_it_leaves_out_what_it_is_asked_to(skipping: Served) -> None:
    text, usage = answer(skipping)
    assert text
    assert usage["skipped_ffn_share"] == pytest.approx(0.2, abs=0.06)
    full, none = answer(skipping, policy="off")
    assert none["skipped_ffn_share"] == 0
    assert full
    _, more = answer(skipping, ratio=0.3)
    assert more["skipped_ffn_share"] > usage["skipped_ffn_share"]
