"""Small measurements of gpu_run.py, each in a process of its own: python dev/gpu_probes.py NAME [ARGUMENT ...] prints one line of JSON."""

import json
import runpy
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GIB = 2**30


def measure_device() -> dict[str, Any]:
    """What torch sees, and what a context takes of the card before anything is in it."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "cards_of_torch": torch.cuda.device_count()}
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]  # makes the context
        torch.ones(1, device="cuda").sum().item()
        total = torch.cuda.get_device_properties(0).total_memory
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        found["cards_of_nvidia_smi"] = len(listed.splitlines())
        found["context_gib"] = round((total - free - torch.cuda.memory_reserved()) / GIB, 2)
    return found


def compare_graphs(count: str) -> dict[str, Any]:
    """Greedy answers with and without the decode step as a CUDA graph. On a CPU both are without."""
    from sbtiny.config import Settings
    from sbtiny.rollout.episode import Sampling
    from sbtiny.rollout.load_policy import load_policy
    from sbtiny.tasks.arithmetic import generate_questions

    policy = load_policy("tiny", Settings(), 64)
    asked = [policy.request(q.question, 160, seed=i) for i, q in enumerate(generate_questions("val", int(count), 0))]
    policy.sample(asked, Sampling(temperature=0))  # the cache is made, and what is recorded at first is recorded
    said, found = {}, {"of": len(asked)}
    for name, recorded in (("with", policy.engine.graphs), ("without", None)):
        policy.engine.graphs = recorded
        started = time.perf_counter()
        said[name] = [episode.completion_ids for episode in policy.sample(asked, Sampling(temperature=0))]
        found[f"rate_{name}"] = round(sum(map(len, said[name])) / (time.perf_counter() - started))
    return found | {"same": sum(a == b for a, b in zip(said["with"], said["without"], strict=True))}


def compare_sessions(count: str) -> dict[str, Any]:
    """Answers that are held and go on, and prompts that go on from a kept answer, against the same ones alone. `memory`: of the device."""
    import torch

    from sbtiny.config import Settings
    from sbtiny.rollout.episode import Request, Sampling
    from sbtiny.rollout.load_policy import load_policy
    from sbtiny.tasks.arithmetic import generate_questions

    greedy, policy = Sampling(temperature=0), load_policy("tiny", Settings(), 16)
    requests = [policy.request(q.question, 120, seed=i) for i, q in enumerate(generate_questions("val", int(count), 0))]
    alone = [policy.sample([request], greedy)[0].completion_ids for request in requests]
    session = policy.engine.open_session(512, kept_prefixes=4)
    tickets = [session.add(request, greedy) for request in requests]
    seen, held, kept, memory = set(), [], 0, 0
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    while session.is_busy or held:
        session.step()
        running = [t for t in tickets if t.episode is None and len(t.written) == 12 and t not in seen]
        kept += sum(session.hold(ticket) for ticket in running)
        held, seen = [*held, *running], seen.union(running)
        if held and not session.is_busy:
            memory = (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0) - before
            while held:
                session.resume(held.pop())
    same = sum(ticket.episode.completion_ids == ids for ticket, ids in zip(tickets, alone, strict=True))
    later = Request((*requests[-1].prompt_ids, *alone[-1], *requests[0].prompt_ids), 60)
    whole = policy.sample([later], greedy)[0].completion_ids
    session = policy.engine.open_session(512, kept_prefixes=1)
    for request in (requests[-1], later):
        ticket = session.add(request, greedy)
        while session.is_busy:
            session.step()
    return {
        "same": same,
        "of": len(requests),
        "kept_bytes": kept,
        "memory": memory,
        "same_after_kept": ticket.episode.completion_ids == whole,
    }


def train_in_float16(*arguments: str) -> dict[str, Any]:
    """tests/gpu/measure.py as on a card without bfloat16, such as the T4; its line follows."""
    from sbtiny.models import device

    device.pick_dtype = lambda *_, **__: "float16"
    sys.argv = ["measure.py", *arguments]
    runpy.run_path(str(Path(__file__).parents[1] / "tests" / "gpu" / "measure.py"), run_name="__main__")
    return {}


def import_half_of_unsloth(folder: str) -> dict[str, Any]:
    """Train after an unsloth that failed in the middle of its import. Which backend trained, and the last loss."""

    class Blocker:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "unsloth.trainer":
                raise ImportError("held back by gpu_probes.py")

    sys.meta_path.insert(0, Blocker)
    from sbtiny.models.backend import start_backend

    backend = start_backend("auto")
    from sbtiny.coldstart.run import run_sft
    from sbtiny.load_settings import load_settings

    run = run_sft(load_settings(overrides=[("sft.steps", 2), ("data.limit", 40)]), Path(folder))
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    return {"backend": backend, "loss": losses[-1]}


def used_gib(server: int) -> float:
    """Memory of the card in use; without a card, of the server's process."""
    import psutil

    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024
    except (OSError, subprocess.CalledProcessError):
        return psutil.Process(server).memory_info().rss / GIB


def ask_server(url: str, server: str, streams: str) -> dict[str, Any]:
    """A running `sbtiny serve`: throughput of so many streams at once, whether those that waited say what they say alone, answer now."""
    import httpx

    from sbtiny.bench.serve_client import send_requests
    from sbtiny.tasks.arithmetic import generate_questions

    questions = [q.question for q in generate_questions("val", int(streams), 0)]
    bodies = [{"messages": [{"role": "user", "content": q}], "temperature": 0, "max_tokens": 160} for q in questions]
    client = httpx.Client(base_url=url, timeout=None, trust_env=False)

    def answer(body: dict[str, Any]) -> str:
        message = client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]["message"]
        return f"{message.get('reasoning_content')}|{message['content']}"

    alone = [answer(body) for body in bodies[:8]]
    before = used_gib(int(server))
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(answer, body) for body in bodies]
        most = before
        while not all(future.done() for future in futures):
            most = max(most, used_gib(int(server)))
            time.sleep(0.05)
    together = [future.result() for future in futures]
    streamed = [body | {"stream": True, "stream_options": {"include_usage": True}} for body in bodies]
    timings = send_requests(url, streamed, [0.0] * len(streamed))
    seconds = max(t.ended for t in timings) - min(t.due for t in timings)
    return {
        "rate": round(sum(t.tokens for t in timings) / seconds),
        "until_budget": round(statistics.median(t.until_budget for t in timings), 3),
        "waited": sum(t.queued > 0 for t in timings),
        "same": sum(a == b for a, b in zip(alone, together, strict=False)),
        "of": len(alone),
        "memory_before": round(before, 2),
        "memory_most": round(most, 2),
    } | press_answer_now(client, bodies[:8])


def press_answer_now(client: Any, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the answers were interrupted by the control route, and how many of those closed their thoughts a second time."""
    interrupted = closed_twice = 0
    for body in bodies:
        text, reason, pressed = "", None, False
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "budget": 150}) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                choice = (event.get("choices") or [{}])[0]
                text += choice.get("delta", {}).get("content") or ""
                reason = choice.get("stop_reason") or event.get("stop_reason") or reason
                if not pressed:
                    client.post("/v1/chat/completions/control", json={"id": event["id"], "action": "reasoning_end"})
                    pressed = True
        interrupted += reason == "interrupted"
        closed_twice += reason == "interrupted" and "</" in text
    return {"interrupted": interrupted, "closed_twice": closed_twice, "presses": len(bodies)}


PROBES = {
    "device": measure_device,
    "graphs": compare_graphs,
    "sessions": compare_sessions,
    "float16": train_in_float16,
    "half-import": import_half_of_unsloth,
    "server": ask_server,
}

if __name__ == "__main__":
    if found := PROBES[sys.argv[1]](*sys.argv[2:]):
        print(json.dumps(found))
