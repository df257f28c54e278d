"""The live table: which figures, of which steps, and what a log file is told."""

import re

from rich.console import Console

from sbtiny.training.live_table import ROWS, format_metrics, metrics_line, metrics_table, time_left

STEP = {
    "reward": 0.714, "accuracy": 0.95, "tokens": 33.6, "budget": 35.2, "within_50": 0.875, "frac_reward_zero_std_sampled": 0.25,
    "malformed": 0.0312, "entropy": 0.0345, "alpha": 0.1, "generate_seconds": 0.42, "step_time": 1.5, "loss": 0.01, "grad_norm": 0.3,
}  # fmt: skip


def drawn(steps: list, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(metrics_table(steps))
    return console.export_text()


def test_everything_the_watcher_needs_is_told() -> None:
    found = format_metrics(STEP)
    assert found["reward"] == "0.71"
    assert (found["right"], found["within 50%"], found["no spread"], found["malformed"]) == ("95%", "88%", "25%", "3%")
    assert (found["tokens"], found["budget"], found["entropy"], found["alpha"]) == ("34", "35", "0.035", "0.10")
    assert found["sample+train s"] == "0.4+1.1"
    assert not {"KL", "loss"} & found.keys()  # the loss is near 0 on-policy and would only confuse
    assert format_metrics({"loss": 0.5, "mean_token_accuracy": 0.9}) == {"loss": "0.500", "tokens right": "90.0%"}
    assert format_metrics({"kl": 0.00213})["KL"] == "0.0021"


def test_the_last_steps_have_a_row_each_and_gaps_a_dash() -> None:
    steps = [(n, STEP if n % 2 else {"reward": 0.5}) for n in range(1, ROWS + 4)]
    heading, *rows = drawn(steps).rstrip().splitlines()
    assert heading.split()[:3] == ["step", "reward", "right"]
    assert [int(row.split()[0]) for row in rows] == list(range(4, ROWS + 4))
    assert " - " in rows[0]


def test_a_terminal_of_120_columns_holds_it() -> None:
    assert len(drawn([(100, STEP)], width=120).rstrip().splitlines()) == 2


def test_time_left() -> None:
    assert time_left(60.0, 30, 90) == "0:03:00"
    assert time_left(5.0, 0, 90) == "unknown"


def test_a_log_file_gets_a_line() -> None:
    said = metrics_line("grpo", 9, 180, STEP, "0:03:00")
    assert re.match(r"grpo 9/180 .*reward 0\.71 .*no spread 25%.*left 0:03:00$", said)
