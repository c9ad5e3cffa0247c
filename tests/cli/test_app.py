import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.settings import Settings, flag_of

REPO = Path(__file__).parents[2]


def skipllm(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *args],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_names_every_setting_with_its_help_and_default() -> None:
    run = skipllm("serve", "--help")
    assert run.returncode == 0
    words = " ".join(run.stdout.replace("│", " ").split())
    for name, field in Settings.model_fields.items():
        assert flag_of(name) in words, name
        assert field.description is not None
        assert field.description in words, name
    assert "Default: 512." in words


def test_help_shows_flags_whole_and_under_headings_in_a_narrow_terminal() -> None:
    lines = skipllm("serve", "--help", COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert {"Model:", "Engine:", "Skipping:", "Server:"} <= set(lines)
    flags = {line.split()[0] for line in lines if line.startswith("  --")}
    assert {flag_of(name) for name in Settings.model_fields} <= flags | {"MODEL"}


def test_help_loads_neither_torch_nor_the_web_framework() -> None:
    code = (
        "import sys\n"
        "from server.cli.app import app\n"
        "app(['serve', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'zmq', 'tokenizers', 'numpy'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_help_answers_quickly() -> None:
    def once() -> float:
        start = time.monotonic()
        skipllm("--help")
        return time.monotonic() - start

    # 0.3 s on an idle machine; the bound has room for a loaded one.
    assert min(once() for _ in range(3)) < 1.5


@pytest.mark.parametrize(
    ("args", "environ", "line"),
    [
        (["--max-num-seqs", "0"], {}, "--max-num-seqs: must be greater than or equal to 1"),
        (["--skip-ratio", "1.5"], {}, "--skip-ratio: must be less than or equal to 1"),
        (["--config", "nowhere.yaml"], {}, "cannot read nowhere.yaml"),
        ([], {"SKIPLLM_CONFIG": "nowhere.yaml"}, "cannot read nowhere.yaml"),
        ([], {"SKIPLLM_PROT": "1"}, "SKIPLLM_PROT; did you mean 'SKIPLLM_PORT'?"),
    ],
)
def test_a_bad_setting_ends_with_one_line_and_code_2(
    args: list[str], environ: dict[str, str], line: str
) -> None:
    run = skipllm("serve", *args, **environ)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert line in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_misspelt_flag_names_the_nearest() -> None:
    run = skipllm("serve", "--max-num-seq", "3")
    assert run.returncode == 2
    assert "--max-num-seqs" in run.stderr


def test_a_model_that_is_not_there_ends_with_one_line_and_code_1() -> None:
    run = skipllm("serve", "/nowhere/at/all", "--port", "0")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "error: /nowhere/at/all: no such directory"
    assert "Traceback" not in run.stderr


def test_an_unsupported_model_is_told_before_its_profile_and_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "skip.yaml").write_text("of: another model")
    run = skipllm("serve", str(tmp_path), "--port", "0")
    assert run.returncode == 1
    assert "'gpt2' is not supported" in run.stderr.splitlines()[-1]
    assert run.stdout == ""


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"\xff", "utf-8"), (b"{% if %}", "compile")]
)
def test_a_chat_template_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    template = tmp_path / "mine.jinja"
    if content is not None:
        template.write_bytes(content)
    run = skipllm("serve", "--chat-template", str(template), "--port", "0")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert reason in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = skipllm("serve", "--port", str(port))
    assert run.returncode == 1
    assert run.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_the_version_is_told() -> None:
    assert skipllm("--version").stdout.startswith("skipllm 0.")
