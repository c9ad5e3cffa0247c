"""Training: ``python -m skipllm_core.demo.training.train --out DIR [--resume] [--decay N]``.

Plain next-token training on the assistant's words; no dropout and nothing that favours skipping.
The rate warms up and stays constant; ``--decay N`` takes N more steps from the rate at hand down to
zero, then exports. A file named ``stop`` in the folder saves and ends the run.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from skipllm_core.demo.training.batches import Batch, make_batch
from skipllm_core.demo.training.evaluate import accuracies
from skipllm_core.demo.training.export import export
from skipllm_core.demo.training.muon import StackedMuon
from skipllm_core.demo.training.tokenizer import (
    VOCAB_SIZE,
    Renderer,
    load_tokenizer,
    train_tokenizer,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the run besides its length."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 12
    num_heads: int = 6
    num_kv_heads: int = 3
    num_rows: int = 4
    row_length: int = 512
    muon_lr: float = 3e-3
    adam_lr: float = 3e-3
    warmup_steps: int = 100
    seed: int = 0


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            # Wider than the tokenizer, as most served models are.
            vocab_size=VOCAB_SIZE + 64,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Trainer:
    """A run that lives in ``folder``: tokenizer, newest checkpoint, and a log in JSON lines."""

    def __init__(self, folder: Path, recipe: Recipe, *, compile_model: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.recipe = folder, recipe
        if not (folder / "tokenizer.json").exists():
            train_tokenizer().save_pretrained(folder)
        self.tokenizer = load_tokenizer(folder)
        self._renderer = Renderer(self.tokenizer)
        self.model = build_model(recipe, self.tokenizer)
        named = dict(self.model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self._optimizers = [
            StackedMuon(matrices, lr=recipe.muon_lr),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
        self.step, self.num_tokens, self.train_s = 0, 0, 0.0
        self.rate = 1.0  # of the base learning rates; decays to 0
        self._hidden: Any = torch.compile(self._trunk) if compile_model else self._trunk

    def _trunk(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model.model(inputs, use_cache=False).last_hidden_state
        return hidden

    def loss(self, batch: Batch) -> Tensor:
        """Weighted mean cross-entropy; the head runs only where a target is judged."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self._hidden(batch.inputs).flatten(0, 1)[batch.where]
            logits = self.model.lm_head(hidden)
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        return (losses * batch.weights).sum() / batch.weights.sum()

    def train_step(self) -> float:
        """One step at ``rate`` times the base learning rates; returns its loss."""
        start = time.perf_counter()
        recipe = self.recipe
        batch = make_batch(
            self._renderer, recipe.seed, self.step, recipe.num_rows, recipe.row_length
        )
        warmup = min(1.0, (self.step + 1) / recipe.warmup_steps)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * self.rate * warmup
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += batch.inputs.numel()
        self.train_s += time.perf_counter() - start
        return loss.item()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
            "step": self.step,
            "num_tokens": self.num_tokens,
            "train_s": self.train_s,
            "rate": self.rate,
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            base = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, base_lr in zip(optimizer.param_groups, base, strict=True):
                group["base_lr"] = base_lr
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.train_s, self.rate = state["train_s"], state["rate"]

    def log(self, **values: float) -> None:
        record = {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "train_s": round(self.train_s, 1),
            **{name: round(value, 4) for name, value in values.items()},
        }
        line = json.dumps(record) + "\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line)


def train(trainer: Trainer, args: argparse.Namespace) -> None:
    """Runs to ``args.steps``, or down to rate zero in the steps or minutes given, then exports."""
    last = trainer.step + args.decay if args.decay else args.steps
    if args.decay_minutes:
        last = sys.maxsize
    start_s, start_rate = time.monotonic(), trainer.rate
    fall = trainer.rate / args.decay if args.decay else 0.0
    running = 0.0
    while trainer.step < last and trainer.rate > 0:
        loss = trainer.train_step()
        if args.decay_minutes:
            left = 1 - (time.monotonic() - start_s) / (60 * args.decay_minutes)
            trainer.rate = max(0.0, start_rate * left)
        else:
            trainer.rate = max(0.0, trainer.rate - fall)
        running = loss if running == 0.0 else 0.98 * running + 0.02 * loss
        if trainer.step % args.log_every == 0:
            trainer.log(loss=running, rate=trainer.rate)
        if trainer.step % args.eval_every == 0:
            trainer.save()
            trainer.log(**accuracies(trainer.model, trainer.tokenizer, limit=args.eval_limit))
        if (trainer.folder / "stop").exists():
            trainer.save()
            return
    trainer.save()
    export(trainer.model, trainer.tokenizer, trainer.folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--decay", type=int, default=0)
    parser.add_argument("--decay-minutes", type=float, help="let the clock choose the last step")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--eval-limit", type=int, default=60)
    parser.add_argument("--compile", action="store_true")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    trainer = Trainer(args.out, recipe, compile_model=args.compile)
    if args.resume:
        trainer.resume()
    train(trainer, args)


if __name__ == "__main__":
    main()
