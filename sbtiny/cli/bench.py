"""Verbs that measure speed: bench rollout, bench grpo, bench serve."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import USE, AsJson, KvMemory, console, print_result, start_work
from sbtiny.cli.serve import check_serve_extra
from sbtiny.config import Settings
from sbtiny.errors import InputError

bench = typer.Typer(no_args_is_help=True, help="Speed against other engines and trainers, on the same work.")
app.add_typer(bench, name="bench", rich_help_panel=USE)

SIZES = ((128, 3), (128, 2), (64, 2), (64, 1), (32, 1))
ENGINES = ("ours", "generate", "continuous", "vllm")
FourBit = Annotated[bool, typer.Option("--4bit/--no-4bit", help="NF4 base weights.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: what suits the machine).")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Alias, hub id, folder or .gguf file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: what torch takes).")]
Lengths = Annotated[Path | None, typer.Option(help="Answer lengths: one a line, or JSONL rows with length.")]
Mean = Annotated[int, typer.Option(min=2, help="Mean answer length of the draw, in tokens.")]
Longest = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer of the draw.")]
SeedOf = Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw.")]


def parse_engines(names: str) -> list[str]:
    """The engines of `--engine all`, which leaves out vllm because few have it, or `--engine ours,generate`."""
    wanted = [name for name in ENGINES if name != "vllm"] if names == "all" else names.split(",")
    if unknown := [name for name in wanted if name not in ENGINES]:
        raise InputError(f"--engine {unknown[0]!r} is unknown: choose all, or from {', '.join(ENGINES)}")
    return wanted


def bench_lengths(file: Path | None, count: int, mean: int, longest: int, seed: int) -> list[int]:
    from sbtiny.bench.lengths import draw_lengths, read_lengths

    return read_lengths(file, count) if file else draw_lengths(count, mean, longest, seed)


def list_candidate_sizes(requests: int | None, rounds: int | None) -> list[tuple[int, int]]:
    """(Requests, rounds) to choose from, the largest first; a value given by the user is in all."""
    return list(dict.fromkeys((requests or count, rounds or times) for count, times in SIZES))


def start_bench(dtype: str | None, threads: int | None) -> None:
    """Raise InputError for an unknown dtype, else set torch's threads and start the backend."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype} is unknown: choose float32, bfloat16 or float16")
    import torch

    if threads:
        torch.set_num_threads(threads)
    start_work(Settings())


@bench.command()
def rollout(
    model: ModelName = "tiny",
    engine: Annotated[str, typer.Option(help="all (without vllm), or some of ours,generate,continuous,vllm.")] = "all",
    requests: Annotated[int | None, typer.Option(min=1, help="Answers to write (default: 128, or what five minutes allow).")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers decoded at a time.")] = 32,
    group: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 8,
    mean: Mean = 44,
    longest: Longest = 192,
    lengths: Lengths = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Repetitions, interleaved (default: 3, or fewer).")] = None,
    kv_memory: KvMemory = None,
    threads: Threads = None,
    dtype: Dtype = None,
    four_bit: FourBit = False,
    seed: SeedOf = 0,
    as_json: AsJson = False,
) -> None:
    """Useful tokens a second of our decode loop, of generate, of transformers' continuous batching, and of vLLM.

    Example: sbtiny bench rollout --model smollm2-135m --dtype bfloat16
    """
    names = parse_engines(engine)
    works = [(bench_lengths(lengths, count, mean, longest, seed), times) for count, times in list_candidate_sizes(requests, rounds)]
    start_bench(dtype, threads)
    from sbtiny.bench.rollout import build_job, compare_engines
    from sbtiny.models.load import load_model
    from sbtiny.rollout.engines.vllm import require_vllm

    if "vllm" in names:
        require_vllm(four_bit=four_bit)
    weights, tokenizer = load_model(model, four_bit=four_bit, dtype=dtype)
    jobs = [(build_job(tokenizer, work, slots, group, seed), times) for work, times in works]
    print_result(compare_engines(weights, tokenizer, jobs, names, kv_memory), as_json)


@bench.command()
def grpo(
    model: ModelName = "tiny",
    prompts: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 8,
    group: Annotated[int, typer.Option(min=2, help="Answers to each question.")] = 8,
    micro_batch: Annotated[int, typer.Option(min=1, help="Answers a forward pass.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured each time, after one to warm up.")] = 2,
    mean: Mean = 44,
    longest: Longest = 192,
    lengths: Lengths = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, interleaved.")] = 2,
    threads: Threads = None,
    dtype: Dtype = None,
    four_bit: FourBit = False,
    seed: SeedOf = 0,
    as_json: AsJson = False,
) -> None:
    """Seconds a GRPO step, against plain trl.GRPOTrainer at the same work.

    Example: sbtiny bench grpo --model smollm2-135m
    """
    if prompts * group % micro_batch:
        raise InputError(f"--micro-batch {micro_batch} must divide prompts x group = {prompts * group}")
    work = bench_lengths(lengths, prompts * group, mean, longest, seed)
    start_bench(dtype, threads)
    from sbtiny.bench.grpo import BenchConfig, compare_trainers

    plan = BenchConfig(model, dtype, four_bit, prompts, group, micro_batch, work, steps, seed)
    print_result(compare_trainers(plan, rounds), as_json)


STEADY, BURST, OVERLOAD = 60_000, 400, 2_000  # requests of the three kinds of arrivals, simulated
SERVED = 100  # requests, measured


def choose_arrivals(load: float | None, burst: bool, overload: bool) -> tuple[float | None, int]:
    """The load (None: all at once) and how many requests. Raises InputError for two that exclude each other."""
    if burst + overload + (load is not None) > 1:
        raise InputError("--load, --burst and --overload exclude each other: give one")
    if burst:
        return None, BURST
    return (1.2, OVERLOAD) if overload else (0.9 if load is None else load, STEADY)


def show_served_orders(result: dict[str, Any]) -> None:
    """One line of figures for each order, in seconds, and what the simulation makes of the same requests."""
    from rich.table import Table

    come = "all at once" if result["load"] is None else f"load {result['load']:g}"
    spread = "the model's own lengths" if result["sigma"] is None else f"sigma {result['sigma']:g}"
    work = f"{result['requests']} requests of {result['mean_tokens']:.0f} tokens"
    title = f"{work}, {come}, {spread}, slots {result['slots']}, rounds {result['rounds']}: seconds, mean over fcfs"
    table = Table("order", "mean", "p50", "p99", "longest", "longest wait", "budget p99", "tok/s", "over", "simulated", title=title)
    for name, figures in result["orders"].items():
        times = [f"{figures[key]:.3f}" for key in ("mean", "p50", "p99", "longest", "longest_wait", "budget_p99")]
        ratios = [f"{figures[over]['mean']['median']:.2f}" for over in ("over_fcfs", "simulated_over_fcfs") if over in figures]
        table.add_row(name, *times, f"{figures['tokens_per_second']:.0f}", *ratios)
    console().print(table)


def show_orders(result: dict[str, Any]) -> None:
    """One line of figures for each order."""
    from rich.table import Table

    come = "all at once" if result["load"] is None else f"load {result['load']:g}"
    title = f"{result['requests']} requests, {come}, sigma {result['sigma']:g}, slots {result['slots']}: times in mean services"
    table = Table("order", "mean", "p50", "p99", "longest", "longest wait", "mean over fcfs", "p99 over fcfs", title=title)
    for name, figures in result["orders"].items():
        times = [f"{figures[key]:.2f}" for key in ("mean", "p50", "p99", "longest", "longest_wait")]
        ratios = [figures["over_fcfs"][key] for key in ("mean", "p99")] if "over_fcfs" in figures else []
        table.add_row(name, *times, *(f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios))
    console().print(table)


def start_serving(name: str, seed: int, threads: int | None) -> Settings:
    """Settings to serve a run or a model with. Raises InputError for a name that is none, or a run that is not finished."""
    from sbtiny import runs
    from sbtiny.models.aliases import model_of

    check_serve_extra()
    run = runs.find_run(name)
    if run:
        runs.check_finished(run)
    settings = Settings(model=model_of(name), seed=seed)
    start_bench(None, threads)
    return settings


def measure_server(name: str, load: Any, draws_lengths: bool, mean: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """Serve a run or a model and measure each order."""
    settings = start_serving(name, load.seed, threads)
    from sbtiny.bench.serve import ORDERS, ServePlan, compare_served_orders
    from sbtiny.progress import bar

    with bar("serving", rounds * (1 + len(ORDERS))) as advance:
        return compare_served_orders(name, settings, ServePlan(load, draws_lengths, mean), rounds, advance)


@bench.command()
def streams(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="What is served.")],
    slots: Annotated[int, typer.Option(min=1, help="Answers decoded at a time.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions by turns, after one that warms up.")] = 5,
    threads: Threads = None,
    seed: SeedOf = 0,
    as_json: AsJson = False,
) -> None:
    """Tokens a second of streams of a server over those of the closed loop, on the same questions.

    Example: sbtiny bench streams smollm2-135m --slots 16 --requests 64
    """
    settings = start_serving(name, seed, threads)
    from sbtiny.bench.serve_streams import compare_with_closed_loop
    from sbtiny.progress import bar

    with bar("serving", 2 * (1 + rounds)) as advance:
        result = compare_with_closed_loop(name, settings, slots, requests, rounds, seed, advance)
    print_result(result, as_json)


@bench.command()
def serve(
    name: Annotated[str | None, typer.Argument(metavar="[RUN|MODEL]", help="What is served; not with --simulate.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="The queue alone, without a model: millions of requests.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Answers decoded at a time.")] = 16,
    load: Annotated[float | None, typer.Option(min=0.01, help="Arrivals over what the slots can do (default: 0.9).")] = None,
    burst: Annotated[bool, typer.Option("--burst", help="All requests at once.")] = False,
    overload: Annotated[bool, typer.Option("--overload", help="A while at a load of 1.2.")] = False,
    sigma: Annotated[
        float | None,
        typer.Option(min=0, help="Standard deviation of the log of lengths that are drawn (simulated: 1; else the model's own lengths)."),
    ] = None,
    mean: Mean = 44,
    lengths: Lengths = None,
    ageing: Annotated[
        float | None, typer.Option(min=0, help="Simulated: mean lengths that a wait of a mean service is worth (default: ours).")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many come (default: 100; simulated 60000, --burst 400, --overload 2000).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, a seed each.")] = 5,
    threads: Threads = None,
    seed: SeedOf = 0,
    as_json: AsJson = False,
) -> None:
    """Time in the server and its queue: our order, first come first served, and an oracle, on the same arrivals.

    Example: sbtiny bench serve --simulate --slots 4 --load 0.9 --sigma 1
    """
    offered, count = choose_arrivals(load, burst, overload)
    if simulate == (name is not None):
        raise InputError("give a run or a model to serve, or --simulate for the queue alone: one of them")
    if not simulate and ageing is not None:
        raise InputError("--ageing is for --simulate: a server has its own")
    if lengths and sigma is not None:
        raise InputError("--lengths and --sigma exclude each other: lengths are those of the file, or drawn")
    import numpy as np

    from sbtiny.bench.lengths import read_lengths
    from sbtiny.bench.serve_simulation import ServeLoad, compare_orders
    from sbtiny.progress import bar

    known = tuple(read_lengths(lengths)) if lengths else ()
    if known:
        mean, sigma = round(np.mean(known)), float(np.std(np.log(known)))
    plan = ServeLoad(slots, offered, 1.0 if sigma is None else sigma, requests or (count if simulate else SERVED), seed, ageing, known)
    if not simulate:
        print_result(measure_server(name, plan, sigma is not None, mean, rounds, threads), as_json, show_served_orders)
        return
    with bar("simulating", rounds) as advance:
        result = compare_orders(plan, rounds, advance)
    print_result(result, as_json, show_orders)
