"""Whole GRPO steps: sbtiny against plain `trl.GRPOTrainer`, with the same model, adapter, prompts, group, lengths and micro-batch.

Every answer has a fixed length and ends there with the end token. Our engine does not know that length: at each step it gets a new
guess with a log-normal error of 30 %, which is about as good as a stated budget. Both sides leave out rewards and checks: they differ in
decoding and in the padding of micro-batches.
"""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from sbtiny.bench.lengths import guess_lengths, summarize, summarize_ratio
from sbtiny.bench.machine import describe_machine, read_peak_mb, reset_peak_memory
from sbtiny.bench.rollout import StopAtLengths
from sbtiny.grpo.trainer import BudgetGrpoTrainer
from sbtiny.models.load import add_lora, load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.progress import bar
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.episode import Request
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks import arithmetic
from sbtiny.training import logprobs


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


@dataclass(slots=True)
class StepTimings:
    """Seconds of each step by phase, and its summed loss. The first step is the warm-up."""

    generate: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    peak_mb: float | None = None


class StepClock(TrainerCallback):
    def __init__(self, clocked: StepTimings) -> None:
        self.clocked = clocked

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clocked.step.append(time.perf_counter() - self.started)


def time_calls(clock: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `call` so that it appends its seconds to `clock`."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        clock.append(time.perf_counter() - started)
        return result

    timed.__name__ = getattr(call, "__name__", "timed")
    return timed


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
    """The rollout function of our side."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, plan: BenchConfig) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.engine = Engine(model, [""] * vocabulary, frozenset(), min(64, len(plan.lengths)))
        self.tokenizer, self.plan, self.end, self.step = tokenizer, plan, tokenizer.eos_token_id, 0
        self.written: list[dict[str, Any]] = []

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        self.engine.refresh()
        ids = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        self.step += 1
        seed = self.plan.seed + 1000 * self.step
        work = zip(ids, self.plan.lengths, guess_lengths(self.plan.lengths, seed), strict=True)
        requests = [Request(tuple(p), n, seed=seed + i, expected=guess) for i, (p, n, guess) in enumerate(work)]
        episodes = self.engine.run(requests, Sampling())
        answers = [[(self.end + 1) % 3 if t == self.end else t for t in e.completion_ids[:-1]] for e in episodes]
        self.written.append({"prompt_ids": ids, "completion_ids": [[*a, self.end] for a in answers], "logprobs": None})
        return self.written[-1]


def build_grpo_config(plan: BenchConfig, output: str, bf16: bool, fp16: bool) -> GRPOConfig:
    answers, gpu = len(plan.lengths), torch.cuda.is_available()
    return GRPOConfig(
        output_dir=output,
        seed=plan.seed,
        use_cpu=not gpu,
        bf16=bf16,
        fp16=fp16,
        gradient_checkpointing=gpu,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=answers // plan.micro_batch,
        steps_per_generation=answers // plan.micro_batch,
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


def build_trainer(kind: type[GRPOTrainer], plan: BenchConfig, clocked: StepTimings, output: str) -> tuple[GRPOTrainer, nn.Module, Any]:
    """A trainer over a fresh model and adapter, without its rollouts yet."""
    torch.manual_seed(plan.seed)
    model, tokenizer = load_model(plan.model, four_bit=plan.four_bit, dtype=plan.dtype)
    model = add_lora(model, rank=plan.rank, alpha=2 * plan.rank)
    logprobs.patch_trl_for_cpu()
    questions = arithmetic.generate_questions("train", plan.prompts * (plan.steps + 1))
    ours = kind is BudgetGrpoTrainer
    rows = [{"prompt": q.question if ours else [{"role": "user", "content": q.question}]} for q in questions]
    trainer = kind(
        model=model,
        reward_funcs=time_calls(clocked.score, dummy_reward),
        args=build_grpo_config(plan, output, model.dtype == torch.bfloat16, model.dtype == torch.float16),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepClock(clocked)],
        **({"rollout_func": lambda *_: None} if ours else {}),
    )
    trainer.remove_callback(PrinterCallback)
    count_loss(trainer, clocked)
    return trainer, model, tokenizer


def count_loss(trainer: GRPOTrainer, clocked: StepTimings) -> None:
    """Sum the micro-batches' losses of each step, because the log rounds them."""
    original, per_step = trainer.training_step, trainer.args.gradient_accumulation_steps
    seen: list[float] = []

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = original(*args, **kwargs)
        seen.append(loss.item())
        if len(seen) == per_step:
            clocked.loss.append(sum(seen))
            seen.clear()
        return loss

    trainer.training_step = training_step


def run_sbtiny(plan: BenchConfig) -> tuple[StepTimings, list[dict[str, Any]]]:
    """Run our trainer; return timings and the rollouts of each step."""
    clocked = StepTimings()
    reset_peak_memory()
    with TemporaryDirectory() as folder:
        trainer, model, tokenizer = build_trainer(BudgetGrpoTrainer, plan, clocked, folder)
        decoder = BenchRollout(model, tokenizer, plan)
        trainer.rollout_func = time_calls(clocked.generate, decoder)
        trainer.train()
    clocked.peak_mb = read_peak_mb()
    return clocked, decoder.written


def run_trl(plan: BenchConfig, replay: list[dict[str, Any]] | None = None) -> StepTimings:
    """Run TRL's trainer: it decodes itself or, to compare losses, replays our rollouts."""
    clocked = StepTimings()
    reset_peak_memory()
    with TemporaryDirectory() as folder:
        trainer, model, tokenizer = build_trainer(GRPOTrainer, plan, clocked, folder)
        if replay is None:
            forced = forced_generate(model, plan.lengths, tokenizer.eos_token_id)
            model.generate = time_calls(clocked.generate, forced)
        else:
            steps = iter(replay)
            trainer.rollout_func = time_calls(clocked.generate, lambda *_: next(steps))
        trainer.train()
    clocked.peak_mb = read_peak_mb()
    return clocked


def compare_trainers(plan: BenchConfig, rounds: int) -> dict[str, Any]:
    """Seconds per step of both, interleaved, and the difference of their losses on the same answers."""
    sides: dict[str, list[StepTimings]] = {"sbtiny": [], "trl": []}
    with bar("bench", 2 * rounds + 1) as advance:
        for _ in range(rounds):
            clocked, written = run_sbtiny(plan)
            sides["sbtiny"].append(clocked)
            gc.collect()
            advance(note=f"sbtiny {clocked.step[-1]:.2f} s a step")
            sides["trl"].append(run_trl(plan))
            gc.collect()
            advance(note=f"trl {sides['trl'][-1].step[-1]:.2f} s a step")
        same = run_trl(plan, written)
        advance()
    # Only the first step: later the weights differ by rounding, which Adam amplifies.
    loss_difference = abs(same.loss[0] - sides["sbtiny"][-1].loss[0])
    return bench_record(plan, sides) | {"loss": same.loss[0], "loss_difference": loss_difference}


def bench_record(plan: BenchConfig, sides: dict[str, list[StepTimings]]) -> dict[str, Any]:
    steps = {name: [s for run in runs for s in run.step[1:]] for name, runs in sides.items()}
    result: dict[str, Any] = {"machine": describe_machine(), "answers": len(plan.lengths), "micro_batch": plan.micro_batch}
    result |= {"mean_length": sum(plan.lengths) / len(plan.lengths), "longest": max(plan.lengths)}
    for name, runs in sides.items():
        phases = {p: summarize([s for run in runs for s in getattr(run, p)[1:]])["median"] for p in ("generate", "score")}
        whole = summarize(steps[name])
        result[name] = {
            "seconds": whole,
            **phases,
            "train": whole["median"] - sum(phases.values()),
            "tokens_per_second": sum(plan.lengths) / whole["median"],
            "peak_mb": max((run.peak_mb for run in runs if run.peak_mb is not None), default=None),
        }
    compared = summarize_ratio(steps["trl"], steps["sbtiny"])
    return result | {"ratio": compared["median"], "ratio_range": [compared["low"], compared["high"]]}
