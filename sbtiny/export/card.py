"""The model card in the merged folder: what it is, the run's figures, the licence of the base."""

import re
from pathlib import Path
from typing import Any

from sbtiny import runs
from sbtiny.export.config import Plan

HEADER = re.compile(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", re.MULTILINE | re.DOTALL)
SHARES = (("accuracy", "accuracy"), ("format_rate", "format right"))


def licence(plan: Plan, base: Path) -> str:
    """The base's licence as its own card names it; `other` where it says nothing."""
    if plan.source.kind == "bundled":
        return "apache-2.0"
    card = base / "README.md"
    found = HEADER.match(card.read_text(encoding="utf-8")) if card.is_file() else None
    return found[1] if found else "other"


def card(plan: Plan, base: Path) -> str:
    named = licence(plan, base)
    note = "" if named != "other" else f"\nThe licence of {plan.source.name} holds; its files do not name it.\n"
    head = ["---", f"license: {named}", "library_name: transformers", "tags: [sbtiny, selfbudgeter]"]
    if plan.source.kind == "hub":
        head.append(f"base_model: {plan.source.ref}")
    return "\n".join(head) + f"""
---
# {plan.name}

{plan.source.name}, trained by sbtiny to say how many tokens it will think and to keep to it:
`{plan.form.shape}`. Merged onto the {plan.merge} base, saved in {plan.dtype}.
`budget` in `chat_template_kwargs` sets the number for it.
{note}{figures(plan.run / "eval.json")}"""


def figures(file: Path) -> str:
    """The run's evaluation, if it has one."""
    if not file.is_file():
        return ""
    found: dict[str, Any] = runs.read_json(file)
    lines = [f"- {label}: {found[key]:.1%}" for key, label in SHARES if found.get(key) is not None]
    if within := (found.get("within") or {}).get("0.5"):
        lines.append(f"- length within 50 % of its number: {within:.1%}")
    if found.get("mean_tokens") is not None:
        lines.append(f"- tokens: {found['mean_tokens']:.1f} on average")
    return f"\nOn {found.get('questions')} questions of {found.get('task')}:\n\n" + "\n".join(lines) + "\n"
