"""How the three servers are asked: what goes into a request, how a line of the stream is read, what model is there.

| server         | prompt | its stream         | sampled tokens that may not come | written from                        |
|----------------|--------|--------------------|----------------------------------|-------------------------------------|
| `llama-server` | tokens | tokens and text    | `logit_bias`                     | tried                               |
| `vllm`         | tokens | tokens and text    | `logit_bias`                     | tried                               |
| `ollama`       | text   | text               | none                             | its documentation, never tried here |
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from sbtiny.errors import UpstreamError
from sbtiny.rollout.episode import Sampling

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an answer, asked in one request: at most `tokens` after `prompt`, none of them in `masked`.

    `context`: tokens that the longest answer takes, its prompt included. `priority`: lower goes first.
    """

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling
    seed: int
    context: int
    masked: Sequence[int] = ()
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream. `tokens` is None where the server shows text alone; `count`: all its tokens so far, shown or not."""

    text: str = ""
    tokens: tuple[int, ...] | None = ()
    count: int | None = None
    end: Literal["stop", "length"] | None = None


class Dialect(ABC):
    """One server's API and what it says of its model. None: not known, or no bound.

    `slots`: answers it decodes at once. `context`: tokens of its longest answer. `rows`: size of its vocabulary.
    """

    kind: str
    path: str
    masks = True  # whether it can be told which tokens may not come
    schedules = False  # whether it orders by a priority; vLLM does not tell, and 0.32 takes one in vain without a word

    def __init__(self, model: str, slots: int | None = None, context: int | None = None, rows: int | None = None) -> None:
        self.model, self.slots, self.context, self.rows = model, slots, context, rows

    @abstractmethod
    def body(self, segment: Segment) -> Json:
        """The request for a segment."""

    @abstractmethod
    def read(self, line: bytes) -> Chunk | None:
        """Read a line of the stream; None for one that says nothing."""

    def detokenize(self, post: Callable[[str, Json], Json], ids: Sequence[int]) -> str | None:
        """The text that the server sees in these tokens; None where it does not tell."""
        return None


class LlamaServer(Dialect):
    kind, path = "llama-server", "/completion"

    def body(self, segment: Segment) -> Json:
        s = segment.sampling
        return {
            "prompt": list(segment.prompt),
            "n_predict": segment.tokens,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "seed": segment.seed,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": s.min_p,
            "samplers": ["temperature", "min_p", "top_k", "top_p"],  # in our order, and no others
            "repeat_penalty": 1.0,
            "logit_bias": [[token, False] for token in segment.masked],
        }

    def read(self, line: bytes) -> Chunk | None:
        """Tokens inside a character are not shown: the next chunk has its text, and the count tells."""
        if (data := read_event(line)) is None:
            return None
        ends = {"limit": "length", "eos": "stop", "word": "stop", "none": "length"}
        end = ends[data.get("stop_type", "none")] if data["stop"] else None
        return Chunk(data["content"], tuple(data.get("tokens", ())), data["tokens_predicted"], end)

    def detokenize(self, post: Callable[[str, Json], Json], ids: Sequence[int]) -> str | None:
        return post("/detokenize", {"tokens": list(ids)})["content"]


class Vllm(Dialect):
    kind, path = "vllm", "/v1/completions"
    stop_ids: Sequence[int] = ()

    def body(self, segment: Segment) -> Json:
        s = segment.sampling
        return {
            "model": self.model,
            "prompt": list(segment.prompt),
            "max_tokens": segment.tokens,
            "stream": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stop_token_ids": list(self.stop_ids),
            "seed": segment.seed,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "min_p": s.min_p,
            "repetition_penalty": 1.0,  # named, because the model's generation config may set others
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **({"logit_bias": {str(token): -100 for token in segment.masked}} if segment.masked else {}),
            **({"priority": segment.priority} if self.schedules else {}),
        }

    def read(self, line: bytes) -> Chunk | None:
        data = read_event(line)
        if data is None or not data.get("choices"):
            return None
        choice = data["choices"][0]
        if (reason := choice.get("finish_reason")) not in (None, "stop", "length"):
            raise UpstreamError(f"it ended an answer with {reason!r}")
        ids = choice.get("token_ids")  # of an older server None: then its text is read
        return Chunk(choice["text"], None if ids is None else tuple(ids), None, reason)

    def detokenize(self, post: Callable[[str, Json], Json], ids: Sequence[int]) -> str | None:
        return post("/detokenize", {"model": self.model, "tokens": list(ids)})["prompt"]


class Ollama(Dialect):
    kind, path, masks = "ollama", "/api/generate", False
    decode: Callable[[Sequence[int]], str]

    def body(self, segment: Segment) -> Json:
        s = segment.sampling
        options = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p, "seed": segment.seed}
        options |= {"num_predict": segment.tokens, "num_ctx": segment.context, "repeat_penalty": 1.0}
        return {"model": self.model, "prompt": self.decode(segment.prompt), "raw": True, "stream": True, "options": options}

    def read(self, line: bytes) -> Chunk | None:
        if not line.strip():
            return None
        data = json.loads(line)
        if "error" in data:
            raise UpstreamError(str(data["error"])[:200])
        end = ("length" if data.get("done_reason") == "length" else "stop") if data["done"] else None
        return Chunk(data.get("response", ""), None, None, end)


def read_event(line: bytes) -> Json | None:
    """The object of a line `data: {...}`; None for other lines. Raises UpstreamError for an error that is told in the stream."""
    name, _, text = line.partition(b":")
    if name not in (b"data", b"error") or text.strip() in (b"", b"[DONE]"):
        return None
    data = json.loads(text)
    if name == b"error" or "error" in data:
        raise UpstreamError(error_text(data))
    return data


def error_text(data: Any) -> str:
    """What a server says in the body of an error, in one line."""
    found = data.get("error", data) if isinstance(data, dict) else data
    found = found.get("message", found) if isinstance(found, dict) else found
    return " ".join(str(found).split())[:200]


# ---- which server it is --------------------------------------------------------------------------------------------------------


def detect_dialect(http: httpx.Client, name: str | None = None) -> Dialect | None:
    """Tell the server by its routes; None for another one. `name`: its model's, where it has several. Raises UpstreamError."""
    props = get_json(http, "/props")
    if props and "default_generation_settings" in props:
        about = (get_json(http, "/v1/models") or {}).get("data") or [{}]
        context = props["default_generation_settings"].get("n_ctx")
        model = choose_model([str(props.get("model_alias") or props.get("model_path"))], name, http)
        return LlamaServer(model, props.get("total_slots"), context, about[0].get("meta", {}).get("n_vocab"))
    models = (get_json(http, "/v1/models") or {}).get("data", []) if get_json(http, "/version") else []
    if by_vllm := {model["id"]: model for model in models if model.get("owned_by") == "vllm"}:
        model = by_vllm[choose_model(list(by_vllm), name, http)]
        return Vllm(model["id"], context=model.get("max_model_len"))
    if get_json(http, "/api/version"):
        names = [model["name"] for model in (get_json(http, "/api/tags") or {}).get("models", [])]
        model = choose_model(names, name, http)
        about = http.post("/api/show", json={"model": model, "verbose": True}).json().get("model_info", {})
        return Ollama(model, rows=len(about.get("tokenizer.ggml.tokens") or ()) or None)
    return None


def choose_model(names: Sequence[str], wanted: str | None, http: httpx.Client) -> str:
    """The model that is asked for, or the only one. Raises UpstreamError."""
    there = ", ".join(names[:8]) or "none"
    if wanted is not None and wanted not in names:
        raise UpstreamError(f"{http.base_url} has no model {wanted!r}: there are {there}")
    if wanted is None and len(names) != 1:
        raise UpstreamError(f"{http.base_url} has {len(names)} models ({there}): name one, as in {str(http.base_url).rstrip('/')}#NAME")
    return wanted or names[0]


def get_json(http: httpx.Client, path: str) -> Json | None:
    """What a route answers; None where it has none. Raises UpstreamError where it wants a key, or is not ready."""
    response = http.get(path)
    if response.status_code in (401, 403):
        raise UpstreamError(f"{http.base_url} refuses the key: give --upstream-key, or set SBTINY_UPSTREAM_KEY")
    if response.status_code == 503:
        raise UpstreamError(f"{http.base_url} is not ready ({error_text(response.text)}): wait until it has loaded its model")
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:  # a page
        return None
    return found if isinstance(found, dict) else None
