"""vLLM's scheduler under our limits, a token at a time: what they forbid aborts a request, and the answer goes on as another.

vLLM cannot replace a token. So where a limit forces the wrap-up, or a closing tag must not come, the request is aborted, and prompt and
answer so far are asked again; vLLM has their keys and values still. A held answer waits in the same way.
"""

from collections.abc import Sequence
from typing import Any

from sbtiny.errors import InputError
from sbtiny.rollout.episode import StopReason
from sbtiny.rollout.session import AskingSession, Ticket

FORBIDDEN = -100.0  # the lowest bias that vLLM takes


class VllmSession(AskingSession):
    """Hands vLLM as many requests as it decodes at once; the others wait here, where they can be dropped."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.make_ticket, engine.capacity)
        self.engine = engine  # the VllmEngine that opens it
        self.running: dict[str, Ticket] = {}  # by vLLM's name of the request
        self.masking: set[str] = set()  # those of them that ask one token, without those that may not come
        self.requests = 0

    def drop(self, ticket: Ticket) -> None:
        self.held.discard(ticket)
        if ticket in self.queue:
            self.queue.remove(ticket)
        elif name := self._name(ticket):
            self._abort(name)

    def hold(self, ticket: Ticket) -> int:
        """Abort the request. Returns 0: vLLM keeps the keys and values among its own, as long as nothing else needs the room."""
        self._abort(self._name(ticket))
        self.held.add(ticket)
        return 0

    def close(self) -> None:
        """Abort what runs."""
        for name in list(self.running):
            self._abort(name)

    def step(self) -> list[Ticket]:
        if self.engine.session is not self:
            raise RuntimeError("another session was opened on this engine: it has one cache")
        ended = self._refill()
        for output in self.engine.core.step() if self.running else ():
            if ticket := self.running.get(output.request_id):
                if reason := self._read(output, ticket):
                    ticket.finish(reason)
                ended += [ticket] if reason or ticket.refusal else []
        return ended

    # ---- requests ------------------------------------------------------------------------------------------------------------------

    def _refill(self) -> list[Ticket]:
        """Hand vLLM what it has slots for. Returns the tickets that the user stopped before they began."""
        stopped = []
        while self.queue and len(self.running) < self.engine.rows:
            ticket = self.queue.popleft()
            if ticket.is_stopped:
                ticket.finish("interrupted")
                stopped.append(ticket)
            else:
                self._ask(ticket)
        return stopped

    def _ask(self, ticket: Ticket, forbidden: Sequence[int] = ()) -> None:
        """Let an answer go on from what is written; by one token without those `forbidden`."""
        from vllm.inputs.engine import tokens_input

        self.requests += 1
        name, ids = f"{id(self):x}-{self.requests}", [*ticket.request.prompt_ids, *ticket.written]
        parameters = self._parameters(ticket, forbidden)
        self.engine.core.add_request(name, tokens_input(ids), parameters, lora_request=self.engine.adapter)
        self.running[name] = ticket
        if forbidden:
            self.masking.add(name)

    def _parameters(self, ticket: Ticket, forbidden: Sequence[int]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = ticket.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=ticket.part_seed(63, masks=bool(forbidden)),
            max_tokens=1 if forbidden else ticket.request.max_tokens - len(ticket.written),
            logprobs=0 if sampling.logprobs else None,
            logit_bias=dict.fromkeys(forbidden, FORBIDDEN) or None,
            stop_token_ids=self.engine.stop_ids,
            ignore_eos=True,  # the stop tokens are ours
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _abort(self, name: str) -> None:
        self.engine.core.abort_request([name])
        self._forget(name)

    def _forget(self, name: str) -> None:
        del self.running[name]
        self.masking.discard(name)

    def _name(self, ticket: Ticket) -> str | None:
        return next((name for name, running in self.running.items() if running is ticket), None)

    # ---- answers -------------------------------------------------------------------------------------------------------------------

    def _read(self, output: Any, ticket: Ticket) -> StopReason | None:
        """Write vLLM's new tokens as far as the limits let them stand. Returns the stop reason when the answer is over.

        Sets the ticket's refusal where a token comes although it was masked: the same seed would bring it for ever.
        """
        reason, is_forced, forbidden = None, False, []
        part = output.outputs[0]
        for i, token in enumerate(part.token_ids):
            if token in (masked := self.engine.tag_mask.masked_tokens(ticket.enforcer)):
                forbidden = masked
                break
            logprob = part.logprobs[i][token].logprob if ticket.sampling.logprobs else None
            reason, is_forced = ticket.append_all(token, logprob, self.engine.stops)
            if reason or is_forced:
                break
        if reason or is_forced or forbidden or output.finished:
            if forbidden and output.request_id in self.masking:
                ticket.refusal = InputError("vLLM writes tokens that it was told not to: use --engine ours or generate")
            self._forget(output.request_id)
            if not output.finished:
                self.engine.core.abort_request([output.request_id])
            if not reason and ticket.refusal is None:
                self._ask(ticket, forbidden)
        return reason
