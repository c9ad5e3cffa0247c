from pathlib import Path

import pytest
import yaml

from server.settings import Settings, SettingsError
from server.settings_sources import load_settings
from skipllm_core.errors import ConfigError
from skipllm_core.skip.amounts import SkipChoice
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import choose_skip, resolve_skip
from tests.skip.profiles import point, profile

REPO = Path(__file__).parents[1]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def test_defaults_stand_where_nothing_is_said() -> None:
    assert load_settings({"max_num_seqs": None}, {}) == Settings()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    config_file: Path,
) -> None:
    config_file.write_text("port: 1\nseed: 1\nmax_num_seqs: 1\nwarmup_tokens: 1\n")
    environ = {"SKIPLLM_PORT": "2", "SKIPLLM_SEED": "2", "SKIPLLM_MAX_NUM_SEQS": "2"}
    settings = load_settings({"port": "3", "seed": "3"}, environ, config_file)
    assert (settings.port, settings.seed) == (3, 3)
    assert settings.max_num_seqs == 2
    assert settings.warmup_tokens == 1
    assert settings.max_num_batched_tokens == 512


@pytest.mark.parametrize(
    ("flags", "environ", "yaml_text", "message"),
    [
        ({"max_num_seqs": "0"}, {}, "", "--max-num-seqs: must be greater than or equal to 1"),
        ({"dtype": "int8"}, {}, "", "--dtype: must be 'auto', 'bfloat16'"),
        ({"skip_threshold": "-1.1"}, {}, "", "--skip-threshold: must be greater than or equal"),
        ({"skip_ratio": "nan"}, {}, "", "--skip-ratio: must be a finite number"),
        ({"kv_cache_memory": "-4GiB"}, {}, "", "--kv-cache-memory: "),
        ({}, {"SKIPLLM_PORT": "80a"}, "", "PORT: must be a valid integer, but got '80a'"),
        ({}, {"SKIPLLM_SKIP_RATOI": "1"}, "", "RATOI; did you mean 'SKIPLLM_SKIP_RATIO'"),
        ({}, {}, "skip_ration: 0.1", "unknown key 'skip_ration' in .*mean 'skip_ratio'"),
        ({}, {}, "max_num_seqs: true", "'max_num_seqs' in .*: must be a valid integer"),
        ({}, {}, "max_num_seqs: 4.5", "'max_num_seqs' in .*: must be a valid integer"),
        ({}, {}, "- 1", "must be a mapping"),
        ({}, {}, "a: [", "not valid YAML"),
        ({"skip_ratio": "0.1", "skip_threshold": "0.9"}, {}, "", "not both"),
        ({"ssl_keyfile": "k.pem"}, {}, "", "--ssl-keyfile needs --ssl-certfile"),
        ({"skip_ratio": "0.1", "min_agreement": "0.9"}, {}, "", "give --min-agreement or --skip-r"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_line_that_names_it_as_its_source_spells_it(
    flags: dict[str, str],
    environ: dict[str, str],
    yaml_text: str,
    message: str,
    config_file: Path,
) -> None:
    config_file.write_text(yaml_text)
    with pytest.raises(SettingsError, match=message) as raised:
        load_settings(flags, environ, config_file)
    assert "\n" not in str(raised.value)


def profile_to(max_ratio: float) -> SkipProfile:
    return profile(
        point(max_ratio / 2, 0.95, top1_agreement=0.98),
        point(max_ratio, 0.9, top1_agreement=0.95),
        num_layers=8,
    )


@pytest.mark.parametrize(
    ("settings", "max_ratio", "expected"),
    [
        (Settings(), None, SkipChoice()),
        (Settings(), 0.35, SkipChoice("ffn_skip", 0.25)),
        (Settings(), 0.2, SkipChoice("ffn_skip", 0.2)),
        (Settings(skip_ratio=0.1), 0.35, SkipChoice("ffn_skip", 0.1)),
        (Settings(skip_ratio=0), 0.35, SkipChoice()),
        (Settings(skip_threshold=0.9), 0.35, SkipChoice("ffn_skip", threshold=0.9)),
        (Settings(skip_threshold=-0.3), 0.35, SkipChoice("ffn_skip", threshold=-0.3)),
        (Settings.model_validate({"skip_policy": "off"}), 0.35, SkipChoice()),
        (Settings(skip_policy="never", skip_ratio=0.3), 0.35, SkipChoice()),
        (Settings(min_agreement=0.96), 0.4, SkipChoice("ffn_skip", 0.2)),
        (Settings(min_agreement=0.95), 0.4, SkipChoice("ffn_skip", 0.4)),
        (Settings(skip_policy="static"), 0.4, SkipChoice("static", 0.25)),
    ],
)
def test_a_model_with_a_profile_skips_a_quarter_unless_told_otherwise(
    settings: Settings, max_ratio: float | None, expected: SkipChoice
) -> None:
    found = None if max_ratio is None else profile_to(max_ratio)
    assert choose_skip(settings.skip_defaults(found), found) == expected


def test_what_else_is_set_of_skipping_goes_to_every_request() -> None:
    found = profile_to(0.35)
    skip = resolve_skip(Settings(warmup_tokens=5).skip_defaults(found), found, None)
    assert (skip.warmup_tokens, skip.prompt, skip.max_skips) == (5, False, None)
    settings = Settings(max_skips=2, skip_prompt=True)
    skip = resolve_skip(settings.skip_defaults(found), found, None)
    assert (skip.warmup_tokens, skip.prompt, skip.max_skips) == (3, True, 2)


@pytest.mark.parametrize("policy", ["neurons", "static"])
@pytest.mark.parametrize("setting", [{"skip_threshold": 0.9}, {"max_skips": 2}])
def test_a_setting_that_means_nothing_to_the_policy_is_refused_at_start(
    policy: str, setting: dict[str, float]
) -> None:
    (name,) = setting
    settings = Settings.model_validate({"skip_policy": policy, **setting})
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} means nothing to the policy {policy}"):
        settings.skip_defaults(profile_to(0.35))


@pytest.mark.parametrize(
    "settings",
    [
        Settings(skip_policy="ffn_skip"),
        Settings(skip_policy="random"),
        Settings(skip_ratio=0.1),
        Settings(skip_threshold=0.9),
        Settings(min_agreement=0.9),
    ],
)
def test_skipping_that_was_asked_for_is_not_dropped_for_want_of_a_profile(
    settings: Settings,
) -> None:
    with pytest.raises(ConfigError, match="skipllm calibrate"):
        settings.skip_defaults(None)


def test_a_ratio_beyond_the_profile_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"0\.3 is out of reach"):
        Settings(skip_ratio=0.3).skip_defaults(profile_to(0.2))


def test_an_agreement_that_no_ratio_keeps_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"--min-agreement: .* 0\.99: .* is 0\.980"):
        Settings(min_agreement=0.99).skip_defaults(profile_to(0.2))


def test_a_missing_file_is_told() -> None:
    with pytest.raises(SettingsError, match=r"cannot read nowhere\.yaml: No such file"):
        load_settings({}, {}, Path("nowhere.yaml"))


def test_a_threshold_replaces_a_ratio_from_a_weaker_source(config_file: Path) -> None:
    config_file.write_text("skip_ratio: 0.3")
    settings = load_settings({}, {"SKIPLLM_SKIP_THRESHOLD": "0.9"}, config_file)
    assert (settings.skip_ratio, settings.skip_threshold) == (None, 0.9)


def test_an_empty_variable_counts_as_unset() -> None:
    assert load_settings({}, {"SKIPLLM_API_KEY": "", "SKIPLLM_PORT": ""}) == Settings()


def test_the_variables_of_a_kubernetes_service_named_skipllm_are_not_ours() -> None:
    links = {
        "SKIPLLM_SERVICE_HOST": "10.0.0.1",
        "SKIPLLM_SERVICE_PORT": "8000",
        "SKIPLLM_SERVICE_PORT_HTTP": "8000",
        "SKIPLLM_PORT": "tcp://10.0.0.1:8000",
        "SKIPLLM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "SKIPLLM_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load_settings({}, links) == Settings()


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("4GiB", 4 * 2**30), ("512MB", 512 * 10**6), ("1000", 1000)]
)
def test_memory_is_given_with_its_unit(text: str, num_bytes: int) -> None:
    config = load_settings({"kv_cache_memory": text}, {}).engine_config(Path())
    assert config.kv_cache_memory_bytes == num_bytes
    assert type(config.kv_cache_memory_bytes) is int  # it goes through msgpack


def test_keys_come_from_repeated_flags_a_list_or_commas_and_are_never_shown(
    config_file: Path,
) -> None:
    config_file.write_text("api_key: [one, two]")
    assert load_settings({}, {}, config_file).api_key == ("one", "two")
    assert load_settings({"api_key": ["one", "two"]}, {}).api_key == ("one", "two")
    assert load_settings({"api_key": ["one, two", "three"]}, {}).api_key == ("one", "two", "three")
    settings = load_settings({}, {"SKIPLLM_API_KEY": "s3cret, two"})
    assert settings.api_key == ("s3cret", "two")
    assert "s3cret" not in repr(settings)
    config_file.write_text("api_key: [[s3cret]]")
    with pytest.raises(SettingsError) as raised:
        load_settings({}, {}, config_file)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("given", ["a,b,a", ["a", "b"], ["a, b"]])
def test_a_model_may_have_several_names(given: object) -> None:
    settings = load_settings({"served_model_name": given}, {})
    assert (settings.model_name, settings.model_aliases) == ("a", ("b",))
    assert (Settings().model_name, Settings().model_aliases) == ("skipllm-demo", ())
    assert load_settings({"model": "org/name"}, {}).model_name == "org/name"


@pytest.mark.parametrize(
    "given", ['["https://a", "https://b"]', "https://a,https://b", ["https://a", "https://b"]]
)
def test_origins_are_given_as_lists_of_any_kind(given: object) -> None:
    assert load_settings({"allowed_origins": given}, {}).allowed_origins == (
        "https://a",
        "https://b",
    )


@pytest.mark.parametrize(
    ("given", "prefix"), [("/llm", "/llm"), ("llm/v", "/llm/v"), ("/llm/", "/llm"), ("/", "")]
)
def test_a_prefix_begins_with_a_slash_and_ends_without(given: str, prefix: str) -> None:
    assert load_settings({"root_path": given}, {}).root_path == prefix


def test_every_engine_setting_reaches_the_engine() -> None:
    settings = Settings(
        device="cpu",
        dtype="float32",
        load_format="dummy",
        max_model_len=64,
        max_num_seqs=3,
        max_num_batched_tokens=128,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        num_threads=2,
        seed=7,
        max_num_queued_reqs=9,
    )
    config = settings.engine_config(Path("here"))
    for name in settings.model_fields_set:
        assert getattr(config, name) == getattr(settings, name), name


def test_the_example_file_names_every_setting_with_its_default() -> None:
    lines = (REPO / "configs/serve.yaml").read_text().splitlines()
    entries = [line.removeprefix("# ") for line in lines if line.startswith("# ") and ": " in line]
    shown = {
        key: value
        for line in entries
        if (key := line.split(":")[0]) in Settings.model_fields
        for value in [yaml.safe_load(line)[key]]
    }
    assert list(shown) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert shown[name] == default, name


def test_the_example_file_loads(config_file: Path) -> None:
    assert load_settings({}, {}, REPO / "configs/serve.yaml") == Settings()
