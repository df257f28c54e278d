"""The page of a report, self-contained and without script, and the README.md of a run.

All text of models, questions and settings is escaped.
"""

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from shlex import quote
from typing import Any

import yaml

from sbtiny.evaluation.report import (
    STAGES,
    Grid,
    ReportData,
    Row,
    comparison_grid,
    level_grid,
    paired_change,
    percent,
    percentage_points,
    summary_lines,
    sweep_grid,
)
from sbtiny.progress import format_duration

PROMISE = "This model first writes how many tokens its answer will take, and is trained to keep to that budget."
FIGURE_CAPTIONS = {
    "accuracy_tokens": (
        "As right, and shorter?",
        "Higher is more right answers, further left is fewer tokens; the upright bars are 95 % intervals. The hollow marks are the same "
        "model given 0.5, 1, 2 or 4 times the budget it states itself.",
    ),
    "predicted_used": (
        "Does it keep its budget?",
        "Each dot is an answer: the budget it stated, and the tokens it then used. On the diagonal both are equal; in the wide band they "
        "differ by at most 50 % of the budget, in the narrow one by at most 10 %. Larger dots are several answers.",
    ),
    "tokens_by_level": (
        "Does it think longer about harder questions?",
        "Mean length of an answer by the difficulty of the question, and, as diamonds, the mean stated budget.",
    ),
    "training": (
        "How it got there",
        "The second phase of training, step by step: each step faint, the running mean strong. Alpha is how far an answer may "
        "stray from its budget and still be rewarded; it narrows as training goes on.",
    ),
}
MISSING_NOTES = {
    "accuracy_tokens": "There is no second evaluation to compare with.",
    "predicted_used": "No answer of this run stated a budget.",
    "tokens_by_level": "The questions of this task have no levels.",
    "training": "The run has no metrics.jsonl of GRPO steps.",
}


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head>
<body><main>
{body}
</main></body>
</html>
"""


def render_page(evidence: ReportData, result: dict[str, Any], svgs: dict[str, list[str]]) -> str:
    """Write the page; `svgs` holds the SVG of each panel by figure name."""
    last = last_stage(evidence)
    grid = sweep_grid(result["sweep"])
    hint = f"Not measured: <code>sbtiny eval {escape(quote(str(evidence.folder)))} --sweep</code> adds it."
    parts = [
        f'<p class="kicker">{subtitle(evidence)}</p>',
        f"<h1>{headline(evidence, result)}</h1>",
        f"<p>{PROMISE} {confidence_text(evidence, result)}</p>",
        html_table(comparison_grid(evidence.evals), list(evidence.evals.values())),
        paragraph(
            "tokens, p90, budget: mean length of an answer, the length that nine in ten stay below, and the mean budget. "
            "Format: the share of answers with budget and tags in order. Within: the share of answers whose length differs from the "
            "budget by at most 10, 20 or 50 % of it."
        ),
        *list_missing(evidence),
        *(figure_html(name, svgs[name]) for name in ("accuracy_tokens", "predicted_used")),
        f"<h2>Given another budget</h2>{html_table(grid) if grid[1] else paragraph(hint)}",
        "<h2>The same questions, before and after</h2>",
        answers_section(evidence),
        figure_html("tokens_by_level", svgs["tokens_by_level"]),
        html_table(level_grid(evidence.evals)) if evidence.evals[last]["by_level"] else "",
        figure_html("training", svgs["training"]),
        settings_section(evidence, result),
        f"<h2>Limits</h2><ul>{''.join(f'<li>{text}</li>' for text in caveats(evidence))}</ul>",
    ]
    return PAGE.format(
        title=escape(f"{run_name(evidence)}: sbtiny report"),
        css=files("sbtiny").joinpath("assets/report.css").read_text(encoding="utf-8"),
        body="\n".join(parts),
    )


def run_name(evidence: ReportData) -> str:
    return evidence.folder.resolve().name


def last_stage(evidence: ReportData) -> str:
    return [stage for stage, e in evidence.evals.items() if e][-1]


def subtitle(evidence: ReportData) -> str:
    e = evidence.evals[last_stage(evidence)]
    task = f"{e['questions']:,} held-out questions of {e['task']}" if "questions" in e else f"task {e['task']}"
    return escape(f"run {run_name(evidence)} · model {evidence.run.get('model', 'unknown')} · {task}")


def headline(evidence: ReportData, result: dict[str, Any]) -> str:
    """Write the headline as HTML: tokens saved, accuracy change, share of answers within 50 % of their budget."""
    claims = []
    if (saved := result["compression"]) is not None:
        claims.append(f"<b>{percent(abs(saved), 0)} %</b> {'fewer' if saved >= 0 else 'more'} tokens")
    if (changed := result["accuracy_change"]) is not None:
        claims.append(f"accuracy <b>{percentage_points(changed)} points</b>")
    within = evidence.evals[last_stage(evidence)]["within"]["0.5"]
    if within is not None:
        claims.append(f"<b>{percent(within, 0)} %</b> of answers within 50 % of their budget")
    return ", ".join(claims) or escape(f"Run {run_name(evidence)}")


def confidence_text(evidence: ReportData, result: dict[str, Any]) -> str:
    """Write the interval of the accuracy change and the rank correlation of budget and level."""
    words = []
    if result["accuracy_change_ci95"]:
        lo, hi = map(percentage_points, result["accuracy_change_ci95"])
        both = len(paired_change(evidence.samples["base"], evidence.samples["grpo"]))
        words.append(f"The change of accuracy lies between {lo} and {hi} points (95 % interval, {both:,} questions answered by both).")
    if (rank := result["spearman_budget_level"]) is not None:
        words.append(f"Rank correlation of the budget with the question's level: {rank:.2f} (1: harder always means larger).")
    return " ".join(words)


def list_missing(evidence: ReportData) -> list[str]:
    """Write one line for each missing evaluation, with the command that adds it."""
    lines = []
    base, grpo = evidence.evals["base"], evidence.evals["grpo"]
    if base and grpo and base["task"] != grpo["task"]:
        words = f"The base was evaluated on {base['task']}, this run on {grpo['task']}: nothing can be said about what was saved."
        lines.append(escape(words))
    if base is None:
        command = f"sbtiny eval {quote(evidence.run.get('model', 'MODEL'))} --output {quote(str(evidence.folder / 'base'))}"
        lines.append(f"The base model was not evaluated, so nothing can be said about what was saved: <code>{escape(command)}</code>.")
    if evidence.evals["sft"] is None:
        command = f": <code>sbtiny eval {escape(quote(str(evidence.start)))}</code>" if evidence.start else ", or its folder is gone"
        lines.append(f"The cold start was not evaluated{command}.")
    if grpo is None:
        lines.append("This run is a cold start; GRPO has not followed it.")
    return [paragraph(line) for line in lines]


def paragraph(words: str) -> str:
    return f'<p class="small">{words}</p>'


def html_table(grid: Grid, evals: Sequence[Any] = ()) -> str:
    """`evals` are the evaluations in the order of STAGES; their rows get the stage's colour."""
    classes = [stage for stage, e in zip(STAGES, evals, strict=False) if e] or [""] * len(grid[1])
    cells = [f"<th>{escape(text).replace(chr(10), '<br>')}</th>" for text in grid[0]]
    rows = [
        "<tr>" + "".join(f"<td{css if i == 0 else ''}>{escape(text)}</td>" for i, text in enumerate(row)) + "</tr>"
        for row, css in zip(grid[1], (f' class="{name}"' if name else "" for name in classes), strict=True)
    ]
    return f'<div class="scroll"><table><thead><tr>{"".join(cells)}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def figure_html(name: str, panels: Sequence[str]) -> str:
    title, caption = FIGURE_CAPTIONS[name]
    if not panels:
        return f"<h2>{title}</h2>{paragraph(MISSING_NOTES[name])}"
    layout = "panels one" if len(panels) == 1 else "panels"
    panels_html = f'<div class="{layout}">{"".join(f"<div>{panel}</div>" for panel in panels)}</div>'
    return f"<h2>{title}</h2><figure><figcaption>{caption}</figcaption>{panels_html}</figure>"


def answers_section(evidence: ReportData) -> str:
    """Show the answers before and after training to three questions; the choice does not look at the answers."""
    pairs = paired_change(evidence.samples["base"], evidence.samples["grpo"])
    if not pairs:
        return paragraph("No question was answered by both the base and this run.")
    chosen = pick_examples([pair for pair in pairs if pair[1].get("level") is not None] or pairs)
    cards = [
        f'<div class="triple"><div class="question"><pre>{escape(truncate(after["question"]))}</pre></div>'
        f"{answer_card('base', before)}{answer_card('grpo', after)}</div>"
        for before, after in chosen
    ]
    levels = "of the lowest, a middle and the highest level" if pairs[0][1].get("level") is not None else "of the evaluation"
    return paragraph(f"The first questions {levels}, however they were answered.") + "".join(cards)


def pick_examples(pairs: list[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """Pick the first pair of the lowest, middle and highest level; with fewer than three levels the first three pairs."""
    levels = sorted({pair[1]["level"] for pair in pairs if pair[1].get("level") is not None}, key=lambda x: (isinstance(x, str), x))
    if len(levels) < 3:
        return pairs[:3]
    wanted = (levels[0], levels[len(levels) // 2], levels[-1])
    return [next(pair for pair in pairs if pair[1]["level"] == level) for level in wanted]


def answer_card(stage: str, row: Row) -> str:
    used = f"budget {row['budget']}, used" if row["budget"] else "used"
    facts = f"{used} {row['length']} tokens · {'right' if row['correct'] else 'wrong'}"
    text = re.sub(r"(&lt;budget&gt;\s*\d+\s*&lt;/budget&gt;)", r"<mark>\1</mark>", escape(truncate(row["text"])))
    return f'<div class="card"><b class="{stage}">{STAGES[stage]}</b> <span class="small">{facts}</span><pre>{text}</pre></div>'


def truncate(text: str) -> str:
    """Shorten a long text to its start and end, and say how much is left out."""
    lines = text.split("\n")
    if len(lines) > 17:
        text = "\n".join([*lines[:10], f"[… {len(lines) - 14} lines …]", *lines[-4:]])
    left_out = len(text) - 600
    return text if left_out < 60 else f"{text[:440]}\n[… {left_out:,} characters …]\n{text[-160:]}"


def settings_section(evidence: ReportData, result: dict[str, Any]) -> str:
    """Write settings, seed and time."""
    seconds = result["seconds"] or {}
    stages = ", ".join(f"{stage} {format_duration(value)}" for stage, value in seconds.items())
    time = f"time: {format_duration(sum(seconds.values()))} in all ({stages})" if seconds else "time: not recorded"
    full = escape(yaml.safe_dump(evidence.settings, sort_keys=False)) if evidence.settings else "no config.yaml in this run"
    lines = "".join(f"<li>{escape(line)}</li>" for line in [*recipe_text(evidence), time])
    folded = f"<details><summary>All settings (config.yaml)</summary><pre>{full}</pre></details>"
    return f"<h2>How it was made</h2><ul>{lines}</ul>{folded}"


def recipe_text(evidence: ReportData) -> list[str]:
    """Write the main settings, one line a stage; a setting this version does not know is left out."""
    words = {
        "sft": ("cold start", {"epochs": "epochs", "learning_rate": "learning rate", "batch": "rows an update", "lora_rank": "LoRA rank"}),
        "grpo": ("GRPO", {"steps": "steps", "prompts_per_step": "questions a step", "num_generations": "answers a question",
                          "learning_rate": "learning rate",
                          "alpha_start": "alpha from", "alpha_end": "alpha to", "temperature": "temperature"}),
        "eval": ("evaluation", {"task": "task", "split": "split", "temperature": "temperature", "max_tokens": "most tokens"}),
    }  # fmt: skip
    lines = [f"seed: {evidence.settings['seed']}"] if "seed" in evidence.settings else []
    for section, (name, keys) in words.items():
        values = evidence.settings.get(section) or {}
        if parts := [f"{word} {values[key]}" for key, word in keys.items() if key in values]:
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


def caveats(evidence: ReportData) -> list[str]:
    """List the limits of the figures."""
    e = evidence.evals[last_stage(evidence)]
    lines = [
        "The intervals say how sure the figures are for other questions of this task; one training run says nothing about other seeds.",
        "A budget counts the tokens of the solution body, between the solution tags.",
        f"Measured on {escape(str(e['task']))} alone: how well the budget is kept elsewhere is not known.",
    ]
    if e.get("budget", "auto") != "auto":
        lines.insert(0, f"The run was evaluated with budgets given to it ({escape(str(e['budget']))}), not with its own.")
    if evidence.run.get("model") == "tiny":
        lines.insert(0, "The bundled model over-thinks by construction: its training data repeat the whole working a random number of "
                        "times. A large saving on it shows that the method works, not what it would save on a real model.")  # fmt: skip
    return lines


def run_readme(evidence: ReportData, result: dict[str, Any]) -> str:
    """Write README.md of the run: its origin, its figures, its use."""
    name, folder = run_name(evidence), quote(str(evidence.folder))
    figures = "\n".join(f"- {key}: {words}" for key, words in summary_lines(result))
    started = f" on {evidence.run['started'].split()[0]}" if evidence.run.get("started") else ""
    return f"""# {name}

A LoRA adapter for `{evidence.run.get("model", "unknown")}`, trained with sbtiny{started} by the method of SelfBudgeter (arXiv 2505.11274).
{PROMISE}

{markdown_table(comparison_grid(evidence.evals))}

{figures}

Lengths are in tokens of the solution body. `report.html` has the plots, sample answers and limits; `report.json` and `eval.json` the
figures; `config.yaml` every setting.

## Use

    sbtiny eval {folder}
    sbtiny eval {folder} --budget 0.5x
"""


def markdown_table(grid: Grid) -> str:
    lines = [
        " | ".join(text.replace("\n", " ") for text in grid[0]),
        " | ".join(["---", *["---:"] * (len(grid[0]) - 1)]),
    ]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in grid[1])])
