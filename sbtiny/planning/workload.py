"""What a stage will do, told by its settings alone: rows, forward passes, tokens. No torch."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sbtiny.config import Settings, micro_batch

Stage = Literal["data", "sft", "grpo", "eval"]
STAGES: tuple[Stage, ...] = get_args(Stage)
PROMPT = 256  # tokens allowed for the question


@dataclass(frozen=True, slots=True)
class Work:
    """The amounts of one stage."""

    stage: Stage
    settings: Settings

    @property
    def decodes(self) -> bool:
        return self.stage != "sft" or not self.settings.sft.data

    @property
    def answer(self) -> int:
        """Tokens that an answer may have."""
        section = {"sft": "data"}.get(self.stage, self.stage)
        return getattr(self.settings, section).max_tokens

    @property
    def micro_batch(self) -> int:
        return micro_batch(self.rows, getattr(self.settings, self.stage).micro_batch) if self.rows else 0

    @property
    def rows(self) -> int:
        """Rows an update."""
        return self.settings.rows(self.stage)

    def divisors(self) -> list[int]:
        return [n for n in range(1, self.rows + 1) if self.rows % n == 0]

    @property
    def longest(self) -> int:
        """Tokens of the longest row in training."""
        return self.settings.sft.max_length if self.stage == "sft" else PROMPT + self.answer

    @property
    def beside(self) -> int:
        """Tokens that a row's contrast takes beside it: its beginning behind two numbers (coldstart/contrast.py)."""
        return 2 * PROMPT if self.stage == "sft" and self.settings.sft.contrast else 0

    @property
    def passes(self) -> int:
        """Forward passes an update, of one process: the gradients of so many are added up."""
        return self.rows // self.micro_batch if self.micro_batch else 0

    def tokens(self) -> dict[str, int]:
        """The most tokens that the stage may sample and train, were every answer as long as it may be; no preflight."""
        s = self.settings
        if self.stage == "grpo":
            each = s.grpo.steps * self.rows
            first = min(s.grpo.limit, s.grpo.steps * s.grpo.prompts)  # b_max: the initial model answers each question once
            return {"sampled": (each * (1 + s.grpo.replace_flat) + first) * self.answer, "trained": each * self.longest}
        if self.stage == "sft":
            kept = min(s.data.keep or s.data.samples, s.data.samples)  # of the answers to a question
            rows = s.sft.steps * s.sft.batch or round(s.data.limit * kept * s.sft.epochs)
            return {"sampled": s.data.limit * s.data.samples * self.answer * self.decodes, "trained": rows * (self.longest + self.beside)}
        answers = s.eval.limit if self.stage == "eval" else s.data.limit * s.data.samples
        return {"sampled": answers * self.answer, "trained": 0}

    def record(self) -> dict[str, Any]:
        return {"micro_batch": self.micro_batch, "gradient_accumulation": self.passes, "tokens_at_most": self.tokens()}
