"""Write the report of an evaluated run: report.json, plots, report.html, README.md."""

from pathlib import Path
from typing import Any

from sbtiny.evaluation import page, plots
from sbtiny.evaluation.calibration_plots import draw_promise_figures
from sbtiny.evaluation.report import build_report, read_report_data
from sbtiny.progress import print_line
from sbtiny.runs import write_bytes, write_json, write_text


def write_report(folder: Path, seconds: dict[str, float] | None = None) -> dict[str, Any]:
    """Write report.json, plots/, report.html and README.md of an evaluated run; returns report.json's content and `page`.

    `seconds` is by stage; None keeps those of an earlier report. Raises InputError where the run has no eval.json.
    """
    evidence = read_report_data(folder)
    result = build_report(evidence, seconds)
    figures = plots.build_figures(evidence) | draw_promise_figures(evidence)
    for name, figure in figures.items():
        file = folder / "plots" / f"{name}.png"
        if figure:
            write_bytes(file, plots.to_png(figure))
        else:
            file.unlink(missing_ok=True)  # of an earlier report
    svgs = {name: plots.to_svg(figure, name) for name, figure in figures.items() if figure}
    write_json(folder / "report.json", result)
    write_text(folder / "report.html", page.render_page(evidence, result, svgs))
    write_readme(folder / "README.md", page.render_readme(evidence, result))
    return result | {"page": str(folder / "report.html")}


def write_readme(file: Path, text: str) -> None:
    """Write the README unless `file` is one that somebody else put there."""
    free = not (file.exists() or file.is_symlink())
    if free or is_generated(file):
        write_text(file, text)
    else:
        print_line(f"kept {file}: nothing in it says that sbtiny report wrote it (remove it for a new one)")


def is_generated(file: Path) -> bool:
    """Whether a README is a report's, or the card that TRL wrote into runs of earlier versions."""
    if file.is_symlink() or not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return page.README_MARK in text or "generated_from_trainer" in text
