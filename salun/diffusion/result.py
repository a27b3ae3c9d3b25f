"""The result of an erasure: the `Run` in memory, and its folder on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from salun.checkpoints import diffusers_folder, safetensors_io
from salun.checkpoints.lazy_tensors import Stored
from salun.checkpoints.outputs import output_layout
from salun.checkpoints.patch import excluded_weights, external_links
from salun.compute.environment import peak_memory
from salun.delta.delta import Delta, applied_metadata
from salun.diffusion.context import RunContext
from salun.diffusion.evaluation import EvalPrompts, Evaluation
from salun.diffusion.model.convert import lost_in_single_file
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.settings import display_name
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.output import write_new, write_output
from salun.diffusion.plan import Plan
from salun.errors import ConfigError, ModelError, fill, literal, some
from salun.evaluation.detector import Samples
from salun.files import write_bytes
from salun.masking.mask import Mask
from salun.masking.training_state import LossRow
from salun.progress import Event, Stage
from salun.report import image_grid
from salun.report.page import run_page
from salun.report.render import ImagePair, Report
from salun.runs.record import RunRecord

GRID = 8  # prompts per row of the before/after image


def grids(
    plan: Plan, prompts: EvalPrompts, before: Evaluation, after: Evaluation
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Before/after images of forget prompts, a grid per concept, and of retain prompts; None without images.

    Those of a sensitive concept are blurred, unless the options ask for them.
    """
    k = min(GRID, prompts.each)
    if not k:
        return None, None
    rows_of_concepts = []
    for i, blur in enumerate(blurred(plan)):
        rows = slice(i * prompts.each, i * prompts.each + k)
        texts = [p.text for p in prompts.forget[rows]]
        rows_of_concepts.append(
            image_grid.grid(before.forget.images[rows], after.forget.images[rows], texts, blur=blur)
        )
    texts = [p.text for p in prompts.retain[:k]]
    return image_grid.stack(*rows_of_concepts), image_grid.grid(
        before.retain.images[:k], after.retain.images[:k], texts
    )


def image_pairs(
    plan: Plan, prompts: EvalPrompts, before: Evaluation, after: Evaluation
) -> tuple[list[ImagePair], list[ImagePair]]:
    """Before/after images of forget prompts, the first few of each concept, and of retain prompts, for a page."""
    k = min(GRID, prompts.each)
    forget = [
        _pair(before.forget, after.forget, row, blur)
        for i, blur in enumerate(blurred(plan))
        for row in range(i * prompts.each, i * prompts.each + k)
    ]
    return forget, [_pair(before.retain, after.retain, row) for row in range(k)]


def _pair(before: Samples, after: Samples, row: int, blur: bool = False) -> ImagePair:
    return pair_of(before.prompts[row], {"before": before.images[row], "after": after.images[row]}, blur)


def pair_of(prompt: str, images: Mapping[str, np.ndarray], blur: bool = False) -> ImagePair:
    """Images of one prompt, by label."""
    return ImagePair(prompt, {name: image_grid.thumbnail(image, blur) for name, image in images.items()})


def blurred(plan: Plan) -> list[bool]:
    """For each concept, whether its images are blurred."""
    return [concept.sensitive and not plan.options.show_sensitive for concept in plan.concepts]


@dataclass(eq=False)
class Run:
    """A finished erasure.

    erased: the UNet tensors that changed, in the checkpoint's dtype. history: {"step": 1, …} and its named losses.
    metrics: as in `run.json`. record.as_json(): the whole of `run.json`.
    """

    model: DiffusionModel
    plan: Plan
    mask: Mask
    erased: dict[str, Tensor]
    history: list[LossRow]
    metrics: dict[str, Any]
    prompts: EvalPrompts
    before: Evaluation
    after: Evaluation
    record: RunRecord

    @property
    def file_model(self) -> Model:
        """The model, where it is one with files. Raises ModelError for a host's, which has none."""
        if not isinstance(self.model, Model):
            raise ModelError(f"{self.model.name} has no files of its own: save the delta, and apply it to a file")
        return self.model

    @cached_property
    def delta(self) -> Delta:
        """The sparse, undoable difference between the model's UNet and the erased one."""
        return Delta.of_changed(self.model.original(), self.erased, self._notes())

    @cached_property
    def report(self) -> Report:
        """The report as one self-contained HTML page."""
        counts = self.mask.counts()
        layers = {name: (counts[name], int(np.prod(shape, dtype=np.int64))) for name, shape in self.mask.shapes.items()}
        record, folder = self.record.as_json(), self.record.folder
        options = {**record["options"], "model": display_name(self.model.name)}
        paths = [entry["path"] for entry in record["outputs"]]
        return run_page(
            {**record, "options": options, "status": "done", "peak_memory": peak_memory()},
            *image_pairs(self.plan, self.prompts, self.before, self.after),
            layers,
            blurred=any(blurred(self.plan)),
            inside=[path for path in paths if folder is not None and (folder / path).exists()],
        )

    def grids(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The `grids` of the run's images."""
        return grids(self.plan, self.prompts, self.before, self.after)

    def save(self, target: str | Path, force: bool = False) -> None:
        """Write the erased model or its delta; the name chooses the format (see `write_output`)."""
        from salun.checkpoints.outputs import check_output

        check_output(str(target), force)
        notes = applied_metadata(self.delta, self.file_model.stored.metadata)
        write = write_output if force else write_new
        write(str(target), self.file_model, self.erased, self.delta, notes, self.plan.options.keep_ema)

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
            "salun.mask": str((self.record.mask or {})["mode"]),
            "salun.density": str(options.density),
            "salun.seed": str(options.seed),
            "salun.version": str(self.record.versions.get("salun", "")),
        }


def write_run(run: Run, context: RunContext) -> None:
    """Complete the record, write the outputs and, where the run has a folder, everything that belongs into it."""
    record, folder = run.record, run.record.folder
    record.concepts = [
        {"name": concept.name, "anchor": concept.anchor, "kind": concept.kind, "sensitive": concept.sensitive}
        for concept in run.plan.concepts
    ]
    record.hints = [run.plan.few_steps.as_data()] if run.plan.few_steps else []
    record.losses = run.history
    record.metrics = run.metrics
    stored = run.file_model.stored
    for file in stored.files:
        record.add_input("checkpoint" if stored.single else stored.part, file, _shown(stored, file))
    targets = {target: target for target in context.outputs or []}
    if folder is not None and not targets:
        names = ("model.safetensors" if stored.single else "model/", "delta.salun.safetensors")
        targets = {f"{folder}/{name}": name for name in names}
    _note_exclusions(run, list(targets), context)
    with record.stage(Stage.SAVING):
        for i, (target, shown) in enumerate(targets.items(), 1):
            context.progress(Event(Stage.SAVING, i, len(targets)))
            _write_target(run, target, shown, context)
        if folder is not None:
            run.mask.save(folder / "mask.safetensors")
            record.add_output("mask", folder / "mask.safetensors", "mask.safetensors")
            forget, retain = run.grids()
            if forget is not None and retain is not None:
                joined = image_grid.stack(forget, retain)
                write_bytes(folder / "before_after.png", image_grid.png_bytes(joined))
    if folder is not None:
        run.report.save(folder / "report.html")


def _write_target(run: Run, target: str, shown: str, context: RunContext) -> None:
    """Write one output and record it. shown: its path in the record."""
    record, folder, path = run.record, run.record.folder, Path(target)
    stored = run.file_model.stored
    write = write_output if context.force or (folder is not None and path.parent == folder) else write_new
    notes = applied_metadata(run.delta, stored.metadata)
    try:
        kind = write(target, run.file_model, run.erased, run.delta, notes, run.plan.options.keep_ema, context.progress)
    except (ConfigError, ModelError) as error:
        if folder is None:
            raise
        kind_of_error = ConfigError if isinstance(error, ConfigError) else ModelError
        raise kind_of_error(
            f"{error.message}. {fill(error.advice, str)}" if error.advice else error.message,
            option=error.option,
            advice=f"The trained weights are saved: repeat the command with {{resume}} {{run_dir}} {literal(folder)} "
            "and another {output}",
            code="resume-to-write",
        ) from error
    if kind == "lora":
        context.note(Stage.SAVING, _energy_note(path, shown))
    if kind == "checkpoint" and not stored.single and (lost := lost_in_single_file(run.file_model)):
        context.note(Stage.SAVING, f"{shown}: {lost}")
    part = run.file_model.family.network.part
    files = sorted((path / part).glob("*.safetensors")) if kind == "folder" else [path]
    for file in files:
        inner = f"{shown}{part}/{file.name}" if kind == "folder" else shown
        record.add_output(kind, file, inner if not Path(inner).is_absolute() else file.name)


def _note_exclusions(run: Run, targets: list[str], context: RunContext) -> None:
    """Note what is not copied: links out of the model's folder, and weights that still contain the concept."""
    model, stored = run.file_model, run.file_model.stored
    layouts = [output_layout(target) for target in targets]
    same_layout = ("file" if stored.single else "folder") in layouts
    links = external_links(stored) if same_layout else []
    if model.components is not None and context.outputs and "folder" in layouts:
        links += diffusers_folder.external_links(model.components)
    if links:
        run.record.notes.append(f"skipped, since they are links out of the model's folder: {some(links)}")
    excluded = [] if stored.single and run.plan.options.keep_ema else excluded_weights(stored)
    if excluded and same_layout:
        what = f"{len(excluded)} EMA tensors (keep_ema keeps them)" if stored.single else ", ".join(excluded)
        context.note(Stage.SAVING, f"not in the erased model, since they still contain the concept: {what}")


def _energy_note(file: Path, shown: str) -> str:
    """How much of the difference a LoRA holds, by its own metadata."""
    energy = float(safetensors_io.read_header(file).metadata["salun.energy_kept"])
    return (
        f"{Path(shown).name} holds {energy:.1%} of the difference's energy (squared norm); `salun delta export` can "
        "write other ranks"
    )


def _shown(stored: Stored, file: Path) -> str:
    return file.name if stored.single else f"{stored.part}/{file.name}"
