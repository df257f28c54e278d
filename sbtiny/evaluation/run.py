"""`sbtiny eval`: evaluate a run or model on held-out questions and write the results into a folder."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.budget.metrics import Sample
from sbtiny.budget.protocol import parse_budget_option
from sbtiny.config import Settings
from sbtiny.evaluation import evaluate
from sbtiny.evaluation.calibration_file import measure_coverage
from sbtiny.evaluation.cuts import evaluate_cuts
from sbtiny.models.prompt import check_texts
from sbtiny.rollout.episode import Episode
from sbtiny.rollout.load_policy import load_policy
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.verify import check_references, load_verifier

SWEEP = ("0.5x", "1x", "2x", "4x")


def run_eval(name: str, settings: Settings, folder: Path, sweep: bool = False, cuts: bool = False) -> dict[str, Any]:
    """Write eval.json, eval_samples.jsonl and, with `sweep` and `cuts`, sweep.json and cuts.json into `folder`.

    Raises InputError where another process writes there, because files of two evaluations would mix.
    """
    with runs.claim("eval", folder):
        return evaluate_into(folder, name, settings, sweep, cuts)


def evaluate_into(folder: Path, name: str, settings: Settings, sweep: bool, cuts: bool) -> dict[str, Any]:
    e = settings.eval
    questions = load_questions(e.task, e.split, e.limit, settings.seed)
    verify = load_verifier(e.verifier)
    check_references(verify, questions)
    policy = load_policy(name, settings, e.max_num_seqs)
    check_texts(policy.tokenizer, questions)
    e = evaluate.with_max_tokens(policy, questions, e, settings.seed, SWEEP[-1] if sweep else e.budget)
    policy.engine.check_room(e.max_tokens)

    def one(**changed: Any) -> tuple[dict[str, Any], list[Episode], list[Sample]]:
        eval_settings = replace(e, **changed)
        cut = f", {'plain cut' if eval_settings.wrap_up == '' else 'cut'} at {eval_settings.cut_at:.0%}" if eval_settings.cut_at else ""
        title = f"evaluating ({eval_settings.budget}{cut})"
        choice = parse_budget_option(eval_settings.budget)
        episodes, samples = evaluate.evaluate(policy, questions, verify, choice, eval_settings, settings.seed, title)
        record = evaluate.eval_record(samples, name, eval_settings, settings.seed)
        return {"upstream": settings.upstream} | record if settings.upstream else record, episodes, samples

    result, episodes, samples = one()
    result |= measure_coverage(policy, name, e, samples)
    rows = [
        {"id": q.id, "question": q.question, "text": x.text, "stop_reason": x.stop_reason} | asdict(s)
        for q, x, s in zip(questions, episodes, samples, strict=True)
    ]
    runs.write_json(folder / "eval.json", result)
    runs.write_jsonl(folder / "eval_samples.jsonl", rows)
    if sweep:
        runs.write_json(folder / "sweep.json", [one(budget=text)[0] for text in SWEEP])
    if cuts:
        runs.write_json(folder / "cuts.json", evaluate_cuts(one, questions, verify))
    return result
