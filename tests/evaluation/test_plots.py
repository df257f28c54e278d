"""The plots: what their texts say can be read wherever the points lie, and their colours follow the page's theme."""

from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_report import BASE, GRPO, SFT

from sbtiny.config import EvalSettings
from sbtiny.evaluation import evaluate, plots
from sbtiny.evaluation.report import Eval, ReportData


def shown(samples: list, mean_tokens: float, budget: str = "auto") -> Eval:
    return evaluate.eval_record(samples, "tiny", EvalSettings(budget=budget), 0) | {"mean_tokens": mean_tokens}


def drawn(name: str, tokens: tuple[float, float, float], swept: tuple[float, ...] = ()) -> Figure:
    evals = dict(zip(("base", "sft", "grpo"), map(shown, (BASE, SFT, GRPO), tokens), strict=True))
    sweep = [shown(GRPO, length, f"{2**i}x") for i, length in enumerate(swept)]
    evidence = ReportData(Path(), {}, None, evals, {stage: [] for stage in evals}, sweep, [], None, [], {})
    return plots.build_figures(evidence)[name]


def seen_texts(figure: Figure) -> list[Text]:
    with matplotlib.rc_context(plots.STYLE):
        figure.draw_without_rendering()
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", ["accuracy_tokens", "tokens_by_level"])
@pytest.mark.parametrize(
    ("tokens", "swept"),
    [
        ((147.0, 62.0, 34.0), (34.0, 34.0, 74.0, 111.0)),  # the demo
        ((300.0, 290.0, 280.0), (270.0, 281.0, 285.0, 300.0)),
        ((100.0, 100.0, 100.0), (100.0, 100.0, 100.0, 100.0, 100.0, 100.0)),
    ],
)
def test_no_two_texts_overlap_where_points_meet(name: str, tokens: tuple[float, float, float], swept: tuple[float, ...]) -> None:
    figure = drawn(name, tokens, swept)
    texts = seen_texts(figure)
    boxes = {text: text.get_window_extent() for text in texts}
    whole = figure.bbox.padded(1)
    for i, text in enumerate(texts):
        assert not [other.get_text() for other in texts[:i] if boxes[other].overlaps(boxes[text])], text.get_text()
        assert whole.x0 <= boxes[text].x0 <= boxes[text].x1 <= whole.x1, text.get_text()


def test_the_legend_names_every_stage_and_every_budget_given() -> None:
    named = {text.get_text() for text in seen_texts(drawn("accuracy_tokens", (147.0, 62.0, 34.0), (34.0, 74.0)))}
    assert {"base: 147 tokens", "cold start: 62.0 tokens", "GRPO: 34.0 tokens", "given 1x: 34.0", "given 2x: 74.0"} <= named


def test_the_colours_of_an_svg_are_the_pages() -> None:
    text, again = (plots.to_svg(drawn("accuracy_tokens", (147.0, 62.0, 34.0)), "trade") for _ in range(2))
    assert text.startswith("<svg ")
    assert all(f"var(--{name})" in text for name in ("ink", "grid", "base", "sft", "grpo"))
    assert not [colour for colour in plots.THEME if colour in text]
    assert again == text  # the same run draws the same bytes
