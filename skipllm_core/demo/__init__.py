"""The embedded chat model: its weights, and what made its data, tokenizer and weights."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
