"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """By the XDG rules: $XDG_CACHE_HOME/skipllm, or ~/.cache/skipllm. May not exist."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = named if os.path.isabs(named) else os.path.expanduser("~/.cache")
    return Path(base, "skipllm")
