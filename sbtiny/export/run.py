"""Export a run: merged folder, GGUF files, the texts beside them, and the check. All is built beside and renamed when whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sbtiny import locks, runs
from sbtiny.disk import is_disk_full
from sbtiny.errors import Failed, InputError
from sbtiny.export import gguf, kquants, modelfile
from sbtiny.export.base import load_export_tokenizer, make_generation_config, ordered_stops
from sbtiny.export.check import Check
from sbtiny.export.config import ExportConfig
from sbtiny.export.gguf_tokenizer import Vocabulary, read_vocabulary
from sbtiny.export.merge import Merged, save_weights
from sbtiny.models.load import base_folder
from sbtiny.models.prompt import stop_ids_of
from sbtiny.models.tensor_faults import EMBEDDING
from sbtiny.models.tensors import read_config, read_folder, read_generation
from sbtiny.progress import bar, console, print_line
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier


class ExportWriter:
    """The parts of the base that an export needs, and their writers. Raises InputError for a base that cannot be exported."""

    def __init__(self, plan: ExportConfig) -> None:
        self.plan, self.base = plan, base_folder(plan.source)
        self.config = read_config(self.base)
        if plan.kinds:
            gguf.check_architecture(self.config)
        self.tokenizer = load_export_tokenizer(self.base, plan.form, plan.prompt)
        runs.check_base(plan.run, read_folder(self.base).fingerprint(), plan.settings.base)
        as_trained = plan.merge == "dequantized"
        dtype = getattr(torch, plan.trained_in) if as_trained and plan.trained_in else None
        self.merged = Merged(self.base, plan.run / "adapter", as_trained and plan.nf4, self.config.tie_word_embeddings, dtype)
        if EMBEDDING not in self.merged.tensors:
            raise InputError(f"{self.base} has no {EMBEDDING}: only models laid out as Llama's can be exported")
        rows = self.merged.tensors[EMBEDDING].shape[0]
        generation = read_generation(self.base, self.config)
        self.stops = ordered_stops(stop_ids_of(generation, self.tokenizer, rows), self.tokenizer)
        self.generation = make_generation_config(generation, self.stops, rows, plan.settings.eval)
        self.vocabulary = self._vocabulary(rows) if plan.kinds else None
        self.composes = self.vocabulary is not None and self.vocabulary.composes

    def _vocabulary(self, rows: int) -> Vocabulary:
        """The tokenizer's GGUF fields. Raises InputError when tensors, template or tokenizer fit into no GGUF."""
        for name in self.merged.tensors:
            gguf.gguf_name(name, self.config)
        modelfile.go_template(self.tokenizer)
        return read_vocabulary(self.tokenizer, rows)

    def write(self, folder: Path) -> dict[str, Path]:
        """Write all but export.json into `folder`; return the GGUF files by kind."""
        self._write_merged(folder / "merged")
        files = {kind: folder / f"{self.plan.name}-{kind}.gguf" for kind in self.plan.kinds}
        for kind, file in files.items():
            self._write_gguf(file, kind)
        self._write_beside(folder, next((file.name for file in files.values()), None))
        return files

    def _write_merged(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        with bar("merging", len(self.merged.tensors)) as advance:
            save_weights(self.merged, folder, getattr(torch, self.plan.dtype), advance)
        self.config.dtype = self.plan.dtype
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.generation.save_pretrained(folder)
        (folder / "README.md").write_text(modelfile.model_card(self.plan, self.base), encoding="utf-8")

    def _write_gguf(self, file: Path, kind: str) -> None:
        if kind in kquants.KINDS:
            plain = file.with_name(f"{self.plan.name}-f16.gguf")
            temporary = not plain.is_file()
            if temporary:
                self._write_gguf(plain, "f16")
            kquants.quantize(plain, file, kind)
            if temporary and "f16" not in self.plan.kinds:
                plain.unlink()
            return
        with bar(f"writing {kind}", len(self.merged.tensors)) as advance:
            for _ in gguf.write_gguf(file, kind, self.merged, self.config, self.tokenizer, self.vocabulary, self.stops, self.plan.name):
                advance()

    def _write_beside(self, folder: Path, gguf: str | None) -> None:
        """Write README and, for the GGUF file of this name, the Modelfile."""
        (folder / "README.md").write_text(modelfile.readme(self.plan, self.tokenizer, gguf, self.composes), encoding="utf-8")
        if gguf:
            text = modelfile.modelfile(gguf, self.tokenizer, self.stops, self.plan.settings.eval, self.config.max_position_embeddings)
            (folder / "Modelfile").write_text(text, encoding="utf-8")


@contextmanager
def make_temporary_build_folder(folder: Path) -> Iterator[Path]:
    """A folder to build in, beside `folder`, removed at the end.

    Raises InputError for a full disk, or where another process builds the same.
    """
    building = folder.with_name(f".{folder.name}.building")
    with locks.hold(locks.lock_path(folder), folder):
        shutil.rmtree(building, ignore_errors=True)  # of an export that was killed
        try:
            building.mkdir(parents=True)
            yield building
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_disk_full(error):
                line = f"cannot write {folder}, the disk is full or read-only: free space, write fewer kinds, or choose another --output"
                raise InputError(line) from error
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


def move_into_place(building: Path, folder: Path) -> None:
    """Rename a finished export to its name; remove an earlier one only then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def export_run(plan: ExportConfig, questions: list[Question], verify: Verifier) -> dict[str, Any]:
    """Write the files, check them, and return the content of export.json.

    Raises Failed when the check fails; the files then stay in a folder with `-failed` in its name.
    """
    work = ExportWriter(plan)
    check = Check(plan, questions, verify, work.composes)
    with make_temporary_build_folder(plan.output) as building:
        files = work.write(building)
        if plan.check:
            check.measure(building, files)
        result: dict[str, Any] = {
            "run": str(plan.run), "model": plan.source.name, "format": plan.form.name, "prompt": asdict(plan.prompt),
            "merge": plan.merge, "trained_in_4bit": plan.nf4, "dtype": plan.dtype,
            "stops": work.tokenizer.convert_ids_to_tokens(work.stops),
            **(check.result if plan.check else {}),
            "checked": plan.check, "passed": check.passed, "failures": check.failures, "not_checked": check.unread,
        }  # fmt: skip
        runs.write_json(building / "export.json", result)
        output = runs.free_path(plan.output.with_name(f"{plan.output.name}-failed")) if check.failures else plan.output
        move_into_place(building, output)
    result["folder"] = str(output)
    if check.failures:
        raise Failed(f"{output} is not the trained policy: {'; '.join(check.failures)}")
    for reason in check.unread:
        console.print(f"not checked: {reason}", style="yellow", soft_wrap=True, markup=False)
    print_line(f"wrote {output}")
    return result
