"""The shapes of an answer on the wire: OpenAI's, with llama.cpp's timings and our budget object. Pure."""

import json
from collections.abc import Iterable
from typing import Any

from sbtiny.budget.stream import Part
from sbtiny.serving.job import Job, JobOutcome, Update

DONE = b"data: [DONE]\n\n"


def encode_event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def encode_queued(update: Update) -> bytes:
    """A comment for a reader that waits: no client parses it, every proxy sees that something comes."""
    eta = "" if update.eta is None else f" eta={update.eta:.0f}s"
    return f": queued position={update.position}{eta}\n\n".encode()


class AnswerWriter:
    """Writes one job's answer, of a chat or of a completion, as chunks or as a whole."""

    def __init__(self, job: Job, model: str) -> None:
        self.job, self.is_chat, self.opened = job, job.request.prompt is None, False
        self.head = {"id": job.id, "object": "", "created": job.created, "model": model}

    # ---- a stream ------------------------------------------------------------------------------------------------------------------

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        """The chunks of an update. The first has the role, the last the reason, times and figures; the usage comes after it."""
        made = []
        opens = not self.opened and (update.budget is not None or bool(update.parts))
        if opens:
            self.opened = True
            warnings = {"warnings": list(self.job.request.warnings)} if self.job.request.warnings else {}
            made.append(self._chunk({"role": "assistant", "content": ""}, update, **warnings))
        made += [self._chunk(delta_of(part), update) for part in update.parts]
        if update.outcome is not None:
            made.append(self._chunk({}, update, update.outcome, **figures(update.outcome)))
        elif not made and update.budget is not None:
            made.append(self._chunk({}, update))
        if update.budget is not None:
            made[0 if opens else -1]["budget"] = update.budget
            if update.outcome is not None:
                made[-1]["budget"] = update.budget
        if update.outcome is not None and self.job.request.include_usage:
            made.append(self.head | {"object": self._kind("chunk"), "choices": [], "usage": usage(update)})
        return made

    def _chunk(self, delta: dict[str, Any], update: Update, outcome: JobOutcome | None = None, **more: Any) -> dict[str, Any]:
        text = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": None}
        if outcome is not None:
            choice |= {"finish_reason": outcome.finish_reason, "stop_reason": outcome.stop_reason}
        chunk = self.head | {"object": self._kind("chunk"), "choices": [choice], **more}
        if self.job.request.continuous_usage:
            chunk["usage"] = usage(update)
        elif self.job.request.include_usage:
            chunk["usage"] = None
        return chunk

    def _kind(self, suffix: str) -> str:
        return f"chat.completion{'.chunk' if suffix else ''}" if self.is_chat else "text_completion"

    # ---- a whole answer ------------------------------------------------------------------------------------------------------------

    def whole(self, parts: Iterable[Part], last: Update) -> dict[str, Any]:
        """The answer as one object; `last` is the update with the outcome."""
        texts = {"thoughts": "", "answer": ""}
        for part in parts:
            texts[part.kind] += part.text
        outcome, thoughts = last.outcome, texts["thoughts"] or None
        if self.is_chat:
            message = {"role": "assistant", "content": texts["answer"], "reasoning_content": thoughts, "reasoning": thoughts}
            text: dict[str, Any] = {"message": message}
        else:
            text = {"text": texts["answer"]}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": outcome.finish_reason, "stop_reason": outcome.stop_reason}
        answer = self.head | {
            "object": self._kind(""),
            "choices": [choice],
            "usage": usage(last),
            **figures(outcome),
            "budget": last.budget,
        }
        return answer | ({"warnings": list(self.job.request.warnings)} if self.job.request.warnings else {})


def delta_of(part: Part) -> dict[str, str]:
    """Thoughts go under both of their names: clients read one or the other."""
    return {"content": part.text} if part.kind == "answer" else {"reasoning_content": part.text, "reasoning": part.text}


def usage(update: Update) -> dict[str, Any]:
    return {
        "prompt_tokens": update.prompt_tokens,
        "completion_tokens": update.tokens,
        "total_tokens": update.prompt_tokens + update.tokens,
        "completion_tokens_details": {"reasoning_tokens": min(update.thought_tokens, update.tokens)},
    }


def figures(outcome: JobOutcome) -> dict[str, Any]:
    """Times in milliseconds, by llama.cpp's names and by vLLM's. The first token comes before the wait: heads are decoded at once."""
    prompt, predicted = 1000 * outcome.first, 1000 * (outcome.total - outcome.first - outcome.queued)
    tokens = outcome.answer.tokens
    timings = {
        "prompt_n": outcome.prompt_tokens,
        "prompt_ms": round(prompt, 3),
        "prompt_per_token_ms": round(prompt / max(1, outcome.prompt_tokens), 3),
        "prompt_per_second": round(1000 * outcome.prompt_tokens / prompt, 3) if prompt > 0 else 0.0,
        "predicted_n": tokens,
        "predicted_ms": round(predicted, 3),
        "predicted_per_token_ms": round(predicted / max(1, tokens), 3),
        "predicted_per_second": round(1000 * tokens / predicted, 3) if predicted > 0 else 0.0,
    }
    times = {"queue_time_ms": round(1000 * outcome.queued, 3), "time_to_first_token_ms": round(1000 * outcome.first, 3)}
    return {"timings": timings, "metrics": times}
