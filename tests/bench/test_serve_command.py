"""The command `skipllm bench serve`: flags, output, exit codes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from server.cli.bench.fields import response_format
from server.cli.bench.serve import parse_goodput
from server.settings import SettingsError
from tests.bench.other_servers import begin, chunk, other_server
from tests.cli.test_app import REPO, skipllm
from tests.grammar.texts import allowed, compiled, of_schema
from tests.server.conftest import listening, running
from tests.server.test_structured import drawn


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--base-url", "localhost:8000"], "--base-url: must begin with http://"),
        (["--request-rate", "0"], "--request-rate: must be greater than 0"),
        (["--request-rate", "nan"], "--request-rate: must be greater than 0"),
        (["--request-rate", "5", "--max-concurrency", "2"], "--max-concurrency, not both"),
        (["--goodput", "ttft=3"], "--goodput: must be ttft, tpot or e2el with milliseconds"),
        (["--extra-body", "[1]"], "--extra-body: must be a JSON object"),
        (["--structured", "/nowhere.json"], "--structured: cannot read /nowhere.json"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at is not a directory"),
    ],
)
def test_a_bad_flag_ends_with_one_line_and_code_2(args: list[str], line: str) -> None:
    run = skipllm("bench", "serve", *args)
    assert run.returncode == 2
    assert run.stdout == ""
    assert line in run.stderr
    assert run.stderr.count("\n") == 1


def test_bounds_are_names_with_milliseconds() -> None:
    assert parse_goodput(["ttft:200,tpot:50.5", "e2el:3e3"]) == {
        "ttft": 200.0, "tpot": 50.5, "e2el": 3000.0
    }  # fmt: skip
    for bad in ("ttft", "ttft:-1", "ttft:nan", "itl:3", "tpot:x"):
        with pytest.raises(SettingsError, match="--goodput"):
            parse_goodput([bad])


def test_answers_can_be_put_under_a_schema(tmp_path: Path) -> None:
    assert response_format(None) == {}
    builtin = response_format("builtin")["response_format"]["json_schema"]["schema"]
    grammar = compiled(of_schema(builtin))
    assert chr(allowed(grammar.first_mask)[0]) == "["
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    wanted = response_format(str(tmp_path / "schema.json"))["response_format"]
    assert wanted["json_schema"]["schema"] == {"type": "integer"}
    (tmp_path / "schema.json").write_text("[]")
    with pytest.raises(SettingsError, match="--structured"):
        response_format(str(tmp_path / "schema.json"))


async def test_a_schema_keeps_answers_as_long_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    args = ["--num-prompts", "3", "--input-len", "9", "--output-len", "40", "--ignore-eos"]
    args += ["--structured", "builtin", "--json", str(file)]
    async with running(drawn) as server, listening(server.app) as url:
        run = await asyncio.to_thread(skipllm, "bench", "serve", "--base-url", url, *args)
    assert run.returncode == 0, run.stderr
    assert json.loads(file.read_text())["num_output_tokens"] == 120


def test_a_server_that_is_not_there_is_told_in_one_line(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    for args in ([], ["--model", "any"]):
        run = skipllm("bench", "serve", "--base-url", url, *args)
        assert run.returncode == 1
        assert run.stdout == ""
        assert run.stderr == (
            f"error: no server answers at {url} (Connection refused): start one, as with "
            "`skipllm serve`, or name another with --base-url\n"
        )


async def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path,
) -> None:
    file = tmp_path / "out.json"
    args = ["--num-prompts", "5", "--input-len", "9", "--output-len", "4", "--ignore-eos"]
    args += ["--goodput", "ttft:60000", "--json", str(file)]
    async with running() as server, listening(server.app) as url:
        run = await asyncio.to_thread(skipllm, "bench", "serve", "--base-url", url, *args)
    assert run.returncode == 0, run.stderr
    assert run.stderr.strip() == ""
    assert "5 ok, 0 failed" in run.stdout
    assert "100% had ttft <= 60000 ms" in run.stdout
    result = json.loads(file.read_text())
    assert result["num_output_tokens"] == 20
    assert result["base_url"] == url
    assert result["settings"]["max_concurrency"] == 8


async def test_the_exit_code_says_that_all_failed() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "not now"}}, status=503)

    async with other_server(answer) as url:
        args = ("bench", "serve", "--base-url", url, "--num-warmups", "0", "--num-prompts", "3")
        run = await asyncio.to_thread(skipllm, *args)
    assert run.returncode == 1
    assert "0 ok, 3 failed" in run.stdout
    assert "not now" in run.stdout


async def test_an_interrupt_prints_what_was_measured_so_far() -> None:
    is_hanging = asyncio.Event()
    num_asked = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 3:
            is_hanging.set()
            await asyncio.sleep(60)
        return await begin(request, chunk("a"), chunk("b"), "[DONE]")

    async with other_server(answer) as url:
        command = [sys.executable, "-m", "server.cli", "bench", "serve", "--base-url", url]
        command += ["--num-warmups", "0", "--max-concurrency", "1"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        await asyncio.wait_for(is_hanging.wait(), 60)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130, err
    assert b"3 ok, 0 failed" in out
    assert b"interrupted" in out
    assert b"Traceback" not in err


def test_the_extra_that_it_needs_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['aiohttp'] = None\n"
        "from server.cli.app import app\n"
        "app(['bench', 'serve'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: this needs aiohttp: pip install 'skipllm[bench]'\n"


def test_help_loads_nothing_that_it_does_not_need() -> None:
    code = (
        "import sys\n"
        "from server.cli.app import app\n"
        "app(['bench', 'serve', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'aiohttp', 'matplotlib', 'numpy', 'uvloop'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
