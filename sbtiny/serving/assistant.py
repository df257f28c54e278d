"""A model that answers, with the budget in the user's hand: `sbtiny.load("runs/demo")`. Chat and server stand on it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from sbtiny.budget.calibration import Calibration
from sbtiny.budget.online_calibration import OnlineCalibration
from sbtiny.budget.protocol import MAX_BUDGET, SOLUTION, THINK, render_budget
from sbtiny.budget.seconds import Rate, tokens_in
from sbtiny.config import EngineName, ServeSettings, Settings
from sbtiny.errors import InputError
from sbtiny.evaluation.calibration_file import load_calibration
from sbtiny.models.prompt import Message, to_messages
from sbtiny.progress import quiet_while_loading
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.session import Ticket
from sbtiny.serving.answer_limits import Limiter
from sbtiny.serving.ask import Answer, Ask, check_messages, choose_budget, clean_history, default_ask, explain_no_promise
from sbtiny.serving.reply import Reply
from sbtiny.serving.request_error import RequestError

KEPT_PREFIXES = 4  # answers whose keys and values are kept for the next turn
WARM_UP_TOKENS = 24  # decoded once to measure the rate, where a budget in seconds needs it first


class Assistant:
    """Answers questions and chats with one policy. Not for several threads at once; only `Reply.press` may come from another.

    `calibration` makes promises; None makes none.
    """

    def __init__(self, policy: Policy, settings: ServeSettings, calibration: Calibration | None = None, seed: int = 0) -> None:
        self.policy, self.settings, self.calibration = policy, settings, calibration
        self.online: OnlineCalibration | None = None  # a server's, which promises in place of the calibration
        self.defaults, self.count = default_ask(self.settings, seed), 0
        self.context = min(self.settings.context, policy.engine.max_positions or self.settings.context)
        self.limiter = Limiter(policy, settings, self.context)
        self.session = policy.engine.open_session(self.context, KEPT_PREFIXES)
        if not self.session.streams:
            raise InputError("this engine decodes whole batches and cannot stream: use --engine ours")
        self.rate = Rate()  # steps per second: each running answer gets one token a step
        self.running: list[Reply] = []
        self.warming_up: list[Ticket] = []  # what is decoded to measure the rate

    # ---- for users -----------------------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str | Sequence[Message],
        budget: int | str | None = None,
        seconds: float | None = None,
        coverage: float | None = None,
        system: str | None = None,
        seed: int | None = None,
    ) -> Answer:
        """Answer one question, or a chat given as messages. Raises InputError for what cannot be asked.

        `budget`: tokens, or as in `--budget` (`"2x"`, `"30s"`). `seconds`: the tokens that the measured rate makes in them. `coverage`:
        the tokens that are promised at this chance. By default the model states its budget.
        """
        with self.dropping_unfinished():
            return self.stream(question, budget, seconds, coverage, system, seed).wait()

    def stream(
        self,
        question: str | Sequence[Message],
        budget: int | str | None = None,
        seconds: float | None = None,
        coverage: float | None = None,
        system: str | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Begin an answer, as `ask` does. Iterate over it for its parts; `press()` asks for the answer now."""
        self.count += 1
        ask = replace(self.defaults, seed=self.defaults.seed + self.count if seed is None else seed)
        messages = to_messages(question, system) if isinstance(question, str) else question
        return self.begin(messages, choose_budget(ask, budget, seconds, coverage))

    def ask_all(self, questions: Sequence[str], budget: int | str | None = None, system: str | None = None) -> list[Answer]:
        """Answer many questions at once, in their order. Raises InputError, and answers none, where one of them cannot be asked."""
        if isinstance(questions, str):
            raise InputError("ask_all takes a list of questions: use ask for one")
        with self.dropping_unfinished():
            replies = [self.stream(question, budget, system=system) for question in questions]
            return [reply.wait() for reply in replies]

    # ---- for chat and server -------------------------------------------------------------------------------------------------------

    def begin(self, messages: Sequence[Message], ask: Ask) -> Reply:
        """Begin an answer to a chat. Raises InputError for a chat that does not fit, or a promise that cannot be made."""
        check_messages(messages)
        messages = clean_history(messages)
        return self._begin(messages, self.policy.prompt(messages), ask)

    def begin_text(self, text: str, ask: Ask) -> Reply:
        """Begin what follows a raw text, without a chat template; its special tokens are special. Raises InputError as `begin` does."""
        if not text.strip():
            raise InputError("no prompt: give a text")
        tokenizer = self.policy.tokenizer
        has_start = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return self._begin([], tokenizer.encode(text, add_special_tokens=not has_start), ask)

    def _begin(self, messages: Sequence[Message], prompt: list[int], ask: Ask) -> Reply:
        self._check_room(len(prompt))
        reply = Reply(messages, prompt, ask, self.step_each, self.rate, self.fitting_calibration(ask), self.settings.coverage)
        if ask.coverage is not None and reply.calibration is None:
            raise InputError(explain_no_promise(self.calibration, ask))
        mode = ask.choice.mode if self.policy.states_budget or ask.choice.mode != "scaled" else "auto"
        if self.limiter.room(reply) < self.limiter.least_room:
            self._begin_bare(reply)
        elif mode == "scaled" or ask.coverage is not None:
            reply.head = self.session.add(
                self.policy.budget_request(reply.prompt, ask.seed, opens_budget=self._opens_budget(reply)), ask.sampling()
            )
        elif mode == "fixed":
            self._begin_body(reply, int(ask.choice.value), "given")
        elif mode == "seconds":
            self._begin_body(reply, min(MAX_BUDGET, tokens_in(ask.choice.value, self.measured_rate())), "seconds")
        else:
            self._begin_body(reply, None, "stated" if self.policy.states_budget else "none")
        self.running.append(reply)
        return reply

    def step_each(self) -> list[Reply]:
        """Decode one token of each running answer. Returns those that ended; one that cannot go on has a `refusal`, the others go on."""
        tickets = [ticket for reply in self.running if (ticket := reply.body or reply.head)] + self.warming_up
        before = sum(len(ticket.written) for ticket in tickets)
        self.session.step()
        pace = self.session.pace(sum(len(ticket.written) for ticket in tickets) - before)
        if pace is None:
            self.rate.pause()
        else:
            self.rate.record(pace, time.perf_counter())
        for reply in self.running:
            ticket = reply.body or reply.head
            reply.refusal = reply.refusal or (ticket and ticket.refusal)
            if reply.head is not None and reply.head.episode is not None:
                try:
                    self._follow_head(reply)
                except InputError as error:
                    reply.refusal = error
            if reply.body is not None:
                reply.advance()
        if ended := [reply for reply in self.running if reply.is_done]:
            self.running = [reply for reply in self.running if not reply.is_done]
        if not self.session.is_busy:
            self.rate.pause()
        return ended

    def drop(self, reply: Reply) -> None:
        """Forget a running answer; its slot is free at once."""
        for ticket in (reply.head, reply.body):
            if ticket is not None:
                self.session.drop(ticket)
        reply.is_dropped = True
        self.running = [other for other in self.running if other is not reply]

    @contextmanager
    def dropping_unfinished(self) -> Iterator[None]:
        """Drop, after an error or Ctrl-C, the answers begun in here: nobody would read them, and each takes a slot."""
        before = list(self.running)
        try:
            yield
        except BaseException:
            for reply in [reply for reply in self.running if reply not in before]:
                self.drop(reply)
            raise

    def extend(self, reply: Reply, tokens: int) -> None:
        """Let a running answer take so many tokens more before it is wrapped up. Raises InputError where it cannot."""
        tracker = reply.body.enforcer.tracker if reply.body else None
        if tracker is None or tracker.allowed is None or tracker.wrapped_at is not None:
            raise InputError("not supported now: the answer has no limit yet, or is being wrapped up already")
        tracker.limits = self.limiter.extended(reply, tokens)

    def measured_rate(self) -> float:
        """Tokens per second of one answer; decodes a few tokens where nothing was measured yet."""
        if (rate := self.rate.per_second(time.perf_counter())) is None:
            request = self.policy.request("1 + 1?", WARM_UP_TOKENS, seed=0)
            ticket = self.session.add(request, Sampling(0))
            self.warming_up = [ticket]
            while ticket.episode is None and ticket.refusal is None:
                self.step_each()
            self.warming_up = []
            if ticket.refusal is not None:
                raise ticket.refusal
            rate = self.rate.per_second(time.perf_counter())
        return rate or 1.0

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Answer with the base model, adapter off and no budget stated. Raises InputError for what has no adapter."""
        self.check_base_model()
        calibration, self.calibration = self.calibration, None
        try:
            with self.policy.initial_model():
                self._reopen()
                yield
        finally:
            self.calibration = calibration
            self._reopen()

    def check_base_model(self) -> None:
        if not hasattr(self.policy.model, "disable_adapter"):
            raise InputError("there is no base model to compare with: only a run has one")

    def _reopen(self) -> None:
        """Answers that run, and what was kept of earlier ones, are of other weights than the present ones: drop them."""
        for reply in self.running:
            self.drop(reply)
        self.session = self.policy.engine.open_session(self.context, KEPT_PREFIXES)

    # ---- one answer ----------------------------------------------------------------------------------------------------------------

    def _follow_head(self, reply: Reply) -> None:
        """The stated budget stands (or none does): begin the body with what was asked for."""
        budget, reply.head = reply.head.episode.parsed.budget, None
        if budget is None:
            self._begin_body(reply, None, "stated")
            return
        reply.take_stated(budget)
        if reply.ask.coverage is not None:
            self._begin_body(reply, budget, "coverage")
        else:
            given = min(MAX_BUDGET, max(1, round(budget * reply.ask.choice.value)))
            self._begin_body(reply, given, "scaled")

    def _begin_body(self, reply: Reply, budget: int | None, source: str) -> None:
        ask, reply.source = reply.ask, source
        limits, most = self.limiter.limits(reply, budget)
        if budget is not None and source != "coverage":
            budget = reply.given = max(1, min(budget, limits.ceiling))  # a model cannot keep to more than it may take
        prefilled = budget if self.policy.states_budget else None  # an untrained model makes nothing of it: it is a ceiling alone
        request = self.policy.request(
            reply.prompt, most, ask.seed, prefilled, limits=limits, interrupt=reply.interrupt, opens_budget=self._opens_budget(reply)
        )
        if not request.prefill and self.limiter.opens_thoughts(reply.prompt):
            request = replace(request, prefill=THINK.opening)  # it stands in the prompt, and belongs to the answer
        self._start(reply, request)

    def _opens_budget(self, reply: Reply) -> bool:
        """Whether the prompt opens the budget's tag: from the second turn on, which training does not have."""
        return self.policy.states_budget and any(m["role"] == "assistant" for m in reply.messages)

    def _begin_bare(self, reply: Reply) -> None:
        """Begin an answer of a few tokens: they go to the answer alone, without a head, thoughts or a wrap-up."""
        choice, opened, reply.source = reply.ask.choice, self.limiter.opens_thoughts(reply.prompt), "given"
        budget = int(choice.value) if choice.mode == "fixed" else None
        limits, most = self.limiter.limits(reply, budget)
        reply.given = min(budget or most, limits.ceiling)
        head = render_budget(reply.given, self.policy.form) if self.policy.states_budget else ""
        thinks = self.policy.form.answered if self.policy.states_budget else opened
        prefill = head + (f"{THINK.closing}\n\n" if thinks else "")
        shown = prefill if self.policy.states_budget or not opened else THINK.opening + prefill
        ids = (*reply.prompt, *(self.policy.encode(prefill) if prefill else ()))
        self._start(reply, Request(ids, most, reply.ask.seed, shown.rstrip(), reply.given, limits, reply.interrupt))

    def _start(self, reply: Reply, request: Request) -> None:
        ticket = self.session.add(request, reply.ask.sampling())
        reply.begin_body(ticket, request.prefill, self.policy.tokenizer.backend_tokenizer, self.policy.form)

    def fitting_calibration(self, ask: Ask) -> Calibration | OnlineCalibration | None:
        """The calibration, where the answer is sampled as those that it was made of."""
        fits = self.calibration and (ask.temperature, ask.top_p) == (self.calibration.temperature, self.calibration.top_p)
        return (self.online or self.calibration) if fits and not ask.top_k and not ask.min_p else None

    def _check_room(self, prompt: int) -> None:
        if prompt + self.limiter.head_tokens + 2 * SOLUTION.reserve > self.context:
            text = f"the chat is {prompt} tokens long, which leaves no room in a context of {self.context}: begin a new one"
            raise RequestError(text, code="context_length_exceeded")


def load(
    model: str,
    *,
    seed: int = 0,
    engine: EngineName = "ours",
    four_bit: bool | None = None,
    base: str | None = None,
    settings: Settings | None = None,
) -> Assistant:
    """Load a run, a model or a .gguf file to ask it questions.

    `model`: a run folder or its name under runs/, an alias, a hub id, a folder or a .gguf file. `base`: where the model of a run is, if
    not where its run.json says. `settings` take the place of the other arguments. A calibration beside it makes the promises. Raises
    InputError for what cannot be loaded.
    """
    settings = settings or Settings(model=model, base=base, seed=seed, engine=engine, four_bit=four_bit)
    default_ask(settings.serve)  # a wrong budget is told before a model is loaded for minutes
    with quiet_while_loading():
        policy = load_policy(model, settings, settings.serve.max_num_seqs)
    calibration = load_calibration(policy, model) if policy.states_budget else None  # each answer asks whether its sampling fits
    if calibration is not None:
        policy.engine.foretell = calibration.remaining
    return Assistant(policy, settings.serve, calibration, settings.seed)
