"""A GGUF file is a model directory: made once, found again, and gone with the file's state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from gguf import GGUFWriter

from server.protocol.sampling import SamplingDefaults
from skipllm_core.errors import ConfigError, UnsupportedModelError
from skipllm_core.model.config import load_model_config
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.model.gguf import directory
from skipllm_core.model.hub import resolve_model, resolve_tokenizer
from tests.model.checkpoints import make_oracle
from tests.model.gguf.files import Edit, write_gguf

REPO = Path(__file__).parents[3]


def tiny(path: Path, *, seed: int = 0, edit: Edit | None = None, **changes: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    oracle = make_oracle("llama2", seed, num_hidden_layers=1, **changes)
    return write_gguf(path, oracle, edit=edit)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny(tmp_path / "models" / "tiny.gguf")


def test_the_directory_has_what_model_directories_have(file: Path, cache: Path) -> None:
    made = resolve_model(str(file))
    assert made.is_relative_to(cache / "skipllm" / "gguf")
    assert sorted(entry.name for entry in made.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "skip.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.gguf",
    ]
    assert (made / "weights.gguf").resolve() == file
    assert resolve_tokenizer(str(file)) == made
    assert load_model_config(made).num_layers == 1


def test_it_is_made_once_until_the_file_changes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model(str(file))
    monkeypatch.setattr(directory, "read_header", lambda path: pytest.fail("made again"))
    assert resolve_model(str(file)) == first
    assert resolve_model(str(first)) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(first.parents[2]))
    tiny(file, vocab_size=580)
    second = resolve_model(str(file))
    assert second != first
    assert load_model_config(second).vocab_size == 580


def test_a_file_that_is_refused_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    file = tiny(tmp_path / "tiny.gguf")
    data = file.read_bytes()
    file.write_bytes(data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.xxx"))
    resolve_model(str(file))  # without the name: the default
    file.write_bytes(data.replace(b"qwen2", b"what?"))
    with pytest.raises(UnsupportedModelError, match="what"):
        resolve_model(str(file))
    assert len(list((cache / "skipllm" / "gguf").iterdir())) == 1


def test_many_at_once_make_one(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(resolve_model, [str(file)] * 8))
    (only,) = made
    assert list(only.parent.iterdir()) == [only]


def test_without_a_cache_it_is_a_temporary_one_of_the_process(file: Path, tmp_path: Path) -> None:
    """Nothing can be made under a file, whoever one is."""
    blocked = tmp_path / "blocked"
    blocked.touch()
    code = (
        "import sys\nfrom skipllm_core.model.hub import resolve_model\n"
        "from skipllm_core.model.config import load_model_config\n"
        "made = resolve_model(sys.argv[1])\n"
        "print(made, load_model_config(made).num_layers)\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=REPO,
        env=os.environ | {"XDG_CACHE_HOME": str(blocked), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    made, num_layers = run.stdout.split()
    assert Path(made).parent == temporary
    assert num_layers == "1"
    assert list(temporary.iterdir()) == [], "it goes with the process"
    assert "cannot be written" in run.stderr


def test_where_nothing_can_be_written_it_is_one_line(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(cache / "none"))
    with pytest.raises(ConfigError, match="no place for its config and tokenizer") as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)


def test_any_name_of_a_file_will_do(tmp_path: Path, cache: Path) -> None:
    file = tiny(tmp_path / ("模型 " * 20 + ".Q4 \\.gguf"))
    made = resolve_model(str(file))
    assert made.is_relative_to(cache)
    assert load_model_config(made).num_layers == 1


def test_a_directory_with_one_file_is_that_file(file: Path) -> None:
    made = resolve_model(str(file))
    assert resolve_model(str(file.parent)) == made
    (file.parent / "README.md").touch()
    assert resolve_model(str(file.parent)) == made


def test_a_directory_with_several_names_them(file: Path) -> None:
    for number in range(7):
        (file.parent / f"other-{number}.gguf").touch()
    with pytest.raises(ConfigError) as caught:
        resolve_model(str(file.parent))
    assert str(caught.value) == (
        f"{file.parent}: several models, name one of its files: other-0.gguf, other-1.gguf, "
        "other-2.gguf, other-3.gguf, other-4.gguf and 3 more"
    )


def test_a_directory_with_safetensors_is_itself(file: Path) -> None:
    (file.parent / "model.safetensors").touch()
    assert resolve_model(str(file.parent)) == file.parent


def test_a_file_has_no_revision(file: Path) -> None:
    with pytest.raises(ConfigError, match="a file, which has no revision v2"):
        resolve_model(str(file), revision="v2")


@pytest.mark.parametrize("name", ["./no.gguf", "/no/such.gguf", "no.gguf", "folder/no.gguf"])
def test_a_file_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        resolve_model(name)


@pytest.mark.parametrize("inside", ["tiny.gguf", "q4/tiny.gguf"])
def test_of_a_hub_repository_only_the_file_is_fetched(
    file: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def hf_hub_download(repo_id: str, filename: str, *, revision: str | None) -> str:
        asked.append((repo_id, filename, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert resolve_model(f"org/name/{inside}", revision="v2") == resolve_model(str(file))
    assert asked == [("org/name", inside, "v2")]


def test_a_file_that_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def hf_hub_download(repo_id: str, filename: str, **options: Any) -> str:
        raise OSError("404 Client Error.\n\nEntry Not Found for url.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(ConfigError, match=r"org/name/a\.gguf: no such file, and not to") as caught:
        resolve_model("org/name/a.gguf")
    assert "\n" not in str(caught.value)


def test_a_profile_beside_the_file_is_the_models(file: Path) -> None:
    made = resolve_model(str(file))
    assert not (made / "skip.yaml").exists()
    (file.parent / "skip.yaml").write_text("measured")
    assert (made / "skip.yaml").read_text() == "measured"


def test_the_fingerprint_is_of_the_weights_wherever_they_lie(file: Path, tmp_path: Path) -> None:
    def of(path: Path) -> str:
        return model_fingerprint(resolve_model(str(path)))

    first = of(file)
    elsewhere = tmp_path / "elsewhere.gguf"
    elsewhere.write_bytes(file.read_bytes())
    assert of(elsewhere) == first
    assert of(tiny(tmp_path / "named.gguf", edit=lambda writer: writer.add_name("x"))) == first
    assert of(tiny(tmp_path / "other.gguf", seed=1)) != first


def test_what_the_makers_recommend_is_the_default(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_sampling_temp(0.5)
        writer.add_sampling_top_k(40)
        writer.add_sampling_penalty_repeat(1.25)

    defaults = SamplingDefaults.of_model(resolve_model(str(tiny(tmp_path / "a.gguf", edit=edit))))
    assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty) == (0.5, 40, 1.25)
    assert defaults.top_p == 1.0


def write_keys(**values: Any) -> Edit:
    """Keys of the architecture, `a__b` for `a.b`."""

    def edit(writer: GGUFWriter) -> None:
        for name, value in values.items():
            key = f"llama.{name.replace('__', '.')}"
            match value:
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
                case str():
                    writer.add_string(key, value)
                case list():
                    writer.add_array(key, value)

    return edit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count 8 is not supported"),
        ({"attention__causal": False}, r"attention\.causal False is not supported"),
        ({"logit_scale": 0.5}, r"llama\.logit_scale 0\.5 is not supported"),
        ({"attention__key_length": 24}, r"key_length is 24, not the 12 dimensions of a head"),
        ({"rope__scaling__type": "su"}, r"scaling\.type is 'su', not none, linear or yarn"),
        ({"rope__scaling__type": "yarn"}, r"rope\.scaling\.factor is missing"),
        ({"attention__sliding_window": "9"}, r"sliding_window is '9', not an integer"),
        (
            {"attention__sliding_window": 9, "attention__sliding_window_pattern": [True, False]},
            r"sliding_window_pattern is \[True, False\], not true or false for every layer",
        ),
    ],
)
def test_what_nobody_here_computes_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    file = tiny(tmp_path / "tiny.gguf", edit=write_keys(**values))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    file = tiny(tmp_path / "tiny.gguf")
    data = file.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gemma", 1)
    file.write_bytes(data)
    with pytest.raises(
        UnsupportedModelError,
        match="architecture is 'gemma'; supported: llama, mistral, qwen2, qwen3",
    ):
        resolve_model(str(file))


def test_one_file_of_several_is_refused(tmp_path: Path) -> None:
    file = tiny(tmp_path / "a.gguf", edit=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(UnsupportedModelError, match="one file of several"):
        resolve_model(str(file))


def test_a_value_of_each_layer_is_the_models_where_all_are_equal(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(
        file,
        make_oracle("llama2"),
        edit=lambda writer: writer.add_array("llama.attention.sliding_window", [7, 7, 7]),
    )
    assert load_model_config(resolve_model(str(file))).windows == (7, 7, 7)


def test_the_config_says_how_the_numbers_are_stored(tmp_path: Path) -> None:
    def dtype(kind: str) -> Any:
        from gguf import GGMLQuantizationType

        oracle = make_oracle("llama2", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        file = write_gguf(tmp_path / f"{kind}.gguf", oracle, kind=GGMLQuantizationType[kind])
        return json.loads((resolve_model(str(file)) / "config.json").read_text())["dtype"]

    assert [dtype(kind) for kind in ("F16", "BF16", "F32", "Q8_0")] == [
        "float16",
        "bfloat16",
        "float32",
        "float32",
    ]
