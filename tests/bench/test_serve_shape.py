"""`skipllm bench shape`: models without weights that can be served, and seen by their clients."""

from pathlib import Path

from skipllm_core.demo import MODEL_DIR
from skipllm_core.model.config import load_model_config
from skipllm_core.tokenizer import HFTokenizer
from tests.cli.test_app import skipllm


def test_a_shape_is_a_model_whose_every_token_has_text(tmp_path: Path) -> None:
    run = skipllm("bench", "shape", "163m", str(tmp_path / "model"))
    assert run.returncode == 0, run.stderr
    assert f"skipllm serve {tmp_path}/model --load-format dummy" in run.stdout
    config = load_model_config(tmp_path / "model")
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    tokenizer, embedded = HFTokenizer(tmp_path / "model"), HFTokenizer(MODEL_DIR)
    assert all(tokenizer.token_bytes(token_id) for token_id in range(config.vocab_size))
    text = "What is the capital of t3000 France?"
    assert tokenizer.encode(text) == embedded.encode(text)


def test_an_unknown_shape_is_told_in_one_line(tmp_path: Path) -> None:
    run = skipllm("bench", "shape", "3b", str(tmp_path / "model"))
    assert run.returncode == 2
    assert run.stderr.startswith("error: NAME: must be one of 163m, ")
    assert not (tmp_path / "model").exists()
