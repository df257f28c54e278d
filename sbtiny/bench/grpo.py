"""Whole GRPO steps: sbtiny against plain `trl.GRPOTrainer`, with the same model, adapter, prompts, group, lengths and micro-batch.

Every answer has a fixed length and ends there with the end token. Our engine does not know that length: at each step it gets a new
guess with a log-normal error of 30 %, which is about as good as a stated budget. Both sides leave out rewards and checks: they differ in
decoding, in the padding of micro-batches and, on a CPU, in attention and in the LoRA layers that are small for their rank.
"""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from sbtiny.bench.lengths import record_lengths, record_ratio, summarize
from sbtiny.bench.machine import describe_machine, largest_peak, read_peak_mb, reset_peak_memory
from sbtiny.bench.rollout import RolloutEngine, StopAtLengths
from sbtiny.grpo.trainer import BudgetGrpoTrainer
from sbtiny.models.load import add_lora, load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.progress import bar
from sbtiny.tasks import arithmetic
from sbtiny.training.cpu import prepare_for_cpu
from sbtiny.training.logprobs import patch_trl

Rollout = dict[str, Any]  # as TRL takes it: the prompts, answers and log-probabilities of a step
TRAINERS = {"sbtiny": BudgetGrpoTrainer, "trl": GRPOTrainer}


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """The work of both sides. `lengths` has a length in tokens for each of prompts x group answers, the same at every step."""

    model: str
    dtype: str | None
    four_bit: bool
    prompts: int
    group: int
    micro_batch: int
    lengths: list[int]
    steps: int
    seed: int
    rank: int = 16

    @property
    def passes(self) -> int:
        """Micro-batches a step."""
        return len(self.lengths) // self.micro_batch


@dataclass(slots=True)
class StepTimings:
    """Seconds of each step by phase; the first step is the warm-up. `losses` are those of the micro-batches, because the log rounds them.

    `rollouts` has what our side wrote in each step.
    """

    generate: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    peak_mb: float | None = None


class StepClock(TrainerCallback):
    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def time_calls(clock: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `call` so that it appends its seconds to `clock`."""

    @wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        clock.append(time.perf_counter() - started)
        return result

    return timed


def record_losses(losses: list[float], training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `training_step` so that it appends its loss to `losses`."""

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    return recorded


def dummy_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within a group; scoring is not measured."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def forced_generate(model: nn.Module, lengths: Sequence[int], end: int) -> Callable[..., Tensor]:
    """The model's `generate`, with each row ended by the end token at its length."""
    original = model.generate

    def generate(input_ids: Tensor, generation_config: Any, **inputs: Any) -> Tensor:
        config = copy.deepcopy(generation_config)
        config.eos_token_id = -1
        start = input_ids.shape[1]
        ends = StoppingCriteriaList([StopAtLengths(start, lengths, input_ids.device)])
        out = original(input_ids=input_ids, generation_config=config, stopping_criteria=ends, **inputs)
        written = out[:, start:]
        written[written == end] = (end + 1) % 3
        written[torch.arange(len(out)), torch.tensor(lengths) - 1] = end
        return out

    return generate


class BenchRollout:
    """The rollout function of our side; keeps what it wrote in `rollouts`."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, plan: BenchConfig, rollouts: list[Rollout]) -> None:
        self.decoder = RolloutEngine(model, min(64, len(plan.lengths)))
        self.tokenizer, self.plan, self.end, self.rollouts = tokenizer, plan, tokenizer.eos_token_id, rollouts

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> Rollout:
        self.decoder.engine.refresh()
        ids = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        episodes = self.decoder.decode(ids, self.plan.lengths, self.plan.seed + 1000 * (len(self.rollouts) + 1))
        answers = [[(self.end + 1) % 3 if t == self.end else t for t in e.completion_ids[:-1]] for e in episodes]
        self.rollouts.append({"prompt_ids": ids, "completion_ids": [[*a, self.end] for a in answers], "logprobs": None})
        return self.rollouts[-1]


def build_grpo_config(plan: BenchConfig, output: str, bf16: bool, fp16: bool) -> GRPOConfig:
    gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=output,
        seed=plan.seed,
        use_cpu=not gpu,
        bf16=bf16,
        fp16=fp16,
        gradient_checkpointing=gpu,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.passes,
        steps_per_generation=plan.passes,
        num_generations=plan.group,
        max_completion_length=max(plan.lengths),
        max_steps=plan.steps + 1,
        learning_rate=1e-5,
        temperature=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )


def build_trainer(kind: type[GRPOTrainer], plan: BenchConfig, timings: StepTimings, output: str) -> tuple[GRPOTrainer, nn.Module, Any]:
    """A trainer over a fresh model and adapter, without its rollouts yet."""
    torch.manual_seed(plan.seed)
    model, tokenizer = load_model(plan.model, four_bit=plan.four_bit, dtype=plan.dtype)
    model = add_lora(model, rank=plan.rank, alpha=2 * plan.rank)
    questions = arithmetic.generate_questions("train", plan.prompts * (plan.steps + 1))
    if ours := kind is BudgetGrpoTrainer:
        prepare_for_cpu(model)
    elif not torch.cuda.is_available():
        patch_trl()
    rows = [{"prompt": q.question if ours else [{"role": "user", "content": q.question}]} for q in questions]
    trainer = kind(
        model=model,
        reward_funcs=time_calls(timings.score, dummy_reward),
        args=build_grpo_config(plan, output, model.dtype == torch.bfloat16, model.dtype == torch.float16),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepClock(timings.step)],
        **({"rollout_func": lambda *_: None} if ours else {}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.training_step = record_losses(timings.losses, trainer.training_step)
    return trainer, model, tokenizer


def run_trainer(kind: type[GRPOTrainer], plan: BenchConfig, replay: Sequence[Rollout] = ()) -> StepTimings:
    """Train with ours or with TRL's, each with its own decoding; TRL's may `replay` our rollouts, to compare losses."""
    timings = StepTimings()
    reset_peak_memory()
    with TemporaryDirectory() as folder:
        trainer, model, tokenizer = build_trainer(kind, plan, timings, folder)
        if replay:
            steps = iter(replay)
            trainer.rollout_func = lambda *_: next(steps)
        elif kind is BudgetGrpoTrainer:
            trainer.rollout_func = time_calls(timings.generate, BenchRollout(model, tokenizer, plan, timings.rollouts))
        else:
            model.generate = time_calls(timings.generate, forced_generate(model, plan.lengths, tokenizer.eos_token_id))
        trainer.train()
    timings.peak_mb = read_peak_mb()
    return timings


def compare_trainers(plan: BenchConfig, rounds: int) -> dict[str, Any]:
    """Seconds per step of both, interleaved, and the difference of their losses on the same answers."""
    sides: dict[str, list[StepTimings]] = {name: [] for name in TRAINERS}
    with bar("bench", 2 * rounds + 1) as advance:
        for _, (name, kind) in product(range(rounds), TRAINERS.items()):
            sides[name].append(run_trainer(kind, plan))
            gc.collect()
            advance(note=f"{name} {sides[name][-1].step[-1]:.2f} s a step")
        same = run_trainer(GRPOTrainer, plan, sides["sbtiny"][-1].rollouts)
        advance()
    # Only the first step: later the weights differ by rounding, which Adam amplifies.
    loss, our_loss = (sum(run.losses[: plan.passes]) for run in (same, sides["sbtiny"][-1]))
    return bench_record(plan, sides) | {"loss": loss, "loss_difference": abs(loss - our_loss)}


def bench_record(plan: BenchConfig, sides: dict[str, list[StepTimings]]) -> dict[str, Any]:
    steps = {name: measured("step", runs) for name, runs in sides.items()}
    result = {"machine": describe_machine(), "answers": len(plan.lengths), "micro_batch": plan.micro_batch, **record_lengths(plan.lengths)}
    for name, runs in sides.items():
        phases = {phase: summarize(measured(phase, runs))["median"] for phase in ("generate", "score")}
        whole = summarize(steps[name])
        result[name] = {
            "seconds": whole,
            **phases,
            "train": whole["median"] - sum(phases.values()),
            "tokens_per_second": sum(plan.lengths) / whole["median"],
            "peak_mb": largest_peak(run.peak_mb for run in runs),
        }
    return result | record_ratio("ratio", steps["trl"], steps["sbtiny"])


def measured(phase: str, runs: Sequence[StepTimings]) -> list[float]:
    """Seconds of a phase in the steps after the warm-up."""
    return [seconds for run in runs for seconds in getattr(run, phase)[1:]]
