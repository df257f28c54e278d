"""`sbtiny chat`: a model that says what it will take, and answers when it is told to."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from sbtiny.cli.app import app
from sbtiny.cli.options import COMMON, UPSTREAM, USE, Flags, print_result, start_work, with_flags
from sbtiny.errors import InputError


@app.command("chat", rich_help_panel=USE)
@with_flags(*COMMON, "base", "seed", "four_bit", "backend", "engine", "kv_memory", *UPSTREAM, section="serve")
def chat(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, its name under runs/, a model, or a .gguf file.")],
    question: Annotated[str | None, typer.Argument(help="Answer this and leave; without it, a chat, or one question from a pipe.")] = None,
    budget: Annotated[str | None, typer.Option(help="auto (stated by the model), N tokens, 30s, 0.5x the stated one, or 90%.")] = None,
    ceiling: Annotated[int | None, typer.Option(min=0, help="Tokens that no budget may pass; 0 for none.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sampling temperature.")] = None,
    system: Annotated[str | None, typer.Option(help="A system turn before the chat.")] = None,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Show only what follows the thoughts.")] = False,
    *,
    flags: Flags,
) -> None:
    """Talk to a model: it states its budget, counts down, and answers when you press Ctrl-C.

    Example: sbtiny chat runs/demo --budget 2x
    """
    own = {"serve.budget": budget, "serve.ceiling": ceiling, "serve.temperature": temperature}
    settings, _, _ = flags.load_for_name(name, own)
    if question is None and not (sys.stdin and sys.stdin.isatty()):
        question = read_piped_question()
    from sbtiny.serving.ask import default_ask, explain_no_promise

    default_ask(settings.serve)  # a wrong budget is told before torch is imported
    if not flags.as_json:
        print(f"loading {name} ...", file=sys.stderr, flush=True)
    start_work(settings)
    from rich.console import Console

    from sbtiny.serving import assistant as assistants
    from sbtiny.serving.chat import Chat
    from sbtiny.serving.terminal import Terminal, answer_once, make_reader

    errors = Console(stderr=True, highlight=False)
    assistant = assistants.load(name, settings=settings)
    dialog = Chat(assistant.defaults, system, not hide_thoughts)
    if not assistant.policy.states_budget:
        errors.print(f"{name} states no budget, it was not trained to: a given one is a ceiling alone", markup=False)
    if assistant.calibration and not assistant.fitting_calibration(assistant.defaults):
        errors.print(explain_no_promise(assistant.calibration, assistant.defaults), markup=False)
    if question is not None:
        answer = answer_once(assistant, dialog, question, quiet=flags.as_json)
        if flags.as_json:
            print_result(asdict(answer), True)
        if answer.stop_reason == "interrupted" and not answer.text:
            raise KeyboardInterrupt
        return
    errors.print(f"{name}: ask, or /help", markup=False, style="dim")
    Terminal(assistant, dialog, Console(highlight=False), make_reader()).run()


def read_piped_question() -> str:
    """Read stdin to its end; "" where it is closed. Raises InputError for bytes that are no text."""
    try:
        return sys.stdin.read().strip() if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise InputError(f"the question on the pipe is not {error.encoding} at byte {error.start}: give a text") from error
