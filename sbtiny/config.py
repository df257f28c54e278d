"""Settings of every stage: frozen and checked. load_settings.py reads them; a field's comment is its meaning in docs/settings.md."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

import yaml

from sbtiny.budget.protocol import FormatName, parse_budget_option
from sbtiny.budget.reward import RewardConfig, Schedule
from sbtiny.errors import InputError

AUTO = "auto"  # max_tokens that follows the model's own lengths
AUTO_LIMIT = 8192  # the most that it may choose
UPSTREAM_KEY = "SBTINY_UPSTREAM_KEY"  # of the environment: settings are printed and saved, so a key is none of them
BackendName = Literal["auto", "unsloth", "transformers"]
EngineName = Literal["ours", "generate", "vllm"]
Reporter = Literal["none", "tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a setting may have: a test, and what the error line asks for."""

    holds: Callable[[Any], bool]
    wanted: str


AT_LEAST_0 = Range(lambda value: value >= 0, "0 or more")
Count = Annotated[int, Range(lambda value: value >= 1, "1 or more")]
CountOr0 = Annotated[int, AT_LEAST_0]
AtLeast0 = Annotated[float, AT_LEAST_0]
Above0 = Annotated[float, Range(lambda value: value > 0, "a number above 0")]
Share = Annotated[float, Range(lambda value: 0 <= value <= 1, "a share from 0 to 1")]
ShareBelow1 = Annotated[float, Range(lambda value: 0 <= value < 1, "a share from 0 to below 1")]
MaxTokens = Annotated[int | str, Range(lambda value: value == AUTO or (isinstance(value, int) and value >= 1), "1 or more, or auto")]
TopP = Annotated[float, Range(lambda value: 0 < value <= 1, "above 0 and at most 1 (1 is off)")]
Seed = Annotated[int, Range(lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2**32")]
GroupSize = Annotated[int, Range(lambda value: value >= 2, "a group of 2 or more (the paper's is 5)")]
GroupTemperature = Annotated[float, Range(lambda value: value > 0, "above 0: equal answers teach nothing")]
Chance = Annotated[float, Range(lambda value: 0 < value < 1, "a chance between 0 and 1, such as 0.9")]
ChanceOrNone = Annotated[float | None, Range(lambda value: value is None or 0 < value < 1, "between 0 and 1, such as 0.5, or null")]
CountOrNone = Annotated[int | None, Range(lambda value: value is None or value >= 1, "1 or more, or null for none")]
TokensOrNone = Annotated[float | None, Range(lambda value: value is None or value >= 1, "1 token or more, or null for none")]
GibOrNone = Annotated[float | None, Range(lambda value: value is None or value > 0, "a number of GiB above 0, or null")]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """What a question is asked with, in training and ever after: a run keeps it in run.json, an export in its chat template."""

    instruction: str | None = None  # a line after each user turn; null: the model's own by `sbtiny models`, "": none
    system: str | None = None  # system turn of a chat that brings none; null or "": none but the chat template's own

    def without_empty(self) -> "PromptSettings":
        """The same with null for "": a model's own is filled in by now, and a run that is resumed says "" for none."""
        return PromptSettings(instruction=self.instruction or None, system=self.system or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Cold-start data: the model's own correct answers."""

    task: str = "arithmetic"  # source of the questions: arithmetic, gsm8k, math, still3, s1k, or a file
    limit: Count = 1200  # number of questions
    samples_per_question: Count = 4  # answers sampled for each question
    rows_per_question: CountOr0 = 2  # correct answers kept for each question, spread from the shortest to the longest; 0 keeps all
    budget_quantile: ChanceOrNone = None  # foretell this quantile of a question's answer lengths as its budget; null: each answer's own
    temperature: AtLeast0 = 0.7  # sampling temperature
    max_tokens: MaxTokens = 900  # most tokens of an answer; auto: by a probe of the model's own lengths
    verifier: str = "auto"  # how answers are checked: auto, numeric, math, choice, exact, regex, or my.py:check
    max_num_seqs: Count = 64  # most sequences decoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """Cold start. The paper states neither epochs, learning rate nor batch: the defaults suit the bundled model by experiment."""

    rows: str | None = None  # file of labelled rows (JSONL); null samples them first
    epochs: Above0 = 6.0  # passes over the rows; with fewer than 6 and no contrast, some seeds do not learn to follow a budget
    steps: CountOr0 = 0  # number of updates; 0 takes epochs
    learning_rate: Above0 = 2e-3  # peak learning rate
    max_grad_norm: Above0 = 1.0  # gradients are clipped to this norm
    batch: Count = 4  # rows per update
    micro_batch: Count = 4  # most rows per forward pass; the largest divisor of an update's rows up to it is used
    max_length: Count = 1024  # most tokens of a row; a longer row is an error
    warmup: Share = 0.05  # share of the updates over which the learning rate rises
    contrast: AtLeast0 = 0.0  # weight of the contrast loss: an answer must be likelier after its own budget than after another; paper: 0
    contrast_share: Share = 1.0  # share of the updates, from the first, that have the contrast
    lora_rank: Count = 32  # rank of the LoRA adapter
    lora_alpha: Count = 64  # scale of the LoRA adapter: its output is multiplied by lora_alpha / lora_rank
    save_steps: CountOr0 = 0  # updates between checkpoints; 0 saves none


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Budget-guided GRPO. "paper" marks the paper's value; dev/LOG.md has the reasons for the others."""

    questions: str | None = None  # file of questions (JSONL); null takes task
    task: str = "arithmetic"  # source of the questions if there is no file
    verifier: str = "auto"  # how answers are checked: auto, numeric, math, choice, exact, regex, or my.py:check
    limit: Count = 4000  # number of training questions to draw from
    steps: Count = 120  # number of updates
    prompts_per_step: Count = 8  # questions per update
    num_generations: GroupSize = 8  # answers per question: the group size
    micro_batch: Count = 16  # most answers per forward pass; the largest divisor of an update's answers up to it is used
    learning_rate: Above0 = 7e-4  # peak learning rate
    lr_scheduler_type: Literal["cosine", "constant_with_warmup"] = "cosine"  # learning-rate schedule after the warm-up
    max_grad_norm: Above0 = 0.1  # gradients are clipped to this norm
    warmup: Share = 0.03  # share of the updates over which the learning rate rises
    beta: AtLeast0 = 0.0  # weight of the KL penalty; 0 needs no reference model
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"  # TRL's loss
    temperature: GroupTemperature = 0.8  # sampling temperature; at 1.0 many stated budgets are noise
    max_tokens: MaxTokens = 640  # most tokens of an answer; auto: by a probe of the lengths of the policy and of the initial model
    alpha_start: float = 6.0  # alpha at the first update: half the window's width, as a share of the budget
    alpha_end: float = 0.1  # alpha at the end
    alpha_schedule: Schedule = "linear"  # how alpha falls; fixed: alpha_end throughout
    alpha_hold: ShareBelow1 = 0.6  # last share of the updates, in which alpha stays at alpha_end; paper: 0
    relabel_per_group: int = 1  # answers relabelled in each group with a stated budget; paper: 0
    relabel_per_user_group: int = 2  # answers relabelled in each group with a given budget; paper: 0
    outside_slope: float = 0.1  # largest reward lost, below s_min, by a length outside the window (of a given budget: 0.5); paper: 0
    reward_peak: Share = 1.0  # where in the window of a stated budget the reward peaks: 1 at the budget, 0 at the edge (paper)
    user_share: Share = 0.5  # share of groups with a given budget; paper: 0
    cut_share: Share = 0.0  # share of groups that are cut below their stated budget and learn to finish
    wrap_up: str | None = None  # text put into an answer that is cut; null: by the format
    reserve: CountOrNone = None  # tokens for the wrap-up and the final answer; null: 64, or 512 after thoughts
    user_low: float = 0.3  # smallest given budget, as a multiple of the stated one
    user_high: float = 4.0  # largest given budget, as a multiple of the stated one; at most b_max or twice the stated one, and max_tokens
    b_max_from_best: bool = False  # limit b_max to 1 + alpha times the shortest correct answer so far
    b_max_if_failed: TokensOrNone = None  # b_max of questions that the initial model failed, in tokens; null (paper): no bound
    resample_zero_std: bool = False  # resample a group of equal rewards, once, with another question
    alarm_patience: Count = 20  # consecutive updates that must meet an alarm's condition
    save_steps: CountOr0 = 50  # updates between checkpoints; 0 saves none
    sample_steps: Count = 10  # updates between logged samples
    max_num_seqs: Count = 64  # most sequences decoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """Held-out evaluation."""

    task: str = "arithmetic"  # source of the questions: arithmetic, gsm8k, math, math500, aime25, or a file
    split: Literal["test", "val", "train"] = "test"  # split of the source
    limit: Count = 500  # number of questions
    budget: str = "auto"  # auto: stated by the model; N: given, in tokens; 0.5x: given, as a multiple of the stated one
    temperature: AtLeast0 = 0.6  # sampling temperature; paper: 0.6
    top_p: TopP = 0.95  # nucleus sampling: share of the probability that is kept; 1 is off
    cut_at: AtLeast0 = 0.0  # cut answers at this share of their budget; 0 is off
    ceiling: CountOr0 = 0  # cut answers after this many body tokens; 0 is off
    wrap_up: str | None = None  # text put into an answer that is cut; null: by the format
    reserve: CountOrNone = None  # tokens for the wrap-up and the final answer; null: 64, or 512 after thoughts
    max_tokens: MaxTokens = 900  # most tokens of an answer; auto: by a probe of the model's own lengths
    verifier: str = "auto"  # how answers are checked: auto, numeric, math, choice, exact, regex, or my.py:check
    max_num_seqs: Count = 64  # most sequences decoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Answers to a user: chat, the Python API, the server."""

    budget: str = "auto"  # auto: stated by the model; N: tokens; 30s: seconds; 0.5x: a multiple of the stated one; 90%: what is promised
    temperature: AtLeast0 = 0.6  # sampling temperature; a calibration holds for the one it was made at
    top_p: TopP = 0.95  # nucleus sampling: share of the probability that is kept; 1 is off
    tolerance: AtLeast0 = 0.5  # a stated budget may be passed by this share before the answer is wrapped up
    given_tolerance: AtLeast0 = 0.1  # the same for a given budget
    ceiling: CountOr0 = 0  # body tokens that no budget may pass; 0 is off
    coverage: Chance = 0.9  # chance with which a promise is kept
    wrap_up: str | None = None  # text put into an answer that is cut; null: by the format
    reserve: CountOrNone = None  # tokens for the wrap-up and the final answer; null: 64, or 512 after thoughts and of plain models
    max_tokens: Count = 2048  # most tokens of an answer
    context: Count = 4096  # most tokens of a chat, the answer included
    max_num_seqs: Count = 16  # most sequences decoded at once
    queue: Count = 256  # server: requests that may wait beside those that are decoded
    seconds: AtLeast0 = 0.0  # server: an answer that is decoded for longer is wrapped up, the wait before it not counted; 0 is off
    grace: AtLeast0 = 25.0  # server: seconds that answers may go on after SIGTERM; those that still run are told that it stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a run, saved as config.yaml in its folder."""

    model: str = "tiny"  # alias, hub id, folder or .gguf file
    base: str | None = None  # where the model that a run was trained on is here: hub id, folder or .gguf file; null: as run.json says
    seed: Seed = 0  # seed of everything random
    format: FormatName = "solution"  # tags that a cold start teaches: `solution` (paper) or `think`; later stages keep them
    four_bit: bool | None = None  # load base weights as NF4; null: where there is a GPU
    backend: BackendName = "auto"  # library that loads and trains; auto: unsloth on a CUDA GPU, else transformers and peft
    engine: EngineName = "ours"  # decoder; generate is slower and takes any transformers model; vllm must be installed
    upstream: str | None = None  # URL of a server that decodes elsewhere; several with commas between (docs/scaling.md)
    kv_cache_gib: GibOrNone = None  # GiB for the KV cache; null: most of the free memory
    report_to: Reporter = "none"  # where training curves go besides metrics.jsonl; its package must be installed
    prompt: PromptSettings = field(default_factory=PromptSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    serve: ServeSettings = field(default_factory=ServeSettings)

    def __post_init__(self) -> None:
        check_ranges(self)
        g, group = self.grpo, "0 or more and fewer than grpo.num_generations"
        if self.upstream:
            require(self.engine == "ours", "engine", self.engine, "ours, its default: the upstream decodes")
        require(g.user_share + g.cut_share <= 1, "grpo.cut_share", g.cut_share, "at most 1 - grpo.user_share")
        require(0 < g.user_low <= g.user_high, "grpo.user_low", g.user_low, "above 0 and at most grpo.user_high")
        for name in ("relabel_per_user_group", "relabel_per_group"):
            require(0 <= getattr(g, name) < g.num_generations, f"grpo.{name}", getattr(g, name), group)
        RewardConfig(outside_slope=g.outside_slope, reward_peak=g.reward_peak)  # raises where a worse answer could earn more
        require(g.alpha_start >= g.alpha_end > 0, "grpo.alpha_end", g.alpha_end, "above 0 and at most grpo.alpha_start")
        parse_budget_option(self.eval.budget)

    def batch_size(self, stage: str) -> int:
        """Rows per update of a stage; 0 if it trains nothing."""
        return {"sft": self.sft.batch, "grpo": self.grpo.prompts_per_step * self.grpo.num_generations}.get(stage, 0)

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


def micro_batch_size(rows: int, most: int) -> int:
    """Rows per forward pass: the largest divisor of an update's `rows` up to `most`."""
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raise InputError for the first value out of the range beside its field, sections included."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            check_ranges(value, f"{item.name}.")
        for allowed in getattr(item.type, "__metadata__", ()):
            require(allowed.holds(value), prefix + item.name, value, allowed.wanted)


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}: set it to {wanted}")
