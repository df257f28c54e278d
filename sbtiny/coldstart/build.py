"""`sbtiny data build`: labelled rows of the model's own correct answers, or of traces, as one file of JSON Lines."""

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from sbtiny import locks, runs
from sbtiny.coldstart import sample_correct
from sbtiny.coldstart.build_progress import progress_file
from sbtiny.config import Settings
from sbtiny.models.prompt import check_prompts, check_texts
from sbtiny.progress import console
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.leaks import drop_eval_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.traces import Trace, read_traces, unverified_questions
from sbtiny.tasks.verify import check_references, load_verifier


def build_data(settings: Settings, file: Path, traces: str | None = None, policy: Policy | None = None) -> sample_correct.BuildResult:
    """Label the model's own correct answers, or those of a trace file, and write them as JSONL, without evaluation questions.

    A stopped build resumes from `file`.part. Raises InputError if another process builds that file.
    """
    with locks.hold(locks.lock_path(file), file):
        return build_rows(settings, file, traces, policy)


def build_rows(settings: Settings, file: Path, traces: str | None, policy: Policy | None) -> sample_correct.BuildResult:
    d = settings.data
    source = first_traces(traces, d.limit) if traces else load_questions(d.task, "train", d.limit, settings.seed)
    source, heldout = drop_eval_questions(source, traces or d.task, settings)
    verify = load_verifier(d.verifier)
    check_references(verify, unverified_questions(source) if traces else source)
    policy = policy or load_policy(settings.model, settings, d.max_num_seqs)
    check_prompts(policy.tokenizer, policy.form)
    check_texts(policy.tokenizer, [replace(trace, response="") for trace in source] if traces else source)  # responses: where used
    if traces:
        result = sample_correct.label_traces(policy, source, verify, d.rows_per_question)
    else:
        policy.engine.check_room(d.max_tokens)
        result = sample_correct.sample_correct(policy, source, verify, settings, file)
    result = replace(result, leaked=heldout)
    runs.write_jsonl(file, result.rows)
    progress_file(file).unlink(missing_ok=True)
    print_build_summary(result, file)
    return result


def first_traces(path: str, limit: int) -> list[Trace]:
    """The first `limit` traces of a file; prints a line if there are more."""
    traces = read_traces(path)
    if len(traces) > limit:
        console.print(f"{path}: the first {limit:,} of {len(traces):,} traces; --limit reads more", markup=False)
    return traces[:limit]


def print_build_summary(result: sample_correct.BuildResult, file: Path) -> None:
    """Print on stderr: the rows, what was dropped and why, and lengths by level."""
    reasons = {"wrong": result.wrong, "cut": result.cut, "spare": result.spare, "evaluation questions": result.leaked}
    dropped = ", ".join(f"{count} {name}" for name, count in reasons.items() if count) or "none"
    ends = f"; turn ends cut off: {result.turn_ends}" if result.turn_ends else ""
    console.print(f"{len(result.rows)} labelled rows of {result.sampled} answers in {file}; dropped: {dropped}{ends}", soft_wrap=True)
    table = Table("level", "rows", "accepted", "p10", "p50", "p90", "longest", box=None, title="tokens by level")
    for row in result.levels():
        lengths = ("-" if row[key] is None else f"{row[key]:.0f}" for key in ("p10", "p50", "p90", "p100"))
        table.add_row(str(row["level"]), str(row["rows"]), f"{row['accepted']:.1%}", *lengths)
    console.print(table)
