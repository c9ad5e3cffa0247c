"""Request fields beyond the models: refused if they would change the answer, else ignored aloud.

`REFUSED` and `IGNORED` go through the request classes of OpenAI, vLLM, SGLang and llama.cpp;
docs/api.md says of each why. A field that only one endpoint knows is refused by the others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from server.protocol.validation import unknown, unsupported

logger = logging.getLogger(__name__)

_MAX_NAMES = 100  # that are remembered, so that clients cannot fill the memory with names

Neutral = tuple[object, ...]  # the values that ask for nothing; null never does
_NO: Neutral = (False, "", [], {})

REFUSED: Mapping[str, Neutral] = {
    # Of one endpoint, /tokenize among them, sent to another
    "add_generation_prompt": (True,),
    "add_special_tokens": _NO,  # a chat's template says where such tokens stand
    "chat_template_kwargs": _NO,
    "continue_final_message": _NO,
    "echo": _NO,
    "max_completion_tokens": (),
    "messages": _NO,
    "prompt": _NO,
    "reasoning_effort": ("none",),
    "return_token_strs": _NO,
    "tool_choice": ("none", "auto"),
    "tools": _NO,
    "top_logprobs": (0, False),
    # OpenAI's
    "audio": _NO,
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": _NO,
    "modalities": (["text"], []),
    "moderation": _NO,
    "suffix": _NO,
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": _NO,
    "bad_words": _NO,
    "chat_template": _NO,
    "documents": _NO,
    "ec_transfer_params": _NO,
    "include_reasoning": (True,),
    "kv_transfer_params": _NO,
    "length_penalty": (1,),
    "logits_processors": _NO,
    "logprob_token_ids": _NO,
    "priority": (0,),
    "prompt_embeds": _NO,
    "repetition_detection": _NO,
    "return_prompt_text": _NO,
    "return_weight_versions": _NO,
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "use_beam_search": _NO,
    "vllm_xargs": _NO,
    "watermarking": _NO,
    # SGLang's
    "bootstrap_host": _NO,
    "bootstrap_port": (),
    "bootstrap_room": (),
    "custom_logit_processor": _NO,
    "custom_params": _NO,
    "ebnf": _NO,
    "extra_key": _NO,
    "input_ids": _NO,
    "lora_path": _NO,
    "no_stop_trim": _NO,
    "reasoning": _NO,
    "regex": _NO,
    "return_cached_tokens_details": _NO,
    "return_hidden_states": _NO,
    "return_meta_info": _NO,
    "return_prompt_token_ids": _NO,
    "return_routed_experts": _NO,
    "separate_reasoning": (True,),
    "session_params": _NO,
    "stop_regex": _NO,
    "stream_reasoning": (True,),
    "task": _NO,
    # llama.cpp's
    "adaptive_target": (-1,),
    "chat_format": (),
    "chat_parser": _NO,
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar_lazy": _NO,
    "grammar_triggers": _NO,
    "image_data": _NO,
    "lora": _NO,
    "min_keep": (0,),
    "mirostat": (0,),
    "n_cmpl": (1,),
    "n_indent": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "penalize_nl": _NO,
    "post_sampling_probs": _NO,
    "preserved_tokens": _NO,
    "reasoning_budget_tokens": (-1,),
    "reasoning_format": ("auto",),
    "repeat_last_n": (-1,),
    "repeat_penalty": (1,),
    "response_fields": _NO,
    "return_progress": _NO,
    "return_tokens": _NO,
    "samplers": _NO,
    "system_prompt": _NO,
    "t_max_predict_ms": (0, -1),
    "t_max_prompt_ms": (0, -1),
    "tfs_z": (1,),
    "thinking_forced_open": _NO,
    "timings_per_token": _NO,
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}

# What took the place of a refused one.
SUCCESSORS = {"functions": "tools", "function_call": "tool_choice"}

# Fields that never change the answer of this server.
IGNORED = frozenset(
    {
        # OpenAI's
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier",
        "store", "user",
        # vLLM's
        "guided_decoding_backend", "media_io_kwargs", "mm_payload",
        "mm_processor_kwargs", "return_mm_kwargs", "return_token_offsets",
        "routed_experts_prompt_start", "session_id", "stream_interval",
        # SGLang's
        "custom_labels", "data_parallel_rank", "disagg_prefill_dp_rank", "images_config",
        "max_dynamic_patch", "min_dynamic_patch", "ngram_corpus_id", "rid", "routed_dp_rank",
        "routed_experts_start_len", "use_audio_in_video",
        # llama.cpp's
        "adaptive_decay", "backend_sampling", "cache_prompt", "dry_allowed_length", "dry_base",
        "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent", "id_slot",
        "mirostat_eta", "mirostat_tau", "n_cache_reuse", "n_discard", "n_keep", "parse_tool_calls",
        "reasoning_budget_arm_immediately", "reasoning_budget_end_tag",
        "reasoning_budget_message", "reasoning_budget_start_tag", "speculative.n_max",
        "speculative.n_min", "speculative.ngram_m_hits", "speculative.ngram_size_m",
        "speculative.ngram_size_n", "speculative.p_min", "speculative.type", "xtc_threshold",
    }
)  # fmt: skip


class UnknownFields:
    """Unknown fields that requests bore: how many, and each name once in the log."""

    def __init__(self, *, is_strict: bool = False) -> None:
        self.num_ignored = 0
        self._is_strict = is_strict
        self._seen: set[str] = set()

    def check(self, extra: Mapping[str, object] | None) -> None:
        """Raises InvalidRequestError for what is not supported, and, if strict, for the unknown."""
        for name, value in (extra or {}).items():
            if value is None or name in IGNORED:
                continue
            if name in REFUSED:
                if not any(_is_same(value, neutral) for neutral in REFUSED[name]):
                    raise unsupported(name, SUCCESSORS.get(name))
            elif self._is_strict:
                raise unknown(name[:64])
            else:
                self._ignore(name[:64])

    def _ignore(self, name: str) -> None:
        self.num_ignored += 1
        if name not in self._seen and len(self._seen) < _MAX_NAMES:
            self._seen.add(name)
            logger.warning("ignoring the unknown request field %r", name)


def _is_same(value: object, other: object) -> bool:
    """Equal, and of one kind: `true` is no 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
