"""The page of a report and the README.md of a run, written from the templates report.html.j2 and readme.md.j2 beside this file.

The page is self-contained and without script; its template escapes all text of models, questions and settings.
"""

import re
from importlib.resources import files
from shlex import quote
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape

from sbtiny.evaluation.calibration_table import coverage_grid, cuts_grid
from sbtiny.evaluation.report import (
    STAGES,
    Grid,
    ReportData,
    Row,
    comparison_grid,
    level_grid,
    name_budgets,
    name_stages,
    paired_change,
    percent,
    percentage_points,
    summary_lines,
)

PROMISE = "This model first writes how many tokens its answer will take, and is trained to keep to that budget."
README_MARK = "<!-- written by sbtiny report, which writes it anew while this line stands -->"
BUDGET_TAG = re.compile(r"(<budget>\s*\d+\s*</budget>)")
RECIPE = {
    "sft": ("cold start", {"epochs": "epochs", "learning_rate": "learning rate", "batch": "rows an update", "lora_rank": "LoRA rank"}),
    "grpo": (
        "GRPO",
        {
            "steps": "steps",
            "prompts_per_step": "questions a step",
            "num_generations": "answers a question",
            "learning_rate": "learning rate",
            "alpha_start": "alpha from",
            "alpha_end": "alpha to",
            "temperature": "temperature",
        },
    ),
    "eval": ("evaluation", {"task": "task", "split": "split", "temperature": "temperature", "max_tokens": "most tokens"}),
}


def render_page(evidence: ReportData, result: dict[str, Any], svgs: dict[str, str]) -> str:
    """Write report.html. `svgs` holds the figures by name; one that the run has no data for is missing."""
    pairs = paired_change(evidence.samples["base"], evidence.samples["grpo"])
    context = describe_run(evidence, result) | {
        "css": files("sbtiny").joinpath("assets/report.css").read_text(encoding="utf-8"),
        "svgs": svgs,
        "stages": STAGES,
        "evals": evidence.evals,
        "present": [stage for stage, e in evidence.evals.items() if e],
        "last": [e for e in evidence.evals.values() if e][-1],
        "start": evidence.start,
        "sweep": comparison_grid(name_budgets(evidence.sweep), "given budget"),
        "cuts": cuts_grid(evidence.cuts),
        "coverage": draw_up_coverage(evidence) if result["calibration"] else None,
        "levels": level_grid(name_stages(evidence.evals)),
        "pairs": pairs,
        "examples": pick_examples(pairs),
        "recipe": list_recipe(evidence.settings),
        "settings": yaml.safe_dump(evidence.settings, sort_keys=False) if evidence.settings else "no config.yaml in this run",
    }
    return load_template("report.html.j2").render(context)


def render_readme(evidence: ReportData, result: dict[str, Any]) -> str:
    """Write README.md of the run: its origin, its figures, its use. It ends in README_MARK."""
    return load_template("readme.md.j2").render(describe_run(evidence, result), mark=README_MARK)


def draw_up_coverage(evidence: ReportData) -> Grid:
    """Build the table of promised and kept coverage of a calibrated run."""
    evaluation = evidence.evals[evidence.last_stage]
    return coverage_grid(evaluation["coverage"], evidence.calibration.scores.kept_ranges(evaluation["questions"]))


def load_template(name: str) -> Template:
    """Load a template of this folder. One of HTML escapes what it is given; one that asks for what it is not given fails."""
    environment = Environment(
        loader=PackageLoader("sbtiny.evaluation", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": percentage_points,
        "quote": lambda word: quote(str(word)),
        "shorten": shorten,
        "split_budgets": BUDGET_TAG.split,
    }
    return environment.get_template(name)


def describe_run(evidence: ReportData, result: dict[str, Any]) -> dict[str, Any]:
    """Collect what both texts tell of a run."""
    return {
        "name": evidence.folder.resolve().name,
        "folder": evidence.folder,
        "run": evidence.run,
        "promise": PROMISE,
        "result": result,
        "comparison": comparison_grid(name_stages(evidence.evals)),
        "summary": summary_lines(result),
    }


def pick_examples(pairs: list[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """Pick the first pair of the lowest, middle and highest level; with fewer than three levels the first three pairs.

    The choice does not look at the answers.
    """
    pairs = [pair for pair in pairs if pair[1].get("level") is not None] or pairs
    levels = sorted({pair[1].get("level") for pair in pairs}, key=lambda level: (isinstance(level, str), level))
    if len(levels) < 3:
        return pairs[:3]
    wanted = (levels[0], levels[len(levels) // 2], levels[-1])
    return [next(pair for pair in pairs if pair[1]["level"] == level) for level in wanted]


def shorten(text: str) -> str:
    """Shorten a long text to its start and end, and say how much is left out."""
    lines = text.split("\n")
    if len(lines) > 17:
        text = "\n".join([*lines[:10], f"[… {len(lines) - 14} lines …]", *lines[-4:]])
    left_out = len(text) - 600
    return text if left_out < 60 else f"{text[:440]}\n[… {left_out:,} characters …]\n{text[-160:]}"


def list_recipe(settings: Row) -> list[str]:
    """List the seed and the main settings, one line a stage; a setting this version does not know is left out."""
    lines = [f"seed: {settings['seed']}"] if "seed" in settings else []
    for section, (name, keys) in RECIPE.items():
        values = settings.get(section) or {}
        if parts := [f"{word} {values[key]}" for key, word in keys.items() if key in values]:
            lines.append(f"{name}: {', '.join(parts)}")
    return lines
