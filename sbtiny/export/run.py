"""From a run to files: merged folder, GGUF files, what goes beside them, and the check. Built aside, renamed when whole."""

from pathlib import Path
from typing import Any

import torch

from sbtiny import runs
from sbtiny.errors import Failed, InputError
from sbtiny.evaluation.evaluate import Verify
from sbtiny.export import gguf, kquants, modelfile
from sbtiny.export.base import as_evaluated, ordered_stops, read_generation, read_tokenizer
from sbtiny.export.card import card
from sbtiny.export.check import Check
from sbtiny.export.merge import Merged, save_weights
from sbtiny.export.placing import aside, place
from sbtiny.export.config import Plan
from sbtiny.export.gguf_tokenizer import Vocabulary, read_vocabulary
from sbtiny.models.load import base_folder
from sbtiny.models.tensor_faults import EMBEDDING
from sbtiny.models.prompt import stop_ids_of
from sbtiny.models.tensors import read_config, read_folder
from sbtiny.progress import bar, console
from sbtiny.tasks.sources import Question


class Export:
    """One export under way: the base's parts, read once. Raises InputError for what cannot be exported rightly."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.base = plan, base_folder(plan.source)
        self.config = read_config(self.base)
        if plan.kinds:
            gguf.check_architecture(self.config)
        self.tokenizer = read_tokenizer(self.base, plan.form)
        runs.check_base(plan.run, read_folder(self.base).fingerprint())
        as_trained = plan.merge == "dequantized"
        dtype = getattr(torch, plan.trained_in) if as_trained and plan.trained_in else None
        self.merged = Merged(self.base, plan.run / "adapter", as_trained and plan.nf4, self.config.tie_word_embeddings, dtype)
        if EMBEDDING not in self.merged.files:
            raise InputError(f"{self.base} has no {EMBEDDING}: only models laid out as Llama's can be exported")
        rows = self.merged.shapes[EMBEDDING][0]
        generation = read_generation(self.base, self.config)
        self.stops = ordered_stops(stop_ids_of(generation, self.tokenizer, rows), self.tokenizer)
        self.generation = as_evaluated(generation, self.stops, rows, plan.settings.eval)
        self.vocabulary = self._vocabulary(rows) if plan.kinds else None
        self.composes = self.vocabulary is not None and self.vocabulary.composes

    def _vocabulary(self, rows: int) -> Vocabulary:
        """The tokenizer as a GGUF file has it, when all the rest can be put in one too."""
        for name in self.merged.files:
            gguf.gguf_name(name, self.config)
        modelfile.go_template(self.tokenizer)
        return read_vocabulary(self.tokenizer, rows)

    def write(self, folder: Path) -> dict[str, Path]:
        """Everything but export.json into `folder`; the GGUF files by kind."""
        self._write_merged(folder / "merged")
        files = {kind: folder / f"{self.plan.name}-{kind}.gguf" for kind in self.plan.kinds}
        for kind, file in files.items():
            self._write_gguf(file, kind)
        self._write_beside(folder, list(files.values()))
        return files

    def _write_merged(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        with bar("merging", len(self.merged.files)) as advance:
            save_weights(self.merged, folder, getattr(torch, self.plan.dtype), advance)
        self.config.dtype = self.plan.dtype
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.generation.save_pretrained(folder)
        (folder / "README.md").write_text(card(self.plan, self.base), encoding="utf-8")

    def _write_gguf(self, file: Path, kind: str) -> None:
        if kind in kquants.KINDS:
            plain = file.with_name(f"{self.plan.name}-f16.gguf")
            made = not plain.is_file()
            if made:
                self._write_gguf(plain, "f16")
            kquants.quantize(plain, file, kind)
            if made and "f16" not in self.plan.kinds:
                plain.unlink()
            return
        with bar(f"writing {kind}", len(self.merged.files)) as advance:
            for _ in gguf.write(file, kind, self.merged, self.config, self.tokenizer, self.vocabulary, self.stops, self.plan.name):
                advance()

    def _write_beside(self, folder: Path, files: list[Path]) -> None:
        e = self.plan.settings.eval
        about = {"name": self.plan.name, "base": self.plan.source.name, "run": str(self.plan.run), "merge": self.plan.merge}
        first = files[0].name if files else None
        text = modelfile.readme(about, self.tokenizer, first, self.plan.form, e, self.composes)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if first:
            text = modelfile.modelfile(first, self.tokenizer, self.stops, e, self.config.max_position_embeddings)
            (folder / "Modelfile").write_text(text, encoding="utf-8")


def passed(checked: bool, failures: list[str], unread: list[str]) -> bool | None:
    """None: nobody knows, for there was no check, or there is a file that nothing here could read."""
    if failures:
        return False
    return True if checked and not unread else None


def export(plan: Plan, questions: list[Question], verify: Verify) -> dict[str, Any]:
    """Write the files and check them: the content of export.json.

    Raises Failed when the check does; the files are then kept under the name with `-failed`, with their export.json.
    """
    work = Export(plan)
    result: dict[str, Any] = {
        "run": str(plan.run), "model": plan.source.name, "format": plan.form.name,
        "merge": plan.merge, "trained_in_4bit": plan.nf4, "dtype": plan.dtype,
    }  # fmt: skip
    failures: list[str] = []
    unread: list[str] = []
    with aside(plan.output) as building:
        files = work.write(building)
        result["stops"] = work.tokenizer.convert_ids_to_tokens(work.stops)
        if plan.check:
            check = Check(plan, questions, verify, work.composes)
            check.trained()
            check.merged(building / "merged")
            for kind, file in files.items():
                check.gguf(file, kind)
            result |= check.result
            failures, unread = check.failures, check.unread
        result |= {"checked": plan.check, "passed": passed(plan.check, failures, unread), "failures": failures, "not_checked": unread}
        runs.write_json(building / "export.json", result)
        output = plan.output if not failures else runs.unused(plan.output.with_name(f"{plan.output.name}-failed"))
        place(building, output)
    result["folder"] = str(output)
    if failures:
        raise Failed(f"{output} is not the trained policy: {'; '.join(failures)}")
    for reason in unread:
        console.print(f"not checked: {reason}", style="yellow", soft_wrap=True, markup=False)
    console.print(f"wrote {output}")
    return result
