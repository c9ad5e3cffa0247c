from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.calibration import read_prompts
from server.settings import SettingsError
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.tokenizer import ByteTokenizer
from tests.test_cli import skipllm

CHAT = '{"messages": [{"role": "user", "content": "hi"}]}'


def test_prompts_are_chats_and_raw_texts_one_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{CHAT}\n\n{{"prompt": "abc"}}\n')
    tokenizer = ByteTokenizer()
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert read_prompts(file, tokenizer) == [chat, tokenizer.encode("abc")]


@pytest.mark.parametrize("line", ["{", "3", '"abc"', "{}", '{"prompt": 3}', '{"messages": [3]}'])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{CHAT}\n{line}\n")
    with pytest.raises(SettingsError, match=r"prompts\.jsonl, line 2: "):
        read_prompts(file, ByteTokenizer())


def test_what_cannot_be_read_or_written_is_told_before_the_measurement(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    run = skipllm("calibrate", "model", "--prompts", "p", "--out", f"{missing}/skip.yaml")
    assert run.returncode == 2
    assert run.stderr == (
        f"error: cannot write {missing}/skip.yaml: {missing} is not a directory\n"
    )
    with pytest.raises(SettingsError, match=r"missing: No such file or directory$"):
        read_prompts(missing, ByteTokenizer())


@pytest.mark.slow
def test_calibrate_writes_a_profile_of_the_model(dummy_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((dummy_model / name).read_bytes())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(f'{{"prompt": "number {n}"}}' for n in range(5)))
    out = tmp_path / "skip.yaml"
    run = skipllm(
        *("calibrate", str(tmp_path), "--prompts", str(prompts), "--out", str(out)),
        *("--max-tokens", "12", "--warmup-tokens", "2", "--num-threads", "1"),
    )
    assert run.returncode == 0, run.stderr
    profile = SkipProfile.load(out)
    profile.check_model(model_fingerprint(tmp_path))
    assert profile.warmup_tokens == 2
    assert profile.num_layers == 6
    assert f"{profile.points[0].threshold:.6f}" in run.stderr
