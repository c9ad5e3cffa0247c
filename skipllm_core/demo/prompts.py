"""Prompts to calibrate the embedded model with: ``python -m skipllm_core.demo.prompts > FILE``.

Conversations as in training (fresh ones, training wordings), each up to a question to answer, as
the JSON lines that `skipllm calibrate --prompts` reads. The held-out wordings are not among them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice

from skipllm_core.demo.dialogues import DialogueMaker, Message

SEED = 1_000_003  # not one of training's


def prompts(seed: int = SEED) -> Iterator[list[Message]]:
    """One prompt of each conversation: its messages up to the last question."""
    for messages in DialogueMaker(seed).conversations():
        yield messages[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=256)
    args = parser.parse_args()
    for messages in islice(prompts(), args.limit):
        sys.stdout.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
