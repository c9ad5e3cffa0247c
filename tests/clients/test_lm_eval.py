"""lm-eval's multiple choice, on a small local task, over /v1/completions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.serving import REPO, Served

pytestmark = pytest.mark.slow

MODEL = REPO / "skipllm_core" / "demo" / "model"
CITIES = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo"}
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|bos|><|user|>What is the capital of {{{{country}}}}?<|end|><|assistant|>"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write_task(directory: Path) -> None:
    questions = directory / "questions.jsonl"
    documents = [
        {
            "country": country,
            "choices": [f"The capital of {country} is {other}." for other in CITIES.values()],
            "label": list(CITIES.values()).index(city),
        }
        for country, city in CITIES.items()
    ]
    questions.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (directory / "capitals.yaml").write_text(TASK.format(questions=questions))


def evaluate(served: Served, directory: Path, batch_size: int) -> tuple[float, list[Any]]:
    """Its accuracy, and every question's samples."""
    model_args = {
        "model": "skipllm-demo",
        "base_url": f"{served.url}/v1/completions",
        "tokenizer": MODEL,
        "tokenizer_backend": "huggingface",
        "max_retries": 1,
        "max_length": 512,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--tasks", "capitals", "--include_path", str(directory), "--log_samples"]
    command += ["--batch_size", str(batch_size)]
    command += ["--output_path", str(directory / "out"), "--model_args"]
    command += [",".join(f"{key}={value}" for key, value in model_args.items())]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    done = subprocess.run(
        command,
        env=os.environ | offline,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (directory / "out").rglob("results_*.json")
    (samples,) = (directory / "out").rglob("samples_*.jsonl")
    accuracy = json.loads(results.read_text())["results"]["capitals"]["acc,none"]
    return accuracy, [json.loads(line) for line in samples.read_text().splitlines()]


@torch.no_grad()
def log_likelihoods(context: str, choices: list[str]) -> list[float]:
    """transformers' own, of each choice behind the context."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    found = []
    for choice in choices:
        ids = tokenizer(context + choice, add_special_tokens=False, return_tensors="pt").input_ids
        logprobs = model(ids).logits[0].log_softmax(-1)
        found.append(sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_multiple_choice_scores_what_transformers_scores(
    embedded: Served, tmp_path: Path, batch_size: int
) -> None:
    write_task(tmp_path)
    accuracy, samples = evaluate(embedded, tmp_path, batch_size)
    assert accuracy == 1.0, "the embedded model knows its capitals"
    assert len(samples) == len(CITIES)
    sample = samples[0]
    context = sample["arguments"]["gen_args_0"]["arg_0"]
    expected = log_likelihoods(context, sample["doc"]["choices"])
    scored = [float(response[0][0]) for response in sample["resps"]]
    assert scored == pytest.approx(expected, abs=2e-3)
