"""Puts jobs into the queue: checks the input of forms and requests, and gives every new file a new name."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from salun.diffusion.attack_options import AttackOptions
from salun.diffusion.eval_options import ComparedOptions, EvalOptions
from salun.diffusion.options import EraseJob, EraseOptions
from salun.errors import ConfigError
from salun.options import from_mapping

from .host import Host
from .inputs import Inputs
from .job_queue import Queue
from .jobs import Job
from .limits import check_lengths
from .models import Models, stem_of
from .paths import given_name, made_name, new_file
from .runs import DELTA, Runs

Looked = TypeVar("Looked", bound=ComparedOptions)
MAX_PREVIEW_EVERY = 1_000_000  # steps
MAX_RANK = 4096
MIN_STRENGTH, MAX_STRENGTH = -0.5, 1.5
MAX_SEED = 2**53 - 1  # a browser's largest exact integer


class Requests:
    """One method for each kind of job. All raise ConfigError for invalid input."""

    def __init__(self, host: Host, queue: Queue, runs: Runs, models: Models, inputs: Inputs) -> None:
        self.host, self.queue, self.runs, self.models, self.inputs = host, queue, runs, models, inputs
        self._naming = threading.Lock()  # held from the choice of a new name until a job has it

    def erase(self, options: Mapping[str, Any], preview_every: int = 0, name: str = "") -> Job:
        """Queue an erasure.

        Args:
            options: Fields of `EraseJob` that are in ERASE_FIELDS; `model` is a title. preview_every: Steps between two
            previews, 0 for none. name: Of the new checkpoint; it goes into the host's folder of checkpoints, else into
            the data folder's `models`.
        """
        values = self.inputs.check(options)
        title = values.pop("model", None)
        model = self.models.source(title)
        if not isinstance(preview_every, int) or not 0 <= preview_every <= MAX_PREVIEW_EVERY:
            raise ConfigError(f"preview_every is {preview_every!r}, but must be from 0 to {MAX_PREVIEW_EVERY:,}")
        job: EraseJob = from_mapping(EraseJob, values, "")
        concepts = _concepts(job)
        self.host.python()
        request = {"preview_every": preview_every, "host": self.host.name, "name": name}
        file_name = given_name(name) if name.strip() else None
        self.models.check(title, dataclasses.replace(job, concept=concepts))
        with self._naming:
            folder = self.runs.new("-".join(concepts), {job.run for job in self.queue.all()})
            outputs = self._outputs(folder, file_name, (stem_of(title), f"no-{'-'.join(concepts)}"), model)
            job = dataclasses.replace(job, concept=concepts, model=model, run_dir=str(folder), output=outputs)
            request["options"] = dataclasses.asdict(job)
            label = f"erase {', '.join(concepts)} from {stem_of(title)}"
            return self.queue.submit("erase", label, request, folder.name)

    def mask(self, options: Mapping[str, Any]) -> Job:
        """Queue a mask without an erasure, to be chosen by its name later. options: as for `erase`."""
        values = self.inputs.check(options)
        title = values.pop("model", None)
        concepts = _concepts(from_mapping(EraseJob, {"concept": values.pop("concept", [])}, ""))
        names = {item.name for item in dataclasses.fields(EraseOptions)}
        checked: EraseOptions = from_mapping(EraseOptions, {k: v for k, v in values.items() if k in names}, "")
        source = self.models.source(title)
        self.models.check(title, EraseJob(concept=concepts, **dataclasses.asdict(checked)))
        self.host.python()
        request = {"options": dataclasses.asdict(checked), "concept": concepts, "model": source}
        with self._naming:
            stem = made_name(stem_of(title), "-".join(concepts))
            target = new_file(self.inputs.masks, stem, ".safetensors", self._reserved_outputs())
            return self.queue.submit("mask", f"mask of {', '.join(concepts)}", {**request, "output": str(target)})

    def stack(self, model: str, deltas: Sequence[str], strengths: Sequence[float], name: str = "") -> Job:
        """Queue the writing of a checkpoint with deltas in it."""
        if not deltas:
            raise ConfigError("no delta is chosen")
        if len(deltas) != len(strengths):
            raise ConfigError(
                f"there are {len(deltas)} deltas, but {len(strengths)} strengths", advice="Give one for each delta"
            )
        for value in strengths:
            _check_strength(value)
        files = [str(self.runs.delta(run)) for run in deltas]
        parts = ", ".join(f"{run} at {strength:g}" for run, strength in zip(deltas, strengths, strict=True))
        request = {"deltas": files, "strengths": [float(s) for s in strengths]}
        return self._rewritten("stack", f"{model} with {parts}", model, request, name, f"with-{'-'.join(deltas)}")

    def undo(self, model: str, delta: str, name: str = "") -> Job:
        """Queue the writing of a checkpoint without a delta."""
        request = {"delta": str(self.runs.delta(delta))}
        return self._rewritten("undo", f"{model} without {delta}", model, request, name, "undone")

    def _rewritten(self, kind: str, title: str, model: str, request: dict[str, Any], name: str, suffix: str) -> Job:
        """Queue a copy of a model, under a given name or the model's name with a suffix."""
        source = self.models.named(model)
        request |= {"model": source, "name": name}
        self.host.python()
        new_name = given_name(name) if name.strip() else made_name(stem_of(model), suffix)
        with self._naming:
            output = self._copy_of(source, new_name)
            return self.queue.submit(kind, title, {**request, "output": output})

    def export(
        self, delta: str, form: str = "lora", rank: int | None = None, model: str | None = None, otherwise: str = ""
    ) -> Job:
        """Queue the writing of a LoRA ("lora", low rank) or of the full difference ("diff").

        model: the delta's base; by default the model of the run, or `otherwise` if that is missing.
        """
        if form not in ("lora", "diff"):
            raise ConfigError(f"form is {form[:80]!r}, but must be lora or diff")
        if rank is not None and not 1 <= rank <= MAX_RANK:
            raise ConfigError(f"rank is {rank!r}, but must be from 1 to {MAX_RANK}")
        file = self.runs.delta(delta)
        base = self.models.named(model) if model else self.models.base_of(delta, otherwise)
        request = {"delta": str(file), "model": base, "form": form, "rank": rank}
        self.host.python()
        with self._naming:
            folder = self.host.loras() or file.parent
            target = new_file(folder, f"no-{delta}", f".{form}.safetensors", self._reserved_outputs())
            return self.queue.submit("export", f"{delta} as {form}", {**request, "output": str(target)})

    def evaluate(self, model: str, options: Mapping[str, Any] | None = None) -> Job:
        """Queue an evaluation.

        Args:
            model: A run's name, or a model's title. options: Fields of `EvalOptions` that are in EVAL_FIELDS; `against`
            is a title. A run names its original, its concept and its anchor itself.
        """
        return self._looked_at("evaluate", model, self._options(EvalOptions, options))

    def attack(self, model: str, options: Mapping[str, Any] | None = None) -> Job:
        """Queue attacks on a model. model: as for `evaluate`. options: fields of `AttackOptions` in ATTACK_FIELDS."""
        given = self._options(AttackOptions, options)
        _ = given.attacks  # checked before it waits in the queue
        if not given.against and not self.runs.has(model):
            raise ConfigError("is needed to attack a checkpoint: images of the concept come from it", option="against")
        return self._looked_at("attack", model, given)

    def _options(self, kind: type[Looked], options: Mapping[str, Any] | None) -> Looked:
        made: Looked = from_mapping(kind, self.inputs.check(options or {}, kind), "")
        return made

    def _looked_at(self, kind: str, model: str, given: ComparedOptions) -> Job:
        """Queue a job that looks at a run or a model."""
        if not given.against and self.runs.has(model):
            for name in ("concept", "anchor"):
                if any(text.strip() for text in getattr(given, name)):
                    raise ConfigError("is named by the run already", option=name, advice="Leave it empty")
            target, named = str(self.runs.get(model)), dataclasses.replace(given, against=None, concept=[], anchor=[])
        else:
            target, against = self.models.named(model), self.models.named(given.against) if given.against else None
            named = dataclasses.replace(given, against=against, concept=_named(given.concept))
        self.host.python()
        title = f"{kind} {model}" + (f" against {given.against}" if given.against else "")
        return self.queue.submit(kind, title, {"target": target, "options": dataclasses.asdict(named)})

    def sample(self, run: str, prompt: str, strength: float = 1.0, seed: int = 0) -> Job:
        """Queue an image of the original of a run and one at a strength of its erasure, from the same noise."""
        folder, _ = self.runs.get(run), self.runs.delta(run)
        check_lengths({"prompt": prompt})
        if not prompt.strip():
            raise ConfigError("no prompt is given", advice="Enter one")
        _check_strength(strength)
        if not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"is {seed}, but must be from 0 to {MAX_SEED}", option="seed")
        model = self.models.base_of(run, "")
        self.host.python()
        request = {"target": str(folder), "model": model, "prompt": prompt, "strength": float(strength), "seed": seed}
        return self.queue.submit("sample", f"try “{prompt}” at strength {strength:g}, seed {seed}", request, run)

    def overlaps(self, deltas: Sequence[str]) -> Job:
        """Queue the counting of weights that deltas both change."""
        if len(deltas) < 2:
            raise ConfigError(
                f"the number of deltas is {len(deltas)}, but must be at least 2", advice="Choose two or more"
            )
        self.host.python()
        files = [str(self.runs.delta(run)) for run in deltas]
        return self.queue.submit("overlaps", f"overlap of {', '.join(deltas)}", {"deltas": files})

    def inspect(self, run: str, against: str | None = None) -> Job:
        """Queue a summary of a run's mask, or the overlap of two runs' masks."""
        path = str(self.runs.get(run))
        other = str(self.runs.get(against)) if against else None
        self.host.python()
        title = f"mask of {run}" + (f" and {against}" if against else "")
        return self.queue.submit("inspect", title, {"path": path, "against": other})

    def _outputs(self, folder: Path, name: str | None, parts: tuple[str, str], source: str | None) -> list[str]:
        """The outputs of an erasure. name: of the checkpoint, if given; parts: of its name otherwise."""
        checkpoints = self.host.checkpoints()
        if checkpoints is None:
            return [self._copy_of(source or "", name or made_name(*parts)), str(folder / DELTA)]
        stamp = "-" + "-".join(folder.name.split("-")[:2])
        target = new_file(checkpoints, name or made_name(*parts, stamp), ".safetensors", self._reserved_outputs())
        return [str(target), str(folder / DELTA)]

    def _copy_of(self, source: str, name: str) -> str:
        """The path of a copy of a model, in the model's layout."""
        folder = self.runs.checkpoint_home()
        folder.mkdir(parents=True, exist_ok=True)
        single = Path(source).suffix.lower() in (".safetensors", ".ckpt")
        ending = ".safetensors" if single else ""
        return f"{new_file(folder, name, ending, self._reserved_outputs())}{'' if single else '/'}"

    def _reserved_outputs(self) -> list[str]:
        """The outputs of open and resumable jobs."""
        jobs = [job for job in self.queue.all() if job.open or job.resumable]
        return [path.rstrip("/") for job in jobs for path in job.outputs]


def _check_strength(value: float) -> None:
    if not MIN_STRENGTH <= value <= MAX_STRENGTH:
        raise ConfigError(f"strength is {value!r}, but must be from {MIN_STRENGTH} to {MAX_STRENGTH}")


def _concepts(job: EraseJob) -> list[str]:
    return _named(job.concept)


def _named(texts: Sequence[str]) -> list[str]:
    """Concepts without spaces around them. Raises ConfigError where there is no concept."""
    concepts = [text.strip() for text in texts if text.strip()]
    if not concepts:
        raise ConfigError("no concept is given", advice="Choose a preset, or enter a concept")
    return concepts
