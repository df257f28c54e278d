"""Load a policy whose weights are elsewhere: the tokenizer, template and format that are given here, and the servers that decode."""

import os
from functools import partial
from pathlib import Path

import httpx
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sbtiny import runs
from sbtiny.budget.protocol import FORMATS
from sbtiny.config import UPSTREAM_KEY, Settings
from sbtiny.errors import InputError, UpstreamError
from sbtiny.models.aliases import fill_prompt, model_of, resolve
from sbtiny.models.chat_template import form_of_template
from sbtiny.models.fingerprint import file_fingerprint, policy_fingerprint
from sbtiny.models.gguf import open_gguf, read_ends, read_field, tokenizer_from_gguf
from sbtiny.models.load import base_folder, load_tokenizer, read_base
from sbtiny.models.prompt import continuation_ids, fit_template, prompt_ids, stop_ids_of
from sbtiny.models.tensors import read_config, read_generation
from sbtiny.rollout.decode_engine import stop_mask
from sbtiny.rollout.engines.upstream import UpstreamEngine
from sbtiny.rollout.engines.upstream_balance import Upstream
from sbtiny.rollout.engines.upstream_dialects import Dialect, Ollama, Vllm, detect_dialect
from sbtiny.rollout.engines.upstream_reader import StreamReader, timeout_for
from sbtiny.rollout.engines.upstream_vocabulary import UpstreamVocabulary
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.token_pieces import token_pieces

PRIORITY = "?priority"
PROBES = ("What is 3 + 4?", "Max has 52 apples and sells 17. How many are left?", "Compute 12 * 3 - 5.")


def load_upstream_policy(name: str, settings: Settings, slots: int) -> Policy:
    """The policy of a run, a model's folder or a .gguf file that the servers of `settings.upstream` decode; no weights are read.

    Raises InputError for a server that cannot be reached, is none of the three, or has another model.
    """
    tokenizer, rows, stops, positions = read_vocabulary(model_of(name, settings.base))
    trained, run = form_of_template(tokenizer.chat_template), runs.find_run(name)
    form = FORMATS[runs.read_run(run)["format"]] if run else trained or FORMATS[settings.format]
    opening = fit_template(tokenizer, form, fill_prompt(settings.prompt, name))
    key = os.environ.get(UPSTREAM_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    upstreams = [connect(address, headers, tokenizer, stops, rows) for address in settings.upstream.split(",")]
    reader, weights = StreamReader(headers), weights_fingerprint(name, settings.base)
    encode = partial(continuation_ids, tokenizer)
    vocabulary = UpstreamVocabulary(token_pieces(tokenizer, rows), stop_mask(stops, rows), encode)

    def policy_of(some: list[Upstream]) -> Policy:
        engine = UpstreamEngine(some, reader, vocabulary, slots, positions, weights)
        return Policy(engine, tokenizer, form, states_budget=bool(run or trained), opening=opening)

    try:
        for upstream in upstreams if run or trained else ():
            check_states_budget(policy_of([upstream]), name, upstream)
    except InputError:
        reader.stop()
        raise
    return policy_of(upstreams)


def read_vocabulary(name: str) -> tuple[PreTrainedTokenizerBase, int, frozenset[int], int | None]:
    """Tokenizer, rows of the vocabulary, stop tokens and longest sequence of a model or a .gguf file."""
    source = resolve(name)
    if source.kind == "gguf":
        return read_gguf_vocabulary(Path(source.ref))
    folder = base_folder(source, weights=False)
    tokenizer, config = load_tokenizer(str(folder)), read_config(folder)
    text = config.get_text_config()
    stops = stop_ids_of(read_generation(folder, config), tokenizer, text.vocab_size)
    return tokenizer, text.vocab_size, stops, getattr(text, "max_position_embeddings", None)


def read_gguf_vocabulary(file: Path) -> tuple[PreTrainedTokenizerBase, int, frozenset[int], int | None]:
    reader = open_gguf(file)
    tokenizer, rows = tokenizer_from_gguf(reader, file), len(read_field(reader, "tokenizer.ggml.tokens"))
    stops = stop_ids_of(GenerationConfig(eos_token_id=read_ends(reader)), tokenizer, rows)
    return tokenizer, rows, stops, read_field(reader, f"{read_field(reader, 'general.architecture')}.context_length")


def weights_fingerprint(name: str, base: str | None = None) -> str:
    """The fingerprint of what is given here; the server's weights are not seen. Of a folder without weights that of its config."""
    if run := runs.find_run(name):
        known = runs.read_run(run).get("base") or read_base(model_of(name, base)).fingerprint()
        return policy_fingerprint(known, False, run / "adapter")
    source = resolve(name)
    if source.kind == "gguf":
        return file_fingerprint(Path(source.ref))
    if source.kind == "folder" and not any(Path(source.ref).glob("*.safetensors")):
        return file_fingerprint(Path(source.ref) / "config.json")
    return policy_fingerprint(read_base(name).fingerprint(), False, None)


# ---- the servers ---------------------------------------------------------------------------------------------------------------


def connect(address: str, headers: dict[str, str], tokenizer: PreTrainedTokenizerBase, stops: frozenset[int], rows: int) -> Upstream:
    """Find out which server is there, and that its vocabulary is ours. Raises UpstreamError.

    `address`: a URL; `?priority` after it says that vLLM orders by priority, `#NAME` which model is meant.
    """
    address, _, model = address.strip().partition("#")
    plain, schedules = address.removesuffix(PRIORITY), address.endswith(PRIORITY)
    url = plain.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise UpstreamError(f"--upstream {address!r} is no URL: write it as http://host:port")
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout_for(), trust_env=False) as http:
            if (dialect := detect_dialect(http, model or None)) is None:
                raise UpstreamError(f"{url} is no llama-server, vLLM or ollama (by /props, /version and /api/version): check the address")
            check_vocabulary(http, dialect, tokenizer, rows)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise UpstreamError(f"cannot use upstream {url} ({str(error) or type(error).__name__}): is it running?") from error
    if schedules and not isinstance(dialect, Vllm):
        raise UpstreamError(f"{url} is {dialect.kind}, which knows no priority: leave {PRIORITY} out")
    if isinstance(dialect, Vllm):
        dialect.stop_ids, dialect.schedules = sorted(stops), schedules
    if isinstance(dialect, Ollama):
        start = tokenizer.bos_token_id

        def decode(ids: list[int]) -> str:  # ollama puts the start token before a raw prompt by itself
            bare = ids[1:] if start is not None and ids[0] == start else ids
            return tokenizer.decode(bare, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        dialect.decode = decode
    return Upstream(url, dialect)


def check_vocabulary(http: httpx.Client, dialect: Dialect, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise UpstreamError where the server's tokens are not ours: another size, or another text of a known prompt's ids."""
    if dialect.rows is not None and dialect.rows not in (rows, len(tokenizer)):
        raise UpstreamError(f"{http.base_url} has another model ({dialect.model}): a vocabulary of {dialect.rows} tokens, here {rows}")

    def post(path: str, body: dict) -> dict:
        return http.post(path, json=body).raise_for_status().json()

    ids = prompt_ids(tokenizer, "What is 3.14 * 20 - 5 in Zürich?\nThink.")
    seen, ours = dialect.detokenize(post, ids), tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if seen is not None and seen.strip() != ours.strip():
        raise UpstreamError(f"{http.base_url} has another model ({dialect.model}): it reads the tokens of a prompt as {seen[:40]!r}")


def check_states_budget(policy: Policy, name: str, upstream: Upstream) -> None:
    """Raise UpstreamError where a model trained to state a budget states none in any of a few greedy answers: it is another one."""
    answers = policy.sample([policy.budget_request(question, seed=0) for question in PROBES], Sampling(0))
    if all(answer.predicted is None for answer in answers):
        said = answers[0].text[:40]
        raise UpstreamError(f"{upstream.url} states no budget (it says {said!r}): serve the export of {name} there, not its base")
