"""Accuracy per kind: ``python -m skipllm_core.demo.training.evaluate DIR [--write FILE]``."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from skipllm_core.demo.data.heldout import KINDS, HeldOut, held_out_set, is_right
from skipllm_core.demo.training.tokenizer import load_tokenizer


@torch.inference_mode()
def replies(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: list[HeldOut],
    batch_size: int = 64,
    max_new_tokens: int = 160,
) -> list[str]:
    """The greedy reply to each item, in order."""
    prompts = [
        tokenizer.apply_chat_template(
            list(item.messages), tokenize=False, add_generation_prompt=True
        )
        for item in items
    ]
    # Alike lengths together: short questions should not wait for stories.
    order = sorted(range(len(items)), key=lambda i: (items[i].answer is None, len(prompts[i])))
    found = [""] * len(items)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        output = model.generate(  # type: ignore[misc]
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_ids = output[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found


def judge(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[HeldOut]
) -> list[tuple[HeldOut, str, bool]]:
    """(item, reply, whether it is right) for each item."""
    found = replies(model, tokenizer, items)
    return [(item, text, is_right(item, text)) for item, text in zip(items, found, strict=True)]


def accuracies(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    limit: int = 200,
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, float]:
    """Share of right replies per kind, on ``limit`` prompts of each."""
    was_training = model.training
    model.train(False)
    items = [item for kind in kinds for item in held_out_set(kind, limit)]
    judged = judge(model, tokenizer, items)
    model.train(was_training)
    return {
        kind: sum(right for item, _, right in judged if item.kind == kind) / limit for kind in kinds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--write", type=Path, help="write the held-out prompts as JSON lines")
    parser.add_argument("--show", action="store_true", help="print the wrong replies")
    args = parser.parse_args()
    items = [item for kind in args.kinds for item in held_out_set(kind, args.limit)]
    if args.write:
        args.write.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).train(False)
    judged = judge(model, load_tokenizer(args.model), items)
    for kind in args.kinds:
        of_kind = [(item, text, right) for item, text, right in judged if item.kind == kind]
        share = sum(right for *_, right in of_kind) / len(of_kind)
        sys.stdout.write(f"{kind:16s} {share:7.1%} of {len(of_kind)}\n")
        for item, text, right in of_kind:
            if args.show and not right:
                asked = item.messages[-1]["content"]
                sys.stdout.write(f"    {asked!r} -> {text!r}, not {item.answer!r}\n")


if __name__ == "__main__":
    main()
