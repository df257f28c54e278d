"""What several test files need: a disk that is full, a folder's content, commands parsed, a small GRPO run's settings."""

import json
import re
import resource
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import typer
from transformers import AutoConfig

from sbtiny.budget.protocol import SOLUTION, Format
from sbtiny.cli import main as cli
from sbtiny.config import DataSettings, GrpoSettings, Settings, SftSettings
from sbtiny.export import gguf
from sbtiny.export.base import load_export_tokenizer
from sbtiny.export.gguf_tokenizer import read_vocabulary
from sbtiny.export.merge import Merged
from sbtiny.models.load import load_tokenizer
from sbtiny.rollout.engines import llama_cpp
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.session import Session, Ticket
from sbtiny.tasks import arithmetic
from sbtiny.tasks.sources import Question

ROOM = 100  # bytes a file may have on the full disk
GRPO = GrpoSettings(
    steps=6,
    prompts_per_step=2,
    num_generations=4,
    micro_batch=4,
    learning_rate=1e-3,
    max_tokens=40,
    limit=5,
    save_steps=2,
    sample_steps=1,
    max_num_seqs=8,
    b_max_from_best=True,
)  # 5 questions for 12 places: a second and a third round of them begin within the run
TIMES = ("seconds", "generate_seconds", "tokens_per_second", "step_time", "train_runtime", "train_samples", "train_steps", "peak_gb")


@contextmanager
def full_disk(room: int = ROOM) -> Iterator[None]:
    """No file grows beyond `room` bytes: the write fails with EFBIG (Python ignores the signal that goes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parse(line: str, mentioned: bool = False) -> None:
    """Raises for a verb or an option that does not exist; of what is `mentioned` the arguments need not be whole."""
    command, rest, context = typer.main.get_command(cli.app), shlex.split(line, comments=True), None
    while hasattr(command, "resolve_command"):
        context = typer.Context(command, parent=context)
        _, command, rest = command.resolve_command(context, rest)
    if mentioned:
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in rest if word.startswith("-")} <= known, line
    else:
        command.make_context(command.name, rest, parent=context)


def commands(text: str) -> list[tuple[str, bool]]:
    """The arguments of each `sbtiny` of a text: of lines of code (False) and of what is mentioned between backticks (True)."""
    found = re.findall(r"^ {4}sbtiny (.+)$|`sbtiny ([^`]+)`", text, re.MULTILINE)
    return [(block or inline, bool(inline)) for block, inline in found]


def easy_questions(count: int | None = None) -> list[Question]:
    """Training questions of one and two steps, as `started` learnt from."""
    return [q for q in arithmetic.generate_questions("train", 400, seed=5) if q.level <= 2][:count]


def train_briefly(rows_file: Path, folder: Path) -> Path:
    """A cold start of the bundled model in seconds."""
    from sbtiny.coldstart.run import run_sft

    sft = SftSettings(rows=str(rows_file), steps=100, learning_rate=3e-3)
    return run_sft(Settings(sft=sft, data=DataSettings(max_num_seqs=8)), folder)


def settings_of(g: GrpoSettings = GRPO) -> Settings:
    return Settings(grpo=g)


def rows_of(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def skip_without_llama_cpp() -> None:
    pytest.importorskip("gguf")
    if not llama_cpp.is_available():
        pytest.skip("needs llama-cpp-python")


def write_gguf(base: Path, kind: str, file: Path, adapter: Path | None = None, form: Format = SOLUTION) -> Path:
    """A GGUF file of a model folder. With an adapter its template asks for a budget, as that of an exported run."""
    config = AutoConfig.from_pretrained(base)
    tokenizer = load_export_tokenizer(base, form) if adapter else load_tokenizer(str(base))
    merged = Merged(base, adapter, tied=config.tie_word_embeddings)
    vocabulary = read_vocabulary(tokenizer, merged.tensors["model.embed_tokens.weight"].shape[0])
    list(gguf.write_gguf(file, kind, merged, config, tokenizer, vocabulary, [2], "x"))
    return file


def play_session(
    session: Session, requests: list[Request], sampling: Sampling, rng: np.random.Generator, arrival: float = 0.4
) -> tuple[list[Ticket], set[Ticket]]:
    """Add each request at a random step, `arrival` of the time the next one, and drop a tenth of them, queued or running, later.

    Returns (tickets, dropped).
    """
    coming, tickets, dropped = list(requests), [], set()
    while coming or session.is_busy:
        while coming and rng.random() < arrival:
            tickets.append(session.add(coming.pop(0), sampling))
        if tickets and rng.random() < 0.1 and len(dropped) < len(requests) // 10:
            ticket = tickets[rng.integers(len(tickets))]
            session.drop(ticket)
            dropped |= {ticket} if ticket.episode is None else set()
        session.step()
    return tickets, dropped
