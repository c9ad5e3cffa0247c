import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from server.cli.app import app
from server.cli.calibrate import (
    TEXT_PROMPT_TOKENS,
    built_in_prompts,
    parse_policies,
    read_answers,
    read_prompts,
)
from server.settings import SettingsError
from skipllm_core.calibration.answers import Answer
from skipllm_core.calibration.prompts import BUILT_IN
from skipllm_core.demo import MODEL_DIR
from skipllm_core.errors import InvalidRequestError
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.skip.profile import MEASURED_POLICIES, SkipProfile
from skipllm_core.tokenizer import ByteTokenizer
from tests.cli.test_app import skipllm

CHAT = '{"messages": [{"role": "user", "content": "hi"}]}'


def test_prompts_are_chats_and_raw_texts_one_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{CHAT}\n\n{{"prompt": "abc"}}\n')
    tokenizer = ByteTokenizer()
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert read_prompts(file, tokenizer) == [chat, tokenizer.encode("abc")]


def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    odd = "a\u2028b\u2029c\x85d"  # JSON's strings may hold them; Python parts lines there
    lines = tmp_path / "prompts.jsonl"
    lines.write_bytes(f'\ufeff{{"prompt": "{odd}"}}\r\n{{"prompt":\r"e"}}\n'.encode())
    assert read_prompts(lines, tokenizer) == [tokenizer.encode(odd), tokenizer.encode("e")]
    text = tmp_path / "prompts.txt"
    text.write_bytes(f"\ufeff{odd}\r\nx\r\n\r\ny\f".encode())
    assert read_prompts(text, tokenizer) == [tokenizer.encode(f"{odd}\nx"), tokenizer.encode("y\f")]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.md"])
def test_a_text_files_paragraphs_are_prompts_cut_to_their_beginnings(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    file.write_text(f"\n\nOne line\nand another.\n \n\n{'a' * 100}\n")
    tokenizer = ByteTokenizer()
    first, second = read_prompts(file, tokenizer)
    assert first == tokenizer.encode("One line\nand another.")
    assert second == tokenizer.encode("a" * 100)[:TEXT_PROMPT_TOKENS]


def test_the_built_in_prompts_are_chats_where_the_model_has_them() -> None:
    class Plain(ByteTokenizer):
        def encode_chat(self, *args: object, **kwargs: object) -> list[int]:
            raise InvalidRequestError("no chat template")

    chat = ByteTokenizer()
    assert built_in_prompts(chat)[0] == chat.encode_chat([{"role": "user", "content": BUILT_IN[0]}])
    assert built_in_prompts(Plain())[0] == chat.encode(BUILT_IN[0])
    assert len(set(BUILT_IN)) == len(built_in_prompts(chat)) == 64


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


IDS = '{"prompt_ids": [1, 2], "answer_ids": [3, 4]}'


def test_answers_are_chats_texts_or_ids_one_per_line(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ]
    chat = {"messages": [*turns, {"role": "assistant", "content": "<s>bye"}]}
    file.write_text(f'{json.dumps(chat)}\n\n{{"prompt": "a", "answer": "bc"}}\n{IDS}\n')
    tokenizer = ByteTokenizer()
    assert list(read_answers(file, tokenizer)) == [
        Answer(tokenizer.encode_chat(turns), list(b"<s>bye")),
        Answer(tokenizer.encode("a"), list(b"bc")),
        Answer([1, 2], [3, 4]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        CHAT,
        '{"prompt": "a"}',
        '{"prompt": "a", "answer": ""}',
        '{"prompt": "a", "answer": "b", "prompt_ids": [1], "answer_ids": [1]}',
        '{"prompt_ids": [1]}',
        '{"prompt_ids": [1], "answer_ids": []}',
        '{"prompt_ids": [-1], "answer_ids": [1]}',
        '{"prompt_ids": [99999999999999999999], "answer_ids": [1]}',
        '{"messages": []}',
        '{"messages": [{"role": "assistant"}]}',
    ],
)
def test_a_bad_line_of_answers_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(f"{IDS}\n{line}\n")
    with pytest.raises(SettingsError, match=r"answers\.jsonl, line 2: "):
        list(read_answers(file, ByteTokenizer()))


def test_policies_are_named_with_commas() -> None:
    assert parse_policies("neurons, static,neurons") == ("neurons", "static")
    for wrong in ("", "never", "neurons,", "all"):
        with pytest.raises(SettingsError, match=r"--policies '\w*': not one of ffn_skip, neurons"):
            parse_policies(wrong)


@pytest.mark.slow
def test_the_embedded_model_is_calibrated_with_prompts_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.cli.calibrate.NUM_DEMO_PROMPTS", 8)
    command = [
        "calibrate",
        "skipllm-demo",
        "--max-tokens",
        "12",
        "--warmup-tokens",
        "1",
        "--num-threads",
        "1",
        "--policies",
        "ffn_skip,neurons",
    ]
    result = CliRunner().invoke(app, [*command, "--cold-start", "0", "--cold-end", "4"])
    assert result.exit_code == 0, result.output
    profile = SkipProfile.load(tmp_path / "skip.yaml")
    profile.check_model(model_fingerprint(MODEL_DIR))
    shipped = SkipProfile.load(MODEL_DIR / "skip.yaml")
    for layer, same in zip(profile.similarity, shipped.similarity, strict=True):
        assert layer.mean == pytest.approx(same.mean, abs=0.1)
        assert layer.block_influence == pytest.approx(same.block_influence, abs=0.1)
    assert {point.region for point in profile.ffn_skip} == {(0, 4)}
    assert profile.neurons


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
    prompts.write_text("\n".join(f'{{"prompt": "number {n}"}}' for n in range(4)))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(f'{{"prompt": "number 5", "answer": "{"so it is " * 3}"}}')
    out = tmp_path / "skip.yaml"
    run = skipllm(
        *(
            "calibrate",
            str(tmp_path),
            "--prompts",
            str(prompts),
            "--answers",
            str(answers),
            "--out",
            str(out),
        ),
        *("--max-tokens", "12", "--warmup-tokens", "2", "--num-threads", "1"),
    )
    assert run.returncode == 0, run.stderr
    profile = SkipProfile.load(out)
    profile.check_model(model_fingerprint(tmp_path))
    assert profile.warmup_tokens == 2
    assert profile.num_layers == 6
    assert profile.num_prompts == 3
    for policy in MEASURED_POLICIES:
        point = profile.points(policy)[0]
        row = rf"{policy} +{point.target_ratio:.0%} +{point.skipped_ffn_share:.1%}"
        assert re.search(row, run.stderr)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"--skip-profile {out}" in run.stderr.replace("\n", "")
    assert not list(tmp_path.glob("*.partial"))
