"""What all tests share: few threads, and a model directory without weights."""

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    import torch

# Read by OpenMP when torch is first imported, so torch itself is not imported here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when triton is first imported, by whichever library that is. With a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts what it puts in the background deaf to Ctrl-C; what tests start is not to be.
signal.signal(signal.SIGINT, signal.default_int_handler)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 256,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def dummy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("dummy-model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=[pytest.mark.gpu])])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """Where a test of Triton's kernels runs: on a CUDA device (TRITON_INTERPRET=0 pytest -m gpu),
    else on the CPU, in Triton's interpreter."""
    import torch

    knobs = pytest.importorskip("triton", reason="Triton has no build for this platform").knobs
    if request.param == "interpreter":
        if not knobs.runtime.interpret:
            pytest.skip("the kernels are compiled: TRITON_INTERPRET=0")
        return torch.device("cpu")
    if not torch.cuda.is_available() or knobs.runtime.interpret:
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET=0")
    return torch.device("cuda", 0)
