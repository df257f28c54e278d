"""The transcript of a chat, with a run that answers in a few tokens."""

from pathlib import Path

import pytest


def test_a_chat_is_held_and_drawn(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pyte")
    from chat_transcript import main

    monkeypatch.setattr("sys.argv", ["chat_transcript.py", str(started), str(tmp_path / "chat.svg"), "1+1?", "2+2?"])
    main()
    shown, svg = capsys.readouterr().out, (tmp_path / "chat.svg").read_text()
    assert shown.count("tok/s") == 5  # four answers and /stats
    assert shown.count(">>> /regen") == 2
    assert "budget 2x" in shown
    assert "· used" in shown
    assert svg.startswith("<svg")
    assert "@font-face" not in svg
    assert "url(http" not in svg
