"""What a report says in words: the page for the browser, self-contained and without script, and the model card.

All text of models, questions and settings is escaped.
"""

import re
from collections.abc import Sequence
from html import escape
from shlex import quote
from typing import Any

import yaml

from sbtiny.evaluation.report import (
    STAGES,
    Evidence,
    Grid,
    Row,
    comparison,
    duration,
    findings,
    level_grid,
    paired,
    percent,
    points,
    sweep_grid,
)

PROMISE = "This model first writes how many tokens its answer will take, and is trained to keep to that number."
FIGURES = {
    "accuracy_tokens": (
        "As right, and shorter?",
        "Higher is more right answers, further left is fewer tokens; the upright bars are 95 % intervals. The hollow marks are the same "
        "model told to use 0.5, 1, 2 or 4 times the number it would have said itself.",
    ),
    "predicted_used": (
        "Does it keep its word?",
        "Each dot is an answer: the number it announced, and the tokens it then used. On the diagonal the promise was kept exactly; in "
        "the wide band it was kept within 50 %, in the narrow one within 10 %. Larger dots are several answers.",
    ),
    "tokens_by_level": (
        "Does it think longer about harder questions?",
        "Mean length of an answer by the difficulty of the question, and, as diamonds, the mean number announced.",
    ),
    "training": (
        "How it got there",
        "The second phase of training, step by step: faint what was measured, strong its running mean. Alpha is how far an answer may "
        "stray from its number and still be rewarded; it narrows as training goes on.",
    ),
}
ABSENT = {
    "accuracy_tokens": "There is no second evaluation to compare with.",
    "predicted_used": "No answer of this run announced a number.",
    "tokens_by_level": "The questions of this task have no levels.",
    "training": "The run has no metrics.jsonl of GRPO steps.",
}
CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f8fa; --ink: #1f2328; --muted: #59636e; --grid: #d8dee4;
  --base: #737b85; --sft: #2875b0; --grpo: #c23f0a; --mark: #ffe9dd }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2127; --ink: #e6e9ed; --muted: #9aa4af; --grid: #343b44;
  --base: #9aa4af; --sft: #5aabe6; --grpo: #ff8150; --mark: #4a2a1b } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 920px; margin: 0 auto; padding: 40px 20px 64px }
h1 { font-size: clamp(1.6rem, 4.6vw, 2.4rem); line-height: 1.2; letter-spacing: -.015em; font-weight: 600;
  margin: .3em 0 .5em; text-wrap: balance }
h1 b { color: var(--grpo); font-weight: 700; white-space: nowrap }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6em 0 .4em; letter-spacing: -.01em }
h3 { font-size: 1rem; margin: 1.6em 0 .4em }
p { max-width: 68ch; margin: .4em 0 1em }
.small, figcaption, .kicker { color: var(--muted); font-size: .9rem; max-width: 80ch }
code { font: .9em ui-monospace, Consolas, monospace; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: 1em 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; min-width: 100% }
th, td { padding: .5em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid) }
th { vertical-align: bottom; color: var(--muted); font-weight: 500; line-height: 1.3; font-size: .85rem }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper) }
td:first-child { font-weight: 600 }
.base { color: var(--base) } .sft { color: var(--sft) } .grpo { color: var(--grpo) }
figure { margin: 0 0 1em }
.panels { display: grid; gap: 14px 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); margin-top: .8em }
.panels.one { max-width: 680px }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important }
.triple { display: grid; gap: 12px; margin: 1em 0 1.6em; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)) }
.card { background: var(--card); border-radius: 8px; padding: .8em 1em; min-width: 0 }
.card b { font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, Consolas, monospace; margin: .5em 0 0 }
mark { background: var(--mark); color: var(--grpo); font-weight: 600; border-radius: 3px; padding: .1em .2em }
.question { border-left: 3px solid var(--grid); padding: .5em .9em; min-width: 0 }
ul { padding-left: 1.2em; max-width: 68ch } li { margin: .3em 0 }
summary { cursor: pointer; color: var(--muted) }
"""


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head>
<body><main>
{body}
</main></body>
</html>
"""


def render(evidence: Evidence, result: dict[str, Any], svgs: dict[str, list[str]]) -> str:
    """The page; `svgs` are the panels of each figure by name, as `plots.svg` draws them."""
    last = last_stage(evidence)
    grid = sweep_grid(result["sweep"])
    hint = f"Not measured: <code>sbtiny eval {escape(quote(str(evidence.folder)))} --sweep</code> adds it."
    parts = [
        f'<p class="kicker">{kicker(evidence)}</p>',
        f"<h1>{headline(evidence, result)}</h1>",
        f"<p>{PROMISE} {sureness(evidence, result)}</p>",
        html_table(comparison(evidence.evals), list(evidence.evals.values())),
        paragraph(
            "tokens, p90, budget: length of an answer (mean, and what nine in ten stay below) and the mean number it announced. "
            "Format: announced a number as it should. Within: used tokens differ from that number by at most so much."
        ),
        *missing(evidence),
        *(figure(name, svgs[name]) for name in ("accuracy_tokens", "predicted_used")),
        f"<h2>Told to use another number</h2>{html_table(grid) if grid[1] else paragraph(hint)}",
        "<h2>The same questions, before and after</h2>",
        answers(evidence),
        figure("tokens_by_level", svgs["tokens_by_level"]),
        html_table(level_grid(evidence.evals)) if evidence.evals[last]["by_level"] else "",
        figure("training", svgs["training"]),
        made(evidence, result),
        f"<h2>Limits</h2><ul>{''.join(f'<li>{text}</li>' for text in limits(evidence))}</ul>",
    ]
    return PAGE.format(title=escape(f"{run_name(evidence)}: sbtiny report"), css=CSS, body="\n".join(parts))


def run_name(evidence: Evidence) -> str:
    return evidence.folder.resolve().name


def last_stage(evidence: Evidence) -> str:
    return [stage for stage, e in evidence.evals.items() if e][-1]


def kicker(evidence: Evidence) -> str:
    e = evidence.evals[last_stage(evidence)]
    asked = f"{e['questions']:,} held-out questions of {e['task']}" if "questions" in e else f"task {e['task']}"
    return escape(f"run {run_name(evidence)} · model {evidence.run.get('model', 'unknown')} · {asked}")


def headline(evidence: Evidence, result: dict[str, Any]) -> str:
    """The promise in figures, as HTML: what was saved, what it cost, how well the number is kept."""
    claims = []
    if (saved := result["compression"]) is not None:
        claims.append(f"<b>{percent(abs(saved), 0)} %</b> {'fewer' if saved >= 0 else 'more'} tokens")
    if (changed := result["accuracy_change"]) is not None:
        claims.append(f"accuracy <b>{points(changed)} points</b>")
    kept = evidence.evals[last_stage(evidence)]["within"]["0.5"]
    if kept is not None:
        claims.append(f"<b>{percent(kept, 0)} %</b> of answers within 50 % of the number they announced")
    return ", ".join(claims) or escape(f"Run {run_name(evidence)}")


def sureness(evidence: Evidence, result: dict[str, Any]) -> str:
    """How sure the change of accuracy is, and whether the number follows the difficulty."""
    words = []
    if result["accuracy_change_ci95"]:
        lo, hi = map(points, result["accuracy_change_ci95"])
        both = len(paired(evidence.samples["base"], evidence.samples["grpo"]))
        words.append(
            f"The change of accuracy lies between {lo} and {hi} points (95 % interval, {both:,} questions answered by both)."
        )
    if (rank := result["spearman_budget_level"]) is not None:
        words.append(
            f"Rank correlation of the number with the question's level: {rank:.2f} (1: harder always means larger)."
        )
    return " ".join(words)


def missing(evidence: Evidence) -> list[str]:
    """One line for each evaluation that is not there, with the command that adds it."""
    lines = []
    base, grpo = evidence.evals["base"], evidence.evals["grpo"]
    if base and grpo and base["task"] != grpo["task"]:
        words = f"The base was evaluated on {base['task']}, this run on {grpo['task']}: nothing can be said about what was saved."
        lines.append(escape(words))
    if base is None:
        command = f"sbtiny eval {quote(evidence.run.get('model', 'MODEL'))} --output {quote(str(evidence.folder / 'base'))}"
        lines.append(
            f"The base model was not evaluated, so nothing can be said about what was saved: <code>{escape(command)}</code>."
        )
    if evidence.evals["sft"] is None:
        command = (
            f": <code>sbtiny eval {escape(quote(str(evidence.start)))}</code>" if evidence.start else ", or its folder is gone"
        )
        lines.append(f"The cold start was not evaluated{command}.")
    if grpo is None:
        lines.append("This run is a cold start; GRPO has not followed it.")
    return [paragraph(line) for line in lines]


def paragraph(words: str) -> str:
    return f'<p class="small">{words}</p>'


def html_table(grid: Grid, shown: Sequence[Any] = ()) -> str:
    """`shown` are the evaluations by stage, whose rows get the stage's colour."""
    classes = [stage for stage, e in zip(STAGES, shown, strict=False) if e] or [""] * len(grid[1])
    cells = [f"<th>{escape(text).replace(chr(10), '<br>')}</th>" for text in grid[0]]
    rows = [
        "<tr>" + "".join(f"<td{css if i == 0 else ''}>{escape(text)}</td>" for i, text in enumerate(row)) + "</tr>"
        for row, css in zip(grid[1], (f' class="{name}"' if name else "" for name in classes), strict=True)
    ]
    return f'<div class="scroll"><table><thead><tr>{"".join(cells)}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def figure(name: str, panels: Sequence[str]) -> str:
    title, caption = FIGURES[name]
    if not panels:
        return f"<h2>{title}</h2>{paragraph(ABSENT[name])}"
    layout = "panels one" if len(panels) == 1 else "panels"
    drawn = f'<div class="{layout}">{"".join(f"<div>{panel}</div>" for panel in panels)}</div>'
    return f"<h2>{title}</h2><figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def answers(evidence: Evidence) -> str:
    """Three questions, chosen by their place and not by their answers, each with the answer before and after."""
    pairs = paired(evidence.samples["base"], evidence.samples["grpo"])
    if not pairs:
        return paragraph("No question was answered by both the base and this run.")
    chosen = spaced([pair for pair in pairs if pair[1].get("level") is not None] or pairs)
    shown = [
        f'<div class="triple"><div class="question"><pre>{escape(shortened(after["question"]))}</pre></div>'
        f"{answer('base', before)}{answer('grpo', after)}</div>"
        for before, after in chosen
    ]
    levels = (
        "of the lowest, a middle and the highest level" if pairs[0][1].get("level") is not None else "of the evaluation"
    )
    return paragraph(f"The first questions {levels}, whatever came of them.") + "".join(shown)


def spaced(pairs: list[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """The first pair of the lowest, the middle and the highest level; without levels the first three."""
    levels = sorted(
        {pair[1]["level"] for pair in pairs if pair[1].get("level") is not None}, key=lambda x: (isinstance(x, str), x)
    )
    if len(levels) < 3:
        return pairs[:3]
    wanted = (levels[0], levels[len(levels) // 2], levels[-1])
    return [next(pair for pair in pairs if pair[1]["level"] == level) for level in wanted]


def answer(stage: str, row: Row) -> str:
    announced = f"announced {row['budget']}, used" if row["budget"] else "used"
    facts = f"{announced} {row['length']} tokens · {'right' if row['correct'] else 'wrong'}"
    text = re.sub(r"(&lt;budget&gt;\s*\d+\s*&lt;/budget&gt;)", r"<mark>\1</mark>", escape(shortened(row["text"])))
    return f'<div class="card"><b class="{stage}">{STAGES[stage]}</b> <span class="small">{facts}</span><pre>{text}</pre></div>'


def shortened(text: str) -> str:
    """The start and the end of a long text, and how much is left out between."""
    lines = text.split("\n")
    if len(lines) > 17:
        text = "\n".join([*lines[:10], f"[… {len(lines) - 14} lines …]", *lines[-4:]])
    left_out = len(text) - 600
    return text if left_out < 60 else f"{text[:440]}\n[… {left_out:,} characters …]\n{text[-160:]}"


def made(evidence: Evidence, result: dict[str, Any]) -> str:
    """Settings, seed and time."""
    seconds = result["seconds"] or {}
    stages = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items())
    time = f"time: {duration(sum(seconds.values()))} in all ({stages})" if seconds else "time: not recorded"
    full = (
        escape(yaml.safe_dump(evidence.settings, sort_keys=False))
        if evidence.settings
        else "no config.yaml in this run"
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in [*recipe(evidence), time])
    folded = f"<details><summary>All settings (config.yaml)</summary><pre>{full}</pre></details>"
    return f"<h2>How it was made</h2><ul>{lines}</ul>{folded}"


def recipe(evidence: Evidence) -> list[str]:
    """The settings that matter most, a line a stage; a setting this version does not know is left out."""
    words = {
        "sft": ("cold start", {"epochs": "epochs", "lr": "learning rate", "batch": "rows an update", "lora_rank": "LoRA rank"}),
        "grpo": ("GRPO", {"steps": "steps", "prompts": "questions a step", "group": "answers a question", "lr": "learning rate",
                          "alpha_start": "alpha from", "alpha_end": "alpha to", "temperature": "temperature"}),
        "eval": ("evaluation", {"task": "task", "split": "split", "temperature": "temperature", "max_tokens": "most tokens"}),
    }  # fmt: skip
    lines = [f"seed: {evidence.settings['seed']}"] if "seed" in evidence.settings else []
    for section, (name, keys) in words.items():
        found = evidence.settings.get(section) or {}
        if told := [f"{word} {found[key]}" for key, word in keys.items() if key in found]:
            lines.append(f"{name}: {', '.join(told)}")
    return lines


def limits(evidence: Evidence) -> list[str]:
    """What the figures do not say."""
    e = evidence.evals[last_stage(evidence)]
    lines = [
        "The intervals say how sure the figures are for other questions of this task; one training run says nothing about other seeds.",
        "A number counts the tokens of the solution body, between the solution tags.",
        f"Measured on {escape(str(e['task']))} alone: how well the number is kept elsewhere is not known.",
    ]
    if e.get("budget", "auto") != "auto":
        lines.insert(
            0, f"The run was evaluated with budgets given to it ({escape(str(e['budget']))}), not with its own numbers."
        )
    if evidence.run.get("model") == "tiny":
        lines.insert(0, "The bundled model over-thinks by construction: its training data repeat the whole working a random number of "
                        "times. A large saving on it shows that the method works, not what it would save on a real model.")  # fmt: skip
    return lines


def card(evidence: Evidence, result: dict[str, Any]) -> str:
    """README.md of the run: what it is, its figures, how to use it."""
    name, folder = run_name(evidence), quote(str(evidence.folder))
    figures = "\n".join(f"- {key}: {words}" for key, words in findings(result))
    started = f" on {evidence.run['started'].split()[0]}" if evidence.run.get("started") else ""
    return f"""# {name}

A LoRA adapter for `{evidence.run.get("model", "unknown")}`, trained with sbtiny{started} by the method of SelfBudgeter (arXiv 2505.11274).
{PROMISE}

{markdown_table(comparison(evidence.evals))}

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
