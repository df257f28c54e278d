"""Chat templates and the number: where a user's budget goes in, and which format a template was made for. Pure text.

Without `budget` the generation prompt ends where training ended it, and the model states its number by itself; with it, the tags stand
there already written, exactly as `protocol.prefill` writes them. `budget` comes in chat_template_kwargs.
"""

from sbtiny.budget.protocol import BUDGET_CLOSE, BUDGET_OPEN, FORMATS, THINK, Format

OPENS_THINKING = (f"{THINK.opening}\\n", THINK.opening)  # as a template's source writes it before the quote that ends its prompt


def ending(form: Format) -> str:
    return f"{{% if add_generation_prompt and budget %}}{BUDGET_OPEN}{{{{ budget }}}}{BUDGET_CLOSE}{form.opening}{{% endif %}}"


def with_budget(template: str, form: Format) -> str:
    """The template with a place for `budget`. Jinja drops one line break at a template's end, so it must go before more follows."""
    return template if template.endswith(ending(form)) else template.removesuffix("\n") + ending(form)


def form_of_template(template: str | None) -> Format | None:
    """The format that a template of ours prefills; None for one from elsewhere."""
    return next((form for form in FORMATS.values() if (template or "").endswith(ending(form))), None)


def fitted(template: str | None, form: Format) -> str | None:
    """The template a policy of this format is asked with: the number comes before `<think>`, so the prompt must not open it (R1 does)."""
    if not template or not form.answered:
        return template
    for opened in OPENS_THINKING:
        for quote in "'\"":
            template = template.replace(f"{opened}{quote}", quote)
    return template
