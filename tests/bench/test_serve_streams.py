"""The bench of streams: both ways answer the same requests with the same tokens."""

import json
import sys

import pytest

from sbtiny.cli import main as cli


def test_streams_and_the_closed_loop_write_the_same_tokens(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "bench streams tiny --slots 4 --requests 6 --rounds 1 --seed 3 --threads 1 --json"
    monkeypatch.setattr(sys, "argv", ["sbtiny", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["served"]["tokens"] == result["closed"]["tokens"] > 6
    ratio = result["served"]["speed"] / result["closed"]["speed"]
    assert result["served_over_closed"]["median"] == pytest.approx(ratio)
    assert (result["slots"], result["requests"], result["rounds"]) == (4, 6, 1)
