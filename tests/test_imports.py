"""Imports point one way: server -> client -> worker -> engine; and few files know torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
HTTP = {"aiohttp", "fastapi", "starlette", "uvicorn", "pydantic", "server"}
TORCH = {"torch", "triton", "transformers"}

# What computes; everything else of skipllm_core must load without torch.
COMPUTES = (
    "skipllm_core/runner/",
    "skipllm_core/kernels/",
    "skipllm_core/evals/",
    "skipllm_core/bench/",
    "skipllm_core/demo/",
    "skipllm_core/model/",
    "skipllm_core/skip/",
    "skipllm_core/calibration/",
)
COMPUTES_NOT = (
    "skipllm_core/bench/__init__.py",
    "skipllm_core/bench/latency.py",
    "skipllm_core/bench/load.py",
    "skipllm_core/bench/shapes.py",
    "skipllm_core/demo/__init__.py",
    "skipllm_core/model/__init__.py",
    "skipllm_core/model/checkpoint.py",
    "skipllm_core/model/config.py",
    "skipllm_core/model/fingerprint.py",
    "skipllm_core/model/gguf/",
    "skipllm_core/model/hub.py",
    "skipllm_core/model/weights.py",
    "skipllm_core/runner/__init__.py",
    "skipllm_core/skip/__init__.py",
    "skipllm_core/skip/profile.py",
)


def sources(package: str) -> list[Path]:
    return sorted((REPO / package).rglob("*.py"))


def imported(path: Path, *, at_load: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `at_load`, without those inside functions."""
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif not (at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def is_under(path: Path, places: tuple[str, ...]) -> bool:
    name = path.relative_to(REPO).as_posix()
    return any(name == place or (place[-1] == "/" and name.startswith(place)) for place in places)


def test_the_server_does_not_know_torch() -> None:
    for path in sources("server"):
        assert not top_levels(path) & TORCH, path


def test_the_engine_does_not_know_http() -> None:
    for path in sources("skipllm_core"):
        assert not top_levels(path) & HTTP, path


def test_only_what_computes_knows_torch() -> None:
    for path in sources("skipllm_core"):
        if not is_under(path, COMPUTES) or is_under(path, COMPUTES_NOT):
            assert not top_levels(path) & TORCH, path


# From the cellar up: a part imports only from the floors below its own, and from itself.
FLOORS = {
    "skipllm_core": (
        {"errors", "tainted", "types", "user_cache"},
        {"config", "messages", "chat_template"},
        {"control_tokens", "special_tokens"},
        {"tokenizer"},
        {"grammar"},
        {"detokenizer", "sequence"},
        {"engine", "model"},
        {"skip"},
        {"kernels"},
        {"runner"},
        {"calibration", "worker"},
        {"client"},
        {"demo"},
        {"bench", "evals"},
    ),
    "server": (
        {"parts", "settings"},
        {"protocol"},
        {"tools"},
        {"errors", "ffn_metrics", "logs", "openapi", "settings_sources"},
        {"cors", "error_forms", "lifecycle", "metrics", "response_store", "sse"},
        {"tolerance", "translation"},
        {"guard", "service"},
        {"generation"},
        {"messages", "responses"},
        {"routes"},
        {"app"},
        {"cli"},
    ),
}


def parts_imported(path: Path, package: str) -> Iterator[str]:
    """The package's parts (files and folders of its first level) that a file imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
    for name in imported(path):
        if name.startswith(f"{package}."):
            yield name.split(".")[1]


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_points_up(package: str) -> None:
    floors = {part: floor for floor, parts in enumerate(FLOORS[package]) for part in parts}
    for path in sources(package):
        part = path.relative_to(REPO / package).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for other in set(parts_imported(path, package)) - {part}:
            assert floors[other] < floors[part], f"{path} imports {other}"


def test_the_model_never_says_skip() -> None:
    for path in sources("skipllm_core/model"):
        # The hub's list of files is the one exception: a model's profile travels with it.
        text = path.read_text("utf-8").replace('"skip.yaml"', "").replace("skipllm_core", "")
        assert "skip" not in text.lower(), path


def test_loading_the_server_does_not_load_torch() -> None:
    code = (
        "import sys, server.app, server.cli.app, server.cli.launch, skipllm_core.client\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"
