"""What Windows lacks is nowhere needed on import, and decoding, the plan and a verifier do without it: tried by taking it away."""

import subprocess
import sys
from pathlib import Path

import pytest

import sbtiny

TAKE_AWAY = """
import os, select, signal, sys
import torch, transformers, trl, peft, datasets, accelerate, matplotlib, psutil, typer, rich.progress, filelock, tempfile, multiprocessing
for name in ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog"):
    sys.modules[name] = None
for module, names in {
    os: "sysconf getloadavg fork killpg getuid geteuid getpgid setsid sched_getaffinity",
    signal: "SIGKILL SIGALRM SIGHUP SIGPIPE SIGSTOP SIGCONT setitimer getitimer alarm pthread_kill ITIMER_REAL",
    select: "poll epoll",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""
IMPORT = """
import importlib, pkgutil, sbtiny
for found in pkgutil.walk_packages(sbtiny.__path__, "sbtiny."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in ("vllm", "llama_cpp", "gguf", "unsloth", "math_verify", "starlette", "uvicorn"):
                raise
print("imported")
"""
USE = """
from pathlib import Path
from sbtiny.bench.machine import describe_machine
from sbtiny.cli import streams
from sbtiny.models.device import detect_device, probe_device
from sbtiny.models.load import load_model
from sbtiny.rollout import memory
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.episode import Sampling
from sbtiny.tasks.user_verifier import with_timeout

assert probe_device().memory_gb == detect_device().memory_gb > 0
assert describe_machine()["load"] is None
assert streams.broken_streams() == []
assert with_timeout(lambda: 7) == 7
policy = build_policy(*load_model("tiny"), slots=2)
(episode,) = policy.sample([policy.request("1 + 1?", 8, seed=1)], Sampling())
assert 0 < len(episode.completion_ids) <= 8
assert memory.peak_bytes(policy.model.device) > 2**27
print("decoded")
"""


@pytest.mark.parametrize(("work", "said"), [(IMPORT, "imported"), (USE, "decoded")])
def test_it_does_without(work: str, said: str) -> None:
    root = Path(sbtiny.__path__[0]).parent
    done = subprocess.run([sys.executable, "-c", TAKE_AWAY + work], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{said}\n"), done.stderr[-2000:]


def test_the_command_line_does_without() -> None:
    code = f"{TAKE_AWAY}\nsys.argv = ['sbtiny', 'plan']\nfrom sbtiny.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "peak" in done.stdout
