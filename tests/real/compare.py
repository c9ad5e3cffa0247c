"""A GGUF file as it is read here beside transformers' reading of the same file.

    python -m tests.real.compare FILE.gguf

Weights bit for bit, the ids of a page and of a chat, logits, and a greedy answer through the
engine. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipllm_core.config import EngineConfig
from skipllm_core.model.hub import resolve_model
from skipllm_core.model.loader import _targets, load_model
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SamplingParams
from skipllm_core.worker import build_engine
from tests.model.test_parity import Paged, prefill_in_one_go
from tests.real.texts import CHAT, PAGE, STORY

NUM_TOKENS = 48
tell = partial(Console(soft_wrap=True).print, markup=False, highlight=False)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def of_transformers(file: Path, tokenizer: Any, ids: Tensor) -> tuple[dict[str, str], Tensor, Any]:
    started_s = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tell(f"transformers loads it in {time.perf_counter() - started_s:.1f} s")
    weights = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    logits = model(ids[None]).logits[0]
    prompt = tokenizer.apply_chat_template(STORY, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    answer = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
    return weights, logits, answer[0, prompt.shape[1] :].tolist()


def greedy(model_dir: Path, tokenizer: HFTokenizer) -> list[int]:
    engine = build_engine(EngineConfig(model_dir=model_dir, max_model_len=512, max_num_seqs=1))
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=tokenizer.eos_token_ids
    )
    engine.add(1, tokenizer.encode_chat(STORY), params)
    ids: list[int] = []
    while (step := engine.step()) is not None:
        ids += [token for output in step.outputs for token in output.token_ids]
    return ids


def main() -> None:
    file = Path(sys.argv[1])
    started_s = time.perf_counter()
    model_dir = resolve_model(str(file))
    tell(f"model directory in {time.perf_counter() - started_s:.2f} s")
    ours, theirs = (
        HFTokenizer(model_dir),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    chat = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    page = ours.encode(PAGE)
    tell(f"ids equal: page of {len(page)} {page == theirs.encode(PAGE)}, ", end="")
    tell(f"chat of {len(chat)} {ours.encode_chat(CHAT) == chat}")

    started_s = time.process_time()  # of one core: nothing here runs on several
    model = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    loaded_s = time.process_time() - started_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    tell(f"loaded in {loaded_s:.1f} CPU s: {size:.2f} GiB, the process at most {peak:.2f} GiB")
    ids = torch.tensor((chat + page)[:256])
    paged = Paged(model, [ids])
    with torch.no_grad():
        prefill_in_one_go(paged)
    found = paged.all_logits()[0]
    weights = {name: digest(target.view) for name, target in _targets(model).items()}
    del model, paged
    gc.collect()
    answer = greedy(model_dir, ours)
    gc.collect()

    expected_weights, expected, expected_answer = of_transformers(file, theirs, ids)
    differing = [name for name in weights if weights[name] != expected_weights[name]]
    tell(f"{len(weights)} tensors, {len(differing)} differ {differing[:5]}")
    tell(f"logits up to {expected.abs().max():.1f}, ", end="")
    tell(f"differ by at most {(found - expected).abs().max():.1e}; ", end="")
    tell(f"largest ones equal: {torch.equal(found.argmax(-1), expected.argmax(-1))}")
    length = min(len(answer), len(expected_answer))
    tell(f"greedy answer of {len(answer)} tokens equal: ", end="")
    tell(answer[:length] == expected_answer[:length], repr(ours.decode(answer)))


if __name__ == "__main__":
    main()
