"""Prompts to calibrate the embedded model: ``python -m skipllm_core.demo.data.prompts > FILE``.

Conversations as in training (fresh ones, training wordings), each up to a question to answer, as
the JSON lines that `skipllm calibrate --prompts` reads. The held-out wordings are not among them.
Stories have more weight than in training: they are what skipping breaks first, and a story that
stands before the last question is read, not generated, so it tells calibration nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice

from skipllm_core.demo.data.dialogues import DialogueMaker, Message, Mixture

SEED = 1_000_003  # not one of training's


def prompts(seed: int = SEED) -> Iterator[list[Message]]:
    """One prompt of each conversation: its messages up to a question, the one about a story if
    there is one, else the last."""
    mixture = Mixture(told_stories=6)
    for messages in DialogueMaker(seed, mixture).conversations():
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        longest = max(answers, key=lambda n: len(messages[n]["content"]))
        yield messages[: longest if len(messages[longest]["content"]) > 150 else answers[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=128)
    args = parser.parse_args()
    for messages in islice(prompts(), args.limit):
        sys.stdout.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
