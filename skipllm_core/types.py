"""What passes between the parts: small frozen dataclasses, encoded as they are by msgspec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

FinishReason = Literal["stop", "length", "abort", "error"]
SkipPolicyName = Literal[
    "never", "ffn_skip", "neurons", "static", "random", "layer_drop", "early_exit"
]
StepKind = Literal["prefill", "decode"]
# By layer: how many neurons one token left out before up, and of the others before down.
LayerNeurons: TypeAlias = tuple[tuple[int, int], ...]

ROWS_PER_NEURON = 3  # of FFN weights: of gate, of up, and of down, which is stored as its column
MAX_GRAMMAR_BYTES = 128 * 1024  # of one sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipParams:
    """One sequence's skip settings, fully resolved: the numbers that the decode step's gate reads.

    Skippable layers are `cold_start <= layer < cold_end`; the rest always run. The first
    `warmup_tokens` generated tokens (the one sampled from the prompt included) come from the full
    model. With `prompt`, the prompt's tokens behind its first are computed as if they had been
    generated: by the same rules, and the warm-up counts from them on.

    Under `ffn_skip` a row triggers at the first skippable layer whose cos(h, h + FFN(h)) >=
    `threshold`, and skips from the next layer on; `max_skips` bounds the FFN blocks that one token
    may skip.

    Under `neurons` a token leaves out, layer by layer, the neurons of the feed-forward whose score
    is below the layer's threshold: `up_thresholds` before the row of up is read, `down_thresholds`
    again before that of down (see `skip.neurons`). A threshold of 0 leaves nothing out.

    The fields below those are of the policies in `skip.baselines`.
    """

    policy: SkipPolicyName = "never"
    threshold: float = 1.0
    warmup_tokens: int = 25
    cold_start: int = 0
    cold_end: int = 0
    max_skips: int | None = None
    trace: bool = False
    prompt: bool = False
    up_thresholds: tuple[float, ...] = ()  # neurons: one per layer
    down_thresholds: tuple[float, ...] = ()
    layers: tuple[int, ...] = ()  # static, layer_drop: what is skipped
    probability: float = 0.0  # random: of each skippable layer
    first_exit: int = 0  # early_exit: how many layers the first token runs; the last, cold_start
    budget_tokens: int | None = None  # early_exit: when the last is reached; None: at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is generated. Every field is final: defaults were resolved at the edge."""

    max_tokens: int  # 0: the prompt is computed, and nothing is generated
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # always set; a request without one was given a random one
    logprobs: int | None = None  # how many top alternatives; None: no logprobs at all
    prompt_logprobs: int | None = None  # the same of the prompt's tokens behind its first
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids included unless ignore_eos
    # What the whole answer has to follow: a grammar of llguidance's, in Lark or as its JSON.
    grammar: str | None = None
    cache_salt: str = ""  # prompts share K/V only with those of the same salt
    skip: SkipParams = field(default_factory=SkipParams)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own distribution (before
    temperature and penalties), as OpenAI reports them."""

    logprob: float  # of the token that stands there
    top_ids: tuple[int, ...]  # best first, as many as `SamplingParams` says
    top_logprobs: tuple[float, ...]
    rank: int | None = None  # of the token that stands there, 1 the best; told of prompts alone


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipUsage:
    """What skipping did to one sequence, counted over its decode steps and, with `skip.prompt`,
    the prompt's tokens behind the first.

    Rows are those of the FFN weights: of each neuron one of gate, one of up and one of down, all
    of the same length. A skipped block leaves out all of its layer's.
    """

    skipped_ffn_blocks: int = 0
    total_ffn_blocks: int = 0  # tokens counted x all layers
    skipped_ffn_rows: int = 0
    total_ffn_rows: int = 0  # tokens counted x all rows of all layers
    warmup_tokens: int = 0  # tokens that fell into the warm-up

    @property
    def token_skip_ratio(self) -> float:
        """Skipped FFN blocks / (decoded tokens x all layers), as the paper counts it."""
        return self.skipped_ffn_blocks / self.total_ffn_blocks if self.total_ffn_blocks else 0.0

    @property
    def skipped_ffn_share(self) -> float:
        """Share of the FFN weights that were not used, whatever the policy: by it policies are
        compared. Where whole blocks are skipped it is the `token_skip_ratio`."""
        return self.skipped_ffn_rows / self.total_ffn_rows if self.total_ffn_rows else 0.0


def total_skip_usage(usages: Iterable[SkipUsage]) -> SkipUsage:
    """Of several sequences."""
    found = list(usages)
    return SkipUsage(
        skipped_ffn_blocks=sum(usage.skipped_ffn_blocks for usage in found),
        total_ffn_blocks=sum(usage.total_ffn_blocks for usage in found),
        skipped_ffn_rows=sum(usage.skipped_ffn_rows for usage in found),
        total_ffn_rows=sum(usage.total_ffn_rows for usage in found),
        warmup_tokens=sum(usage.warmup_tokens for usage in found),
    )


def num_rows_left_out(neurons: LayerNeurons) -> int:
    """Rows of FFN weights: of a neuron that is out before up two, as gate is always read."""
    return sum(2 * before_up + before_down for before_up, before_down in neurons)


def sum_by_layer(counts: Sequence[Sequence[tuple[int, int]]]) -> LayerNeurons:
    """Of tokens; those that ran all their neurons have none. () where all did."""
    counted = [of_token for of_token in counts if of_token]
    return tuple(
        (sum(up for up, _ in layer), sum(down for _, down in layer))
        for layer in zip(*counted, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqOutput:
    """What one engine step did for one sequence. The last one bears a `finish_reason`."""

    seq_id: int
    token_ids: tuple[int, ...] = ()  # a stop token included: it was generated, and counts
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token when asked for
    # When asked for, one per prompt token behind the first, in their order: those that this step
    # computed. All of them come before or with the first token.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    skipped_layers: tuple[tuple[int, ...], ...] = ()  # one per token when traced
    # One per token when traced under `neurons`; () of a token that ran them all.
    skipped_neurons: tuple[LayerNeurons, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the last of token_ids, which ended it; not part of the text
    error: str | None = None  # with finish_reason "error"
    is_request_fault: bool = False  # the error is one of the request's grammar
    queue_s: float | None = None  # with the prompt's end: arrival to first scheduling
    num_cached_tokens: int | None = None  # with the prompt's end: those of it not computed
    skip_usage: SkipUsage | None = None  # so far: a reader may end the sequence at a stop string
    num_preemptions: int = 0  # with the last output


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step as the metrics see it; running, waiting and used are counted after it."""

    kind: StepKind
    duration_s: float
    num_running: int
    num_waiting: int
    num_kv_blocks_used: int
    num_kv_blocks: int
    host_s: float = 0.0  # from scheduling to launched, where the device computes meanwhile
    num_prompt_tokens: int = 0  # computed by this step (recomputed ones included)
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_cache_queries: int = 0  # prompt tokens of the sequences that this step admitted,
    num_prefix_cache_hits: int = 0  # and how many of them were in the prefix cache
    # Per layer: tokens of this step that ran the FFN. Counted are those of a decode step, and
    # prompt tokens under `skip.prompt`.
    ffn_computed: tuple[int, ...] = ()
    ffn_skipped: tuple[int, ...] = ()  # per layer: tokens that skipped it
    # Per layer: neurons of tokens that ran the FFN without them. Empty: there were none.
    neurons_skipped_before_up: tuple[int, ...] = ()
    neurons_skipped_before_down: tuple[int, ...] = ()
    # In layers' worth of FFN weights: read by this decode step, and wanted by none of its rows.
    ffn_weight_reads: float = 0.0
    ffn_weight_reads_avoided: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Everything one step has to tell, in one message."""

    outputs: tuple[SeqOutput, ...]
    stats: StepStats | None  # None: nothing was computed, and the outputs tell of refusals only


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a started engine says of itself."""

    max_model_len: int
    vocab_size: int  # the width of the logits; may exceed the tokenizer's
    num_layers: int
    num_neurons: int  # of a layer's FFN
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int
    device: str
    dtype: str
    num_parameters: int
    skip_policies: tuple[SkipPolicyName, ...] = get_args(SkipPolicyName)  # that it can run


EngineState = Literal["starting", "ready", "restarting", "stuck", "dead"]


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The engine as /health tells it; only `ready` is healthy."""

    state: EngineState
    detail: str = ""
