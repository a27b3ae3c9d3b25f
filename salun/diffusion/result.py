"""What an erasure leaves: the `Run` in memory, and its folder on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from salun.checkpoints import safetensors_io
from salun.checkpoints.diffusers_folder import links_out
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.outputs import output_layout
from salun.checkpoints.patch import external_links, left_out
from salun.compute.environment import peak_memory
from salun.delta.delta import Delta, applied_metadata
from salun.diffusion.evaluation import EvalPrompts, Evaluation
from salun.diffusion.model.convert import lost_in_single_file
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.settings import display_name
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.output import write_new, write_output
from salun.diffusion.plan import Plan
from salun.errors import ConfigError, ModelError, some
from salun.files import write_bytes
from salun.masking.mask import Mask
from salun.progress import Event, Progress, Stage, silent
from salun.report import page, picture
from salun.runs.record import RunRecord

GRID = 8  # prompts of a row in the before/after picture


def grids(
    plan: Plan, asked: EvalPrompts, before: Evaluation, after: Evaluation
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Before/after pictures of forget prompts, a grid for each concept, and of retain prompts; None without pictures.

    Those of a sensitive concept are blurred, unless the options ask for them.
    """
    k = min(GRID, asked.each)
    if not k:
        return None, None
    made = []
    for i, blur in enumerate(blurred(plan)):
        rows = slice(i * asked.each, i * asked.each + k)
        texts = [p.text for p in asked.forget[rows]]
        made.append(picture.grid(before.forget[rows], after.forget[rows], texts, blur=blur))
    texts = [p.text for p in asked.retain[:k]]
    return picture.stack(*made), picture.grid(before.retain[:k], after.retain[:k], texts)


def blurred(plan: Plan) -> list[bool]:
    """For each concept, whether its pictures are blurred."""
    return [concept.sensitive and not plan.options.show_sensitive for concept in plan.concepts]


@dataclass(eq=False)
class Run:
    """A finished erasure.

    erased: the UNet tensors that changed, in the checkpoint's dtype. history: (step, forget loss, retain loss).
    metrics: as in `run.json`. record.data: the whole of `run.json`.
    """

    model: DiffusionModel
    plan: Plan
    mask: Mask
    erased: dict[str, Tensor]
    history: list[tuple[int, float, float]]
    metrics: dict[str, Any]
    asked: EvalPrompts
    before: Evaluation
    after: Evaluation
    record: RunRecord

    @property
    def own(self) -> Model:
        """The model, where it is one with files of its own. Raises ModelError for a host's, which has none."""
        if not isinstance(self.model, Model):
            raise ModelError(f"{self.model.name} has no files of its own: save the delta, and apply it to a file")
        return self.model

    @cached_property
    def delta(self) -> Delta:
        """The sparse, undoable difference between the model's UNet and the erased one."""
        return Delta.of_changed(self.model.original(), self.erased, self._notes())

    @cached_property
    def report(self) -> page.Report:
        """The report as one self-contained HTML page."""
        counts = self.mask.counts()
        layers = {name: (counts[name], int(np.prod(shape, dtype=np.int64))) for name, shape in self.mask.shapes.items()}
        forget, retain = self.grids()
        options = {**self.record.data["options"], "model": display_name(self.model.name)}
        told = {**self.record.data, "options": options}
        return page.Report(
            page.render(
                {**told, "status": "done", "peak_memory": peak_memory()},
                picture.png_bytes(forget) if forget is not None else None,
                picture.png_bytes(retain) if retain is not None else None,
                layers,
                blurred=any(blurred(self.plan)),
            )
        )

    def grids(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The `grids` of the run's pictures."""
        return grids(self.plan, self.asked, self.before, self.after)

    def save(self, target: str | Path, force: bool = False) -> None:
        """Write the erased model or its delta; the name chooses the format (see `write_output`)."""
        from salun.checkpoints.outputs import check_output

        check_output(str(target), force)
        notes = applied_metadata(self.delta, self.own.stored.metadata)
        write = write_output if force else write_new
        write(str(target), self.own, self.erased, self.delta, notes, self.plan.options.keep_ema)

    def apply(self) -> None:
        """Put the erased weights into the loaded model, to sample from it; `undo` takes them out again."""
        self.model.load(self.erased)

    def undo(self) -> None:
        """Put the model's own weights back."""
        original = self.model.original()
        self.model.load({name: original[name] for name in self.erased})

    def _notes(self) -> dict[str, str]:
        options = self.plan.options
        return {
            "salun.concept": self.plan.name,
            "salun.anchor": ", ".join(concept.anchor or "" for concept in self.plan.concepts),
            "salun.model": display_name(self.model.name),
            "salun.mask": str(self.record.data["mask"]["mode"]),
            "salun.density": str(options.density),
            "salun.seed": str(options.seed),
            "salun.version": str(self.record.data["versions"].get("salun", "")),
        }


def write_run(run: Run, outputs: list[str] | None, force: bool = False, progress: Progress = silent) -> None:
    """Fill the record in, write the outputs and, where the run has a folder, everything that belongs into it.

    force: overwrite what is at the outputs' names.
    """
    record, folder = run.record, run.record.folder
    record.data["concepts"] = [
        {
            "name": concept.name,
            "anchor": concept.anchor,
            "kind": concept.kind,
            "sensitive": concept.sensitive,
        }
        for concept in run.plan.concepts
    ]
    record.data["notes"] = [*run.plan.notes, *record.data["notes"]]
    record.data["hints"] = [run.plan.few_steps.as_data()] if run.plan.few_steps else []
    record.data["losses"] = [list(entry) for entry in run.history]
    record.data["metrics"] = run.metrics
    stored = run.own.stored
    for file in stored.files:
        record.note_file("inputs", "checkpoint" if stored.single else "unet", file, _shown(stored, file))
    others = [] if stored.single and run.plan.options.keep_ema else left_out(stored)
    links = external_links(stored) if _in_own_layout(stored, outputs, folder) else []
    if run.own.components is not None and any(output_layout(target) == "folder" for target in outputs or []):
        links += links_out(run.own.components)
    if links:
        record.data["notes"].append(f"left out, as links that lead out of the model: {some(links)}")
    if others and _in_own_layout(stored, outputs, folder):
        what = f"{len(others)} EMA tensors (--keep-ema keeps them)" if stored.single else ", ".join(others)
        record.data["notes"].append(f"left out of the erased model, since they hold the concept: {what}")
        progress(Event(Stage.SAVING, message=record.data["notes"][-1]))
    targets = {target: target for target in outputs or []}
    if folder is not None and not targets:
        own = "model.safetensors" if stored.single else "model/"
        targets = {f"{folder}/{name}": name for name in (own, "delta.salun.safetensors")}
    notes = applied_metadata(run.delta, stored.metadata)
    with record.stage(Stage.SAVING):
        for i, (target, shown) in enumerate(targets.items(), 1):
            progress(Event(Stage.SAVING, i, len(targets), message=shown))
            ours = folder is not None and Path(target).parent == folder
            write = write_output if force or ours else write_new
            try:
                kind = write(target, run.own, run.erased, run.delta, notes, run.plan.options.keep_ema, progress)
            except (ConfigError, ModelError) as error:
                if folder is None:
                    raise
                kind_of = ConfigError if isinstance(error, ConfigError) else ModelError
                raise kind_of(
                    f"{error}. What was trained is kept: the same command with --resume --run-dir {folder} and another "
                    "--output writes it",
                    code="outputs-failed",
                ) from error
            note = _kept(Path(target), shown) if kind == "lora" else None
            if kind == "checkpoint" and not stored.single and (lost := lost_in_single_file(run.own)):
                note = f"{shown}: {lost}"
            if note is not None:
                record.data["notes"].append(note)
                progress(Event(Stage.SAVING, message=note))
            files = sorted((Path(target) / "unet").glob("*.safetensors")) if kind == "folder" else [Path(target)]
            for file in files:
                inner = f"{shown}unet/{file.name}" if kind == "folder" else shown
                record.note_file("outputs", kind, file, inner if not Path(inner).is_absolute() else file.name)
        if folder is not None:
            run.mask.save(folder / "mask.safetensors")
            record.note_file("outputs", "mask", folder / "mask.safetensors", "mask.safetensors")
            forget, retain = run.grids()
            if forget is not None and retain is not None:
                joined = picture.stack(forget, retain)
                write_bytes(folder / "before_after.png", picture.png_bytes(joined))
    if folder is not None:
        run.report.save(folder / "report.html")


def _kept(file: Path, shown: str) -> str:
    """What a low-rank file keeps, by its own metadata."""
    share = float(safetensors_io.read_header(file).metadata["salun.energy_kept"])
    name = Path(shown).name
    return (
        f"{name} holds {share:.1%} of the difference's energy (squared norm); `salun delta export` takes more or less"
    )


def _shown(stored: Stored, file: Path) -> str:
    return file.name if stored.single else f"unet/{file.name}"


def _in_own_layout(stored: Stored, outputs: list[str] | None, folder: Path | None) -> bool:
    """Whether some output is a copy of the model in its own layout."""
    if not outputs:
        return folder is not None
    kinds = [output_layout(target) for target in outputs]
    return ("file" if stored.single else "folder") in kinds
