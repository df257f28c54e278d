"""Decoding speed: ours, `generate` called the way TRL calls it, transformers' continuous batching and vLLM, on the same work.

Every answer has a fixed length, so all engines write equally many tokens; stop tokens do not end an answer.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from sbtiny.bench.lengths import guess_lengths, record_lengths, record_ratio, summarize
from sbtiny.bench.machine import describe_machine, largest_peak, read_peak_mb, reset_peak_memory
from sbtiny.errors import Failed
from sbtiny.models.prompt import prompt_ids
from sbtiny.progress import bar, console, format_duration, print_line
from sbtiny.rollout.decode_engine import OnEpisode
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.engines.generate import left_pad
from sbtiny.rollout.engines.vllm import VllmEngine
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.tasks import arithmetic

Clock = Callable[[], float]
SHORT_TOKENS, LONG_TOKENS = 2, 10  # tokens per answer in the runs that estimate the pace
MAX_SECONDS = 300.0  # for a job of default size


@dataclass(frozen=True, slots=True)
class BenchJob:
    """Prompts as token ids, and the answer length in tokens for each."""

    prompts: list[list[int]]
    lengths: list[int]
    slots: int
    seed: int


@dataclass(slots=True)
class Timing:
    seconds: float
    first: float  # seconds to the first finished answer
    tokens: int
    peak_mb: float | None


class StopAtLengths(StoppingCriteria):
    """Stops each row at its length."""

    def __init__(self, prompt: int, lengths: Sequence[int], device: torch.device) -> None:
        self.ends = torch.tensor(lengths, device=device) + prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return self.ends <= input_ids.shape[1]


class RolloutEngine:
    """A decode engine of `rollout/`: our loop, or vLLM as `--engine vllm` steps it."""

    def __init__(self, model: nn.Module, slots: int, kv_cache_gib: float | None = None, engine: type[Engine | VllmEngine] = Engine) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.engine = engine(model, [""] * vocabulary, frozenset(), slots, kv_cache_gib)

    def decode(self, prompts: Sequence[list[int]], lengths: Sequence[int], seed: int, on_episode: OnEpisode | None = None) -> list[Episode]:
        """Answers of the given lengths, of which the engine has only guesses."""
        work = zip(prompts, lengths, guess_lengths(lengths, seed), strict=True)
        requests = [Request(tuple(p), n, seed=seed + i, expected=guess) for i, (p, n, guess) in enumerate(work)]
        return self.engine.run(requests, Sampling(), on_episode)

    def __call__(self, job: BenchJob, clock: Clock) -> tuple[float, int]:
        first: list[float] = []
        episodes = self.decode(job.prompts, job.lengths, job.seed, lambda *_: first or first.append(clock()))
        return first[0], sum(len(e.completion_ids) for e in episodes)


class Baseline:
    """transformers, sampling at temperature 1 and never ended by a token."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

    def sampling(self, longest: int) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=longest, do_sample=True, pad_token_id=self.pad_id, eos_token_id=-1, top_k=0)


class GenerateBaseline(Baseline):
    """Batches of `slots` rows, padded on the left: what TRL does without vLLM."""

    @torch.no_grad()
    def __call__(self, job: BenchJob, clock: Clock) -> tuple[float, int]:
        first: list[float] = []
        for start in range(0, len(job.prompts), job.slots):
            lengths = job.lengths[start : start + job.slots]
            ids, mask = left_pad(job.prompts[start : start + job.slots], self.pad_id, self.model.device)
            ends = StoppingCriteriaList([StopAtLengths(ids.shape[1], lengths, ids.device)])
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=self.sampling(max(lengths)), stopping_criteria=ends
            )
            if out.shape[1] != ids.shape[1] + max(lengths):
                raise Failed(f"generate wrote {out.shape[1] - ids.shape[1]} tokens, not {max(lengths)}")
            first.append(clock())
        return first[0], sum(job.lengths)


class ContinuousBaseline(Baseline):
    """transformers' continuous batching, with a length for each request."""

    @torch.no_grad()
    def __call__(self, job: BenchJob, clock: Clock) -> tuple[float, int]:
        widest = max(len(p) + n for p, n in zip(job.prompts, job.lengths, strict=True))
        blocks = job.slots * (-(-widest // 256))
        batching = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=max(256, job.slots), max_requests_per_batch=job.slots)
        attention = self.model.config._attn_implementation
        first, tokens, waiting = 0.0, 0, len(job.prompts)
        with self.model.continuous_batching_context_manager(
            generation_config=self.sampling(max(job.lengths)), continuous_batching_config=batching, block=True, timeout=5
        ) as manager:
            for prompt, length in zip(job.prompts, job.lengths, strict=True):
                manager.add_request(list(prompt), max_new_tokens=length, eos_token_id=-1)
            while waiting:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    first = first or clock()
                    tokens, waiting = tokens + len(result.generated_tokens), waiting - 1
                elif result is None and not manager.is_running():
                    raise Failed("transformers' continuous batching ended before its work: leave it out of --engine")
        self.model.set_attn_implementation(attention)  # it switches to a paged one
        return first, tokens


def build_job(tokenizer: PreTrainedTokenizerBase, lengths: list[int], slots: int, group: int, seed: int) -> BenchJob:
    """A job with `group` answers per question, as in GRPO."""
    questions = arithmetic.generate_questions("val", -(-len(lengths) // group))
    prompts = [prompt_ids(tokenizer, questions[i // group].question) for i in range(len(lengths))]
    return BenchJob(prompts, lengths, slots, seed)


BenchEngine = Callable[[BenchJob, Clock], tuple[float, int]]  # returns seconds to the first answer, tokens written


def time_engine(engine: BenchEngine, work: BenchJob) -> Timing:
    reset_peak_memory()
    started = time.perf_counter()
    first, tokens = engine(work, lambda: time.perf_counter() - started)
    if tokens != sum(work.lengths):
        raise Failed(f"{type(engine).__name__} wrote {tokens} tokens, not {sum(work.lengths)}: its speed would be wrong")
    return Timing(time.perf_counter() - started, first, tokens, read_peak_mb())


def compare_engines(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    choices: Sequence[tuple[BenchJob, int]],
    names: Sequence[str],
    kv_cache_gib: float | None = None,
) -> dict[str, Any]:
    """Useful tokens per second of each engine, interleaved over the rounds.

    Runs the first of `choices`, (job, rounds), below MAX_SECONDS by the estimate of short runs before; prints the estimate.
    """
    first, _ = choices[0]
    makers = {
        "ours": lambda: RolloutEngine(model, first.slots, kv_cache_gib),
        "generate": lambda: GenerateBaseline(model, tokenizer.pad_token_id),
        "continuous": lambda: ContinuousBaseline(model, tokenizer.pad_token_id),
        "vllm": lambda: RolloutEngine(model, first.slots, kv_cache_gib, VllmEngine),
    }
    engines = {name: makers[name]() for name in names}
    with bar("warming up", len(names)) as advance:
        paces = {name: estimate_pace(name, engine, first, advance) for name, engine in engines.items()}
    work, rounds = choose_job(choices, paces)
    return bench_record(model, work, rounds, time_engine_rounds(engines, work, rounds, paces))


@dataclass(frozen=True, slots=True)
class EngineTimeEstimate:
    """Estimated seconds of an engine: `start` to prefill all slots, `a_pass` to decode one token in each."""

    engine: str
    start: float
    a_pass: float

    def expected(self, work: BenchJob) -> float:
        """Estimated seconds of a job; each batch of `generate` runs to its longest answer."""
        starts = range(0, len(work.lengths), work.slots)
        passes = max(*work.lengths, 1, math.ceil(sum(work.lengths) / work.slots))
        if self.engine == "generate":
            passes = sum(max(work.lengths[start : start + work.slots]) for start in starts)
        return self.start * len(starts) + self.a_pass * passes


def estimate_pace(name: str, engine: BenchEngine, work: BenchJob, advance: Callable[..., None]) -> EngineTimeEstimate:
    """Estimate the pace by short runs with all slots; the first run fills caches and does not count."""
    advance(0, note=name)
    prompts = work.prompts[: work.slots]
    _, short, longer = (
        time_engine(engine, BenchJob(prompts, [n] * len(prompts), work.slots, work.seed)).seconds
        for n in (SHORT_TOKENS, SHORT_TOKENS, LONG_TOKENS)
    )
    advance()
    return EngineTimeEstimate(name, short, max(longer - short, longer / LONG_TOKENS / 4) / (LONG_TOKENS - SHORT_TOKENS))


def expected(work: BenchJob, rounds: int, paces: Mapping[str, EngineTimeEstimate]) -> float:
    """Estimated seconds of all engines together."""
    return rounds * sum(pace.expected(work) for pace in paces.values())


def choose_job(choices: Sequence[tuple[BenchJob, int]], paces: Mapping[str, EngineTimeEstimate]) -> tuple[BenchJob, int]:
    """The first (job, rounds) below MAX_SECONDS, else the last; prints the choice and its time."""
    work, rounds = next((choice for choice in choices if expected(*choice, paces) <= MAX_SECONDS), choices[-1])
    line = f"rounds: {rounds} of {len(work.lengths)} requests, about {format_duration(expected(work, rounds, paces))}"
    if (work, rounds) != choices[0]:
        first, times = choices[0]
        long = format_duration(expected(first, times, paces))
        line += f" ({times} of {len(first.lengths)} would take {long}: --rounds and --requests ask for them)"
    print_line(line)
    return work, rounds


def time_engine_rounds(
    engines: Mapping[str, BenchEngine], work: BenchJob, rounds: int, paces: Mapping[str, EngineTimeEstimate]
) -> dict[str, list[Timing]]:
    """Time every engine in every round; show rates and the time left, scaled by the time taken so far."""
    timings: dict[str, list[Timing]] = {name: [] for name in engines}
    spent = foreseen = 0.0
    with bar("bench", len(engines) * rounds) as advance:
        for turn, (name, engine) in product(range(1, rounds + 1), engines.items()):
            where = f"round {turn} of {rounds}, {name}"
            advance(0, note=where)
            timings[name].append(timing := time_engine(engine, work))
            spent, foreseen = spent + timing.seconds, foreseen + paces[name].expected(work)
            left = (expected(work, rounds, paces) - foreseen) * spent / foreseen
            rate = f"{where}: {timing.tokens / timing.seconds:.0f} tok/s"
            advance(note=rate)
            if not console.is_terminal:
                print_line(f"{rate}, {format_duration(max(0.0, left))} left")
    return timings


def bench_record(model: nn.Module, work: BenchJob, rounds: int, timings: dict[str, list[Timing]]) -> dict[str, Any]:
    rates = {name: [t.tokens / t.seconds for t in runs] for name, runs in timings.items()}
    result = {"machine": describe_machine(), "dtype": str(model.dtype).removeprefix("torch."), "requests": len(work.lengths)}
    result |= {"rounds": rounds, "slots": work.slots, **record_lengths(work.lengths)}
    result["engines"] = {
        name: {
            "tokens_per_second": summarize(rates[name]),
            "first_seconds": summarize([t.first for t in runs]),
            "peak_mb": largest_peak(t.peak_mb for t in runs),
        }
        for name, runs in timings.items()
    }
    others = [name for name in ("generate", "continuous", "vllm") if name in rates and "ours" in rates]
    for name in others:
        result |= record_ratio(f"ratio_{name}", rates["ours"], rates[name])
    return result
