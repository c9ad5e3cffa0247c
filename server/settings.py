"""Every setting of the server, declared once: type, bounds, default and help.

Command line, environment and YAML file all speak these names: `max_num_seqs` is the flag
`--max-num-seqs`, the variable `SKIPLLM_MAX_NUM_SEQS` and the key `max_num_seqs`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    model_validator,
)

from skipllm_core.config import Consensus, Device, DType, EngineConfig, LoadFormat, Quantization
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import DEFAULT_SKIP_RATIO, OF_POLICIES, SkipDefaults, choose_skip
from skipllm_core.types import SkipPolicyName

ENV_PREFIX = "SKIPLLM_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"  # the file itself; not a setting
EMBEDDED_MODEL_NAME = "skipllm-demo"

ToolCallParser = Literal["auto", "hermes", "llama3_json", "mistral", "none"]
ReasoningParser = Literal["auto", "think", "none"]
LogLevel = Literal["debug", "info", "warning", "error"]

HOW_MUCH_TO_SKIP = frozenset({"skip_ratio", "skip_threshold", "min_agreement"})  # one of them


class SettingsError(ConfigError):
    """A setting that is unknown or out of bounds; the message names it as its source spells it."""


def _split_commas(value: object) -> object:
    """`"a,b"` and `["a,b", "c"]` (a repeated flag) as their items; other things as they are."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def _as_vllm_writes_lists(value: object) -> object:
    """`'["a", "b"]'` as its items, besides what `_split_commas` takes."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and len(texts) == 1 and str(texts[0]).startswith("["):
        try:
            return json.loads(texts[0])
        except ValueError:
            return value
    return _split_commas(value)


def _as_prefix(value: object) -> object:
    """`llm/` as `/llm`, and `/` as no prefix at all."""
    return value and f"/{value.strip('/')}".rstrip("/") if isinstance(value, str) else value


def _off_is_never(value: object) -> object:
    """Requests say `off`, so servers may."""
    return "never" if value == "off" else value


def _setting(panel: str, default: object, help_text: str, **constraints: Any) -> Any:
    """A field with its help, and the panel of `--help` that shows it."""
    return Field(default, description=help_text, json_schema_extra={"panel": panel}, **constraints)


_SkipPolicy = Annotated[Literal["auto", SkipPolicyName], BeforeValidator(_off_is_never)]
_Names = Annotated[tuple[str, ...], BeforeValidator(_as_vllm_writes_lists)]


class Settings(BaseModel):
    """The server's settings, validated and frozen. `None` means "found at start"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = _setting(
        "Model",
        None,
        "A local directory, a GGUF file, or a Hugging Face id (of a GGUF file there: "
        "ORGANISATION/NAME/FILE.gguf). Without it, the embedded model is served.",
    )
    served_model_name: Annotated[tuple[str, ...], BeforeValidator(_split_commas)] = _setting(
        "Model",
        (),
        "The model's name in the API; by default, MODEL as it was given. Several, repeated or "
        "separated by commas: requests may use any, answers bear the first.",
    )
    revision: str | None = _setting(
        "Model", None, "Branch, tag or commit of a Hugging Face id; by default, its main branch."
    )
    tokenizer: str | None = _setting(
        "Model",
        None,
        "A directory, GGUF file or Hugging Face id whose tokenizer and chat template to use; by "
        "default, the model's own.",
    )
    generation_config: str = _setting(
        "Model",
        "auto",
        "Where sampling parameters that a request leaves out come from: auto (the model's "
        "generation_config.json), none (temperature 1, and no limits), or a directory with such "
        "a file.",
    )
    load_format: LoadFormat = _setting(
        "Model", "auto", "How weights are read; dummy: random weights, config.json is enough."
    )
    dtype: DType = _setting(
        "Model", "auto", "Type of the weights; auto: the checkpoint's, and float32 on CPU."
    )
    device: Device = _setting("Model", "auto", "Where the model runs; auto: cuda if there is one.")
    max_model_len: int | None = _setting(
        "Model", None, "Longest prompt plus answer, in tokens; by default, the model's own.", ge=2
    )
    quantization: Quantization = _setting(
        "Model",
        "none",
        "none: weights in --dtype; int8, fp8 (e4m3, CUDA): 8 bits, one scale per output.",
    )
    seed: int = _setting("Model", 0, "Seed of dummy weights.", ge=0, lt=2**63)
    chat_template: Path | None = _setting(
        "Model", None, "Jinja file to use as chat template, instead of the model's own."
    )
    tool_call_parser: ToolCallParser = _setting(
        "Model", "auto", "How the model writes tool calls; auto: as its chat template says."
    )
    reasoning_parser: ReasoningParser = _setting(
        "Model",
        "auto",
        "Whether <think> in answers is reasoning; auto: if the chat template has it.",
    )

    max_num_seqs: int = _setting(
        "Engine", 32, "How many sequences are decoded together.", ge=1, le=4096
    )
    max_num_batched_tokens: int = _setting(
        "Engine",
        512,
        "How many tokens one step may compute; of prompts beside running answers, a quarter.",
        ge=1,
        le=2**20,
    )
    max_num_queued_reqs: int = _setting(
        "Engine", 256, "How many sequences may wait; beyond it, requests get 503.", ge=1
    )
    kv_cache_memory: ByteSize | None = _setting(
        "Engine", None, "Memory of the KV cache, as 4GiB or 512MB.", ge=1
    )
    gpu_memory_utilization: float = _setting(
        "Engine", 0.9, "Without --kv-cache-memory: the share of the GPU's memory to use.",
        gt=0, le=1,
    )  # fmt: skip
    enable_prefix_caching: bool = _setting(
        "Engine", True, "Prompts that begin alike share what was computed of them; on by default."
    )
    enforce_eager: bool = _setting(
        "Engine", False, "Decode with torch's operators alone: slower, to look for faults."
    )
    num_threads: int | None = _setting(
        "Engine",
        None,
        "Threads of the worker on CPU; by default, one per usable core.",
        ge=1,
        le=1024,
    )

    skip_policy: _SkipPolicy = _setting(
        "Skipping",
        "auto",
        "What is skipped. auto: as the policy does that the model's skip profile shows best; "
        "without a profile, nothing. neurons: single neurons of the FFN; ffn_skip: whole blocks; "
        "static, random, layer_drop, early_exit: for comparison; never: nothing.",
    )
    skip_ratio: float | None = _setting(
        "Skipping",
        None,
        "Share of the FFN weights to leave out; the profile turns it into thresholds. "
        f"Default: {DEFAULT_SKIP_RATIO}, or as much as the profile reaches.",
        ge=0,
        le=1,
    )
    skip_threshold: float | None = _setting(
        "Skipping", None, "ffn_skip: cosine similarity from which a token skips; instead of a "
        "ratio.",
        ge=-1, le=1,
    )  # fmt: skip
    min_agreement: float | None = _setting(
        "Skipping",
        None,
        "Instead of a ratio: the largest one of the profile at which this share of the next tokens "
        "is still the full model's.",
        ge=0,
        le=1,
    )
    skip_profile: Path | None = _setting(
        "Skipping",
        None,
        "Skip profile to use; by default, skip.yaml in the model's directory, or what SkipLLM has "
        "measured of the same weights.",
    )
    warmup_tokens: int | None = _setting(
        "Skipping",
        None,
        "First generated tokens that are decoded in full; by default, the profile's.",
        ge=0,
    )
    max_skips: int | None = _setting(
        "Skipping", None, "ffn_skip: FFN blocks that one token may skip at most; by default, any "
        "number.",
        ge=0,
    )  # fmt: skip
    skip_prompt: bool = _setting(
        "Skipping",
        False,
        "Skip over prompts, too, behind their first token, as if they had been generated: what a "
        "benchmark that scores prompts needs to measure skipping. Off by default.",
    )
    skip_batch: Literal["row_exact", "consensus"] = _setting(
        "Skipping",
        "row_exact",
        "What rows of a batch that disagree do; row_exact: each skips by itself, so that no "
        "answer depends on its batch mates; consensus: they skip the same blocks, or leave out the "
        "same neurons (those that matter least to all of them), which saves more weight reads, and "
        "answers depend on their batch mates.",
    )
    consensus_share: float = _setting(
        "Skipping",
        0.5,
        "consensus under ffn_skip: share of the rows that have to reach their thresholds.",
        ge=0,
        le=1,
    )
    consensus_slack: float = _setting(
        "Skipping",
        0.01,
        "consensus under ffn_skip: how far below its threshold no row may be.",
        ge=0,
        le=2,
    )

    host: str = _setting("Server", "127.0.0.1", "Address to listen on; 0.0.0.0: every interface.")
    port: int = _setting("Server", 8000, "Port to listen on; 0: any free one.", ge=0, le=65535)
    api_key: Annotated[tuple[str, ...], BeforeValidator(_split_commas)] = _setting(
        "Server",
        (),
        "Key that clients must send; several: repeat it, or separate by commas.",
        repr=False,
    )
    strict_params: bool = _setting(
        "Server", False, "Answer 400 to unknown request fields instead of ignoring them."
    )
    allowed_origins: _Names = _setting(
        "Server",
        (),
        "Origins whose pages may use the server from a browser; several: repeat it, or separate "
        "by commas; *: all. By default, none.",
    )
    allowed_methods: _Names = _setting("Server", ("*",), "Methods that such pages may use.")
    allowed_headers: _Names = _setting("Server", ("*",), "Headers that such pages may send.")
    allow_credentials: bool = _setting(
        "Server", False, "Let browsers send cookies and the like along from such pages."
    )
    root_path: Annotated[str | None, BeforeValidator(_as_prefix)] = _setting(
        "Server", None, "Prefix below which a proxy serves the API, as /llm."
    )
    ssl_certfile: Path | None = _setting(
        "Server", None, "Certificate, with its chain, in PEM: the server then speaks HTTPS."
    )
    ssl_keyfile: Path | None = _setting(
        "Server", None, "The certificate's key, in PEM; by default, in the certificate's file."
    )
    responses_store_size: int = _setting(
        "Server",
        1000,
        "How many answers of /v1/responses are kept in memory, to be continued by their ids; "
        "the least recently used go first; 0: none.",
        ge=0,
    )
    responses_store_memory: ByteSize = _setting(
        "Server", "64MiB", "How much memory they may take.", ge=0, validate_default=True
    )
    shutdown_timeout: float = _setting(
        "Server", 30.0, "Seconds that running requests have to finish after SIGTERM.", ge=0, le=3600
    )
    log_level: LogLevel = _setting("Server", "info", "Least severe level that is logged.")

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Settings:
        given = [name for name in HOW_MUCH_TO_SKIP if getattr(self, name) is not None]
        if len(given) > 1:
            first, second = sorted(map(flag_of, given), reverse=True)[:2]
            raise ValueError(f"give {second} or {first}, not both")
        return self

    @model_validator(mode="after")
    def _a_key_needs_its_certificate(self) -> Settings:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        return self

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        own = self.model or EMBEDDED_MODEL_NAME
        return self.served_model_name[0] if self.served_model_name else own

    @property
    def model_aliases(self) -> tuple[str, ...]:
        """Its other names, each once."""
        names = dict.fromkeys(self.served_model_name)
        return tuple(name for name in names if name != self.model_name)

    @property
    def is_embedded_model(self) -> bool:
        """Whether the model is the one that is part of the package: by its name, or by default."""
        return self.model in (None, EMBEDDED_MODEL_NAME)

    def engine_config(self, model_dir: Path, tokenizer_dir: Path | None = None) -> EngineConfig:
        memory = self.kv_cache_memory
        return EngineConfig(
            model_dir=model_dir,
            tokenizer_dir=tokenizer_dir,
            device=self.device,
            dtype=self.dtype,
            load_format=self.load_format,
            quantization=self.quantization,
            enforce_eager=self.enforce_eager,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
            kv_cache_memory_bytes=None if memory is None else int(memory),
            gpu_memory_utilization=self.gpu_memory_utilization,
            consensus=Consensus(share=self.consensus_share, slack=self.consensus_slack)
            if self.skip_batch == "consensus"
            else None,
            num_threads=self.num_threads,
            seed=self.seed,
            max_num_queued_reqs=self.max_num_queued_reqs,
        )

    def skip_defaults(self, profile: SkipProfile | None) -> SkipDefaults:
        """What requests that say nothing get. Raises ConfigError where that cannot be done."""
        policy = self.skip_policy
        is_amount = bool(self.skip_ratio or self.min_agreement) or self.skip_threshold is not None
        if profile is None and policy != "never" and (is_amount or policy != "auto"):
            raise ConfigError(
                "skipping needs a skip profile of the model: `skipllm calibrate` makes one, "
                "--skip-profile names it"
            )
        for name, number in (("skip_threshold", "threshold"), ("max_skips", "max_skips")):
            is_of_policy = policy in ("auto", "never", *OF_POLICIES[number])
            if getattr(self, name) is not None and not is_of_policy:
                raise ConfigError(f"{flag_of(name)} means nothing to the policy {policy}")
        defaults = SkipDefaults(
            policy="never" if profile is None else policy,
            ratio=self.skip_ratio,
            threshold=self.skip_threshold,
            min_agreement=self.min_agreement,
            warmup_tokens=self.warmup_tokens,
            max_skips=self.max_skips,
            prompt=self.skip_prompt,
        )
        try:
            choose_skip(defaults, profile)
        except InvalidRequestError as error:
            flag = "" if self.min_agreement is None else "--min-agreement: "
            raise ConfigError(f"{flag}{error}") from None
        return defaults


def flag_of(name: str) -> str:
    """The name of a setting as the command line spells it."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")
