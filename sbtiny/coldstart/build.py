"""`sbtiny data build`: labelled rows of the model's own correct answers, or of traces, as one file of JSON Lines."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from sbtiny import locks, runs
from sbtiny.coldstart.foretell import check_foretellable, foretell_budgets
from sbtiny.coldstart.sample_correct import BuildProgress, BuildResult, build_signature, find_tag, make_row, progress_file, sample_correct
from sbtiny.config import AUTO, Settings
from sbtiny.errors import InputError
from sbtiny.models.prompt import check_prompts, check_texts
from sbtiny.progress import console, print_line
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.leaks import drop_eval_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.row_files import Row
from sbtiny.tasks.sources import Question
from sbtiny.tasks.traces import Trace, read_traces, unverified_questions
from sbtiny.tasks.verify import Verifier, check_references, load_verifier


def build_data(settings: Settings, file: Path, traces: str | None = None, policy: Policy | None = None) -> BuildResult:
    """Label the model's own correct answers, or those of a trace file, and write them as JSONL, without evaluation questions.

    A stopped build resumes from `file`.part. Raises InputError if another process builds that file.
    """
    with locks.hold(locks.lock_path(file), file):
        return build_rows(settings, file, traces, policy)


def build_rows(settings: Settings, file: Path, traces: str | None, policy: Policy | None) -> BuildResult:
    d = settings.data
    source = first_traces(traces, d.limit) if traces else load_questions(d.task, "train", d.limit, settings.seed)
    source, heldout = drop_eval_questions(source, traces or d.task, settings)
    verify = load_verifier(d.verifier)
    check_references(verify, unverified_questions(source) if traces else source)
    if not traces:
        BuildProgress(file, build_signature(settings, source))  # refuses answers of another build before the model is read
    policy = policy or load_policy(settings.model, settings, d.max_num_seqs)
    check_prompts(policy.tokenizer, policy.form)
    check_texts(policy.tokenizer, [replace(trace, response="") for trace in source] if traces else source)  # responses: where used
    firsts = list(find_firsts(source).values())
    if d.budget_quantile:
        check_foretellable(policy, firsts)
    if traces:
        result = label_traces(policy, source, verify, d.rows_per_question)
    else:
        if d.max_tokens != AUTO:
            policy.engine.check_room(d.max_tokens)
        result = sample_correct(policy, source, verify, settings, file)
    if d.budget_quantile:
        result = with_foretold_budgets(policy, firsts, result, d.budget_quantile)
    result = replace(result, leaked=heldout)
    runs.write_jsonl(file, result.rows)
    if not traces:  # an interrupted sampling of the same file stays
        progress_file(file).unlink(missing_ok=True)
    print_build_summary(result, file)
    return result


def with_foretold_budgets(policy: Policy, questions: Sequence[Question], result: BuildResult, quantile: float) -> BuildResult:
    """The result with a row of a budget alone for each question; the answers' own budgets become given ones, read and not learnt."""
    budgets = foretell_budgets(policy, questions, result.lengths, quantile)
    return replace(result, rows=[*(row | {"given": True} for row in result.rows), *budgets])


def find_firsts(asked: Sequence[Question]) -> dict[tuple[str, str | None], Question]:
    """The first question or trace of each text and system turn. Its other traces get its id (`label_traces`)."""
    firsts: dict[tuple[str, str | None], Question] = {}
    for question in asked:
        firsts.setdefault((question.question, question.system), question)
    return firsts


def first_traces(path: str, limit: int) -> list[Trace]:
    """The first `limit` traces of a file; prints a line if there are more."""
    traces = read_traces(path)
    if len(traces) > limit:
        console.print(f"{path}: the first {limit:,} of {len(traces):,} traces; --limit reads more", markup=False)
    return traces[:limit]


def label_traces(policy: Policy, traces: Sequence[Trace], verify: Verifier, keep: int) -> BuildResult:
    """Rows from traces that finished and are correct: as published, or verified if that is unknown.

    All answers to a question get the id of its first, as the model's own answers have. Raises InputError if no trace is usable.
    """
    kinds: list[str] = []
    tokens: list[int | None] = []
    firsts = find_firsts(traces)
    asked = [firsts[trace.question, trace.system] for trace in traces]
    rows: dict[tuple[str, str | None], list[Row]] = {}  # a question's rows side by side, for one update
    for trace, first in zip(traces, asked, strict=True):
        is_right = trace.finished and (verify(trace.response, trace) if trace.correct is None else trace.correct)
        kinds.append("row" if is_right else "wrong" if trace.finished else "cut")
        row = make_row(policy, trace, trace.response) | {"id": first.id}
        tokens.append(row["budget"] if trace.finished else None)
        if is_right:
            if fault := find_tag(trace.response):
                raise InputError(f"{trace.location}: {fault}: give the plain answers")
            check_texts(policy.tokenizer, [trace])
            rows.setdefault((trace.question, trace.system), []).append(row)
    result = BuildResult.of(asked, kinds, tokens, [row for same in rows.values() for row in same], keep)
    if not result.rows:
        why = f"the first is {traces[0].location} with the answer {traces[0].answer[:40]!r}"
        counts = f"{result.wrong} wrong, {result.cut} unfinished"
        raise InputError(f"no usable trace in {len(traces)}: {counts}; {why}: check the answers, or --verifier")
    return replace(result, turn_ends=sum(trace.ended for trace in traces))


def print_build_summary(result: BuildResult, file: Path) -> None:
    """Print on stderr: the rows, what was dropped and why, and lengths by level."""
    reasons = {"wrong": result.wrong, "cut": result.cut, "spare": result.spare, "evaluation questions": result.leaked}
    dropped = ", ".join(f"{count} {name}" for name, count in reasons.items() if count) or "none"
    ends = f"; turn ends cut off: {result.turn_ends}" if result.turn_ends else ""
    answers = sum(row["response"] is not None for row in result.rows)
    budgets = f" and {len(result.rows) - answers} of a budget alone" if answers < len(result.rows) else ""
    print_line(f"{answers} labelled rows of {result.sampled} answers{budgets} in {file}; dropped: {dropped}{ends}")
    table = Table("level", "rows", "accepted", "p10", "p50", "p90", "longest", box=None, title="tokens by level")
    for row in result.levels():
        lengths = ("-" if row[key] is None else f"{row[key]:.0f}" for key in ("p10", "p50", "p90", "p100"))
        table.add_row(str(row["level"]), str(row["rows"]), f"{row['accepted']:.1%}", *lengths)
    console.print(table)
