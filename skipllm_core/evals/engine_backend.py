"""The model in this process, through the engine that the server runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skipllm_core.chat_template import Message
from skipllm_core.engine.engine import Engine
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.evals.choices import choose
from skipllm_core.evals.records import Record, Setting, Timing
from skipllm_core.evals.runner import messages_of, seed_of, skip_wish
from skipllm_core.evals.tasks import Item
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import SamplingParams, SkipParams


class EngineBackend:
    """The engine in this process, with all conversations in it at once."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        profile: SkipProfile | None,
        max_tokens: int,
        seed: int = 0,
        warmup_tokens: int | None = None,
    ) -> None:
        """`warmup_tokens` stand in for the profile's."""
        self._defaults = SkipDefaults(warmup_tokens=warmup_tokens)
        self._engine = engine
        self._tokenizer = tokenizer
        self._profile = profile
        self._max_tokens = max_tokens
        self._seed = seed
        self._num_seqs = 0

    def resolve(self, setting: Setting, budget_tokens: int | None = None) -> SkipParams:
        """Raises ConfigError where the profile or the engine cannot do it."""
        options = SkipOptions(**skip_wish(setting, budget_tokens))
        try:
            return resolve_skip(
                self._defaults, self._profile, options, self._engine.info.skip_policies
            )
        except InvalidRequestError as error:
            raise ConfigError(f"{setting.policy}: {error}") from None

    def lead(
        self, items: Sequence[Item], setting: Setting, budget_tokens: int | None = None
    ) -> Iterator[Record | Timing]:
        skip = self.resolve(setting, budget_tokens)
        if items[0].choices:
            yield from choose(self._engine, self._tokenizer, items, setting, skip)
            return
        talks: dict[int, _Talk] = {}
        for item in items:
            self._ask(_Talk(item), skip, talks)
        tokens = 0
        reads = avoided = duration_s = 0.0
        while (step := self._engine.step()) is not None:
            assert step.stats is not None, "no grammar was refused"
            if step.stats.kind == "decode":
                tokens += step.stats.num_generated_tokens
                duration_s += step.stats.duration_s
                reads += step.stats.ffn_weight_reads
                avoided += step.stats.ffn_weight_reads_avoided
            for output in step.outputs:
                talk = talks[output.seq_id]
                talk.token_ids += output.token_ids
                if output.finish_reason is None:
                    continue
                if output.error is not None:
                    raise RuntimeError(f"the engine failed on {talk.item.id}: {output.error}")
                if output.skip_usage is not None:
                    usage = output.skip_usage
                    talk.skipped += usage.skipped_ffn_share * usage.total_ffn_blocks
                    talk.total += usage.total_ffn_blocks
                talk.num_tokens += len(talk.token_ids)
                talk.answers.append(
                    self._tokenizer.decode(talk.token_ids, skip_special_tokens=True)
                )
                del talks[output.seq_id]
                if len(talk.answers) < len(talk.item.turns):
                    self._ask(talk, skip, talks)
                else:
                    yield talk.record(setting)
        yield Timing(
            setting=setting,
            task=items[0].task,
            num_tokens=tokens,
            duration_s=duration_s,
            ffn_weight_reads=reads,
            ffn_weight_reads_avoided=avoided,
        )

    def _ask(self, talk: _Talk, skip: SkipParams, talks: dict[int, _Talk]) -> None:
        ids = self._tokenizer.encode_chat(talk.messages(), add_generation_prompt=True)
        room = self._engine.info.max_model_len - len(ids)
        if room < 1:
            raise ConfigError(f"{talk.item.id} has {len(ids)} tokens: too long for the model")
        params = SamplingParams(
            max_tokens=min(self._max_tokens, room),
            temperature=0.0,
            seed=seed_of(self._seed, talk.item.id, len(talk.answers)),
            stop_token_ids=tuple(self._tokenizer.eos_token_ids),
            skip=skip,
        )
        talk.token_ids = []
        self._num_seqs += 1
        talks[self._num_seqs] = talk
        self._engine.add(self._num_seqs, ids, params)


class _Talk:
    """One conversation under way."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.answers: list[str] = []
        self.token_ids: list[int] = []
        self.num_tokens = self.total = 0
        self.skipped = 0.0

    def messages(self) -> list[Message]:
        return messages_of(self.item, self.answers)

    def record(self, setting: Setting) -> Record:
        return Record(
            setting=setting,
            task=self.item.task,
            item_id=self.item.id,
            answers=tuple(self.answers),
            num_tokens=self.num_tokens,
            skipped_ffn_blocks=self.skipped,
            total_ffn_blocks=self.total,
        )
