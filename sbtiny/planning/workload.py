"""Rows, forward passes and tokens of a stage, from its settings alone. No torch."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sbtiny.config import AUTO, AUTO_LIMIT, Settings, micro_batch_size

StageName = Literal["data", "sft", "grpo", "eval"]
STAGES: tuple[StageName, ...] = get_args(StageName)
PROMPT_TOKENS = 256  # tokens allowed for the question


@dataclass(frozen=True, slots=True)
class StageWorkload:
    """Amounts of one stage."""

    stage: StageName
    settings: Settings

    @property
    def decodes(self) -> bool:
        return self.stage != "sft" or not self.settings.sft.rows

    @property
    def sampling(self) -> Any:
        """The section that samples answers; the cold start may first sample its own rows."""
        return getattr(self.settings, "data" if self.stage == "sft" else self.stage)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer; the most that a probe may choose where it is to: of sampled rows what can be trained."""
        if self.sampling.max_tokens != AUTO:
            return self.sampling.max_tokens
        return min(AUTO_LIMIT, max(1, self.max_row_tokens - PROMPT_TOKENS)) if self.stage == "sft" else AUTO_LIMIT

    @property
    def micro_batch(self) -> int:
        return micro_batch_size(self.rows, getattr(self.settings, self.stage).micro_batch) if self.rows else 0

    @property
    def rows(self) -> int:
        """Rows of an update."""
        return self.settings.batch_size(self.stage)

    def divisors(self) -> list[int]:
        return [n for n in range(1, self.rows + 1) if self.rows % n == 0]

    @property
    def max_row_tokens(self) -> int:
        """Most tokens of a row in training."""
        return self.settings.sft.max_length if self.stage == "sft" else PROMPT_TOKENS + self.max_new_tokens

    @property
    def contrast_tokens(self) -> int:
        """Most tokens of a row's contrast: the row after another budget; where unsloth may train, after its own once more."""
        s = self.settings.sft
        passes = 1 if self.settings.backend == "transformers" else 2
        return passes * self.max_row_tokens if self.stage == "sft" and s.contrast and s.contrast_share else 0

    @property
    def gradient_accumulation(self) -> int:
        """Forward passes of one process in an update; their gradients are added up."""
        return self.rows // self.micro_batch if self.micro_batch else 0

    @property
    def tokens_at_most(self) -> dict[str, int]:
        """Most tokens that the stage samples and trains, with answers of full length; without a preflight."""
        s = self.settings
        if self.stage == "grpo":
            rows = s.grpo.steps * self.rows
            b_max = min(s.grpo.limit, s.grpo.steps * s.grpo.prompts_per_step)  # the initial model answers each question once
            return {"sampled": (rows * (1 + s.grpo.resample_zero_std) + b_max) * self.max_new_tokens, "trained": rows * self.max_row_tokens}
        if self.stage == "sft":
            rows_kept = min(s.data.rows_per_question or s.data.samples_per_question, s.data.samples_per_question)  # for each question
            rows = s.sft.steps * s.sft.batch or round(s.data.limit * rows_kept * s.sft.epochs)
            return {
                "sampled": s.data.limit * s.data.samples_per_question * self.max_new_tokens * self.decodes,
                "trained": round(rows * (self.max_row_tokens + self.contrast_tokens * s.sft.contrast_share)),
            }
        answers = s.eval.limit if self.stage == "eval" else s.data.limit * s.data.samples_per_question
        return {"sampled": answers * self.max_new_tokens, "trained": 0}

    def record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("max_new_tokens", "micro_batch", "gradient_accumulation", "tokens_at_most")}
