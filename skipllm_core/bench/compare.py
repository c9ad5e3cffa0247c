"""The same work done by transformers, on the same weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from skipllm_core.bench.bandwidth import synchronize
from skipllm_core.model.gguf.directory import LINK, is_directory_of_gguf


class TransformersModel:
    """A checkpoint in transformers' own model, in eval mode."""

    def __init__(
        self, model_dir: Path, *, dtype: torch.dtype, device: torch.device, is_dummy: bool = False
    ) -> None:
        """`is_dummy`: random weights of its own, config.json is enough."""
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if is_dummy:
            config = AutoConfig.from_pretrained(model_dir)
            with torch.device(device):
                self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
        else:
            of_file = {"gguf_file": LINK} if is_directory_of_gguf(model_dir) else {}
            model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **of_file)
            self._model = model.to(device)
            for parameter in self._model.parameters():
                # Into memory of its own, as ours are: pages mapped from a file are slower to read.
                parameter.data = parameter.data.clone()
        # The model's own would stop at its end of sequence, or sample.
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, pad_token_id=0
        )
        self.device = device
        self.itemsize = dtype.itemsize

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[list[int]], num_tokens: int, *, is_static: bool = False
    ) -> tuple[list[float], list[list[int]]]:
        """`generate` of exactly so many tokens, greedily, for prompts of one length.

        Returns the seconds of each of its num_tokens - 1 decode steps, from the logits of one
        token to those of the next, and the tokens of every row. `is_static`: with a static cache,
        for which transformers compiles its forward on a GPU.
        """
        input_ids = torch.tensor(prompts, device=self.device)
        clock = _Clock(self.device)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            use_cache=True,
            cache_implementation="static" if is_static else None,
            logits_processor=LogitsProcessorList([clock]),
        )
        tokens: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        steps = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
        return steps, tokens

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> tuple[float, int]:
        """A forward over the prompt that fills a cache, with the logits of its last token only.
        Returns its seconds and the token it gives."""
        input_ids = torch.tensor([prompt], device=self.device)
        synchronize(self.device)
        start = time.perf_counter()
        output = self._model(input_ids, use_cache=True, logits_to_keep=1)
        token_id = int(output.logits[0, -1].argmax())
        return time.perf_counter() - start, token_id


class _Clock(LogitsProcessor):
    """Notes when each token's logits are there. It is all that `generate` does more because of us:
    a call per step."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        synchronize(self._device)
        self.times.append(time.perf_counter())
        return scores


def write_random_weights(model_dir: Path, *, dtype: torch.dtype, seed: int) -> None:
    """Gives a directory with a config.json a checkpoint that both can load: norms of one, matrices
    N(0, 1 / inputs), as the load format `dummy` has them. Raises OSError."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(model_dir)
        )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(parameter.shape, dtype=dtype)
        if "norm" in name
        else torch.empty(parameter.shape, dtype=dtype).normal_(
            0.0, parameter.shape[-1] ** -0.5, generator=generator
        )
        for name, parameter in model.named_parameters()  # a tied head is not among them
    }
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
