"""Which model this is, told in a moment even for many gigabytes of weights. No torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from skipllm_core.model.checkpoint import read_json_object
from skipllm_core.model.weights import has_weights, read_tensors

_SAMPLE_BYTES = 4096
_INCIDENTAL = {"_name_or_path", "transformers_version", "use_cache"}  # differ for the same model


def model_fingerprint(model_dir: Path) -> str:
    """sha256 (hex) over config.json in canonical form and, of every tensor, its name, dtype, shape
    and the 4 KiB in its middle.

    Any fine-tuning changes it; sharding does not. A directory of dummy weights has its config only.
    Raises UnsupportedModelError when config.json or a file of weights is broken.
    """
    config = read_json_object(model_dir / "config.json")
    canonical = {name: value for name, value in config.items() if name not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode())
    tensors = read_tensors(model_dir) if has_weights(model_dir) else {}
    for name, info in sorted(tensors.items()):
        digest.update(json.dumps([name, info.dtype, info.shape]).encode())
        with info.file.open("rb") as stream:
            stream.seek(max(info.start, (info.start + info.end - _SAMPLE_BYTES) // 2))
            digest.update(stream.read(min(_SAMPLE_BYTES, info.end - info.start)))
    return digest.hexdigest()
