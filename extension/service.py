"""What the page and the HTTP API can ask for. Both come with words of strangers: here they are checked and confined."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun.diffusion.options import EraseJob, EraseOptions
from salun.errors import ConfigError, DataError
from salun.options import MASKS, from_mapping
from salun.runs.folder import STATE, exclusive_lock, new_run_folder
from salun.runs.reading import read_run
from salun.user_text import unquoted

from . import environment
from .history import DELTA, SHOWN, UNREADABLE, options_in, summary
from .host import Host
from .jobs import Job, Queue
from .limits import check_lengths
from .places import (
    confined,
    confined_file,
    displayable,
    displayed,
    made_name,
    new_file,
    own_name,
    safe_name,
    without_folders,
)

OURS = ("models_dir", "output", "run_dir", "allow_pickle")  # of EraseJob: where to read and write is not for a form
OFFERED = tuple(item.name for item in dataclasses.fields(EraseJob) if item.name not in OURS)
logger = logging.getLogger("salun")


class Service:
    """The jobs, runs and models of one host. runs: every run's folder; pictures: folders of a user's own pictures."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.runs, self.pictures, self.masks = (host.data / name for name in ("runs", "pictures", "masks"))
        for folder in (self.runs, self.pictures, self.masks):
            folder.mkdir(parents=True, exist_ok=True)
        self.queue = Queue(host.data / "jobs", host.python, host.turn, host.changed, host.environment(), self._may_run)
        self._naming = threading.Lock()  # from the choice of a new name until a job has it

    # jobs

    def _may_run(self, job: Job) -> bool:
        """Whether a job that was read from a file writes within our folders, and asks for no more than a form can."""
        options = job.request.get("options", {})
        homes = [home for home in (self.host.data, self.host.checkpoints(), self.host.loras()) if home is not None]
        real = [Path(os.path.realpath(home)) for home in homes]
        written = [*(options.get("output") or []), options.get("run_dir"), job.request.get("output")]
        places = [Path(os.path.realpath(path)) for path in written if path]
        within = all(any(home in place.parents for home in real) for place in places)
        return within and not options.get("allow_pickle") and not options.get("models_dir")

    def erase(self, options: Mapping[str, Any], preview_every: int = 0, name: str = "") -> Job:
        """Put an erasure into the queue. options: fields of `EraseJob` named in OFFERED; `model` a title of the host's.

        name: of the new checkpoint; it goes where the host keeps them, else into the data folder's `models`.
        Raises ConfigError for what cannot be.
        """
        values = self._within(options)
        title = values.pop("model", None)
        model = self._source(title)
        if not isinstance(preview_every, int) or not 0 <= preview_every <= 1_000_000:
            raise ConfigError("a preview every so many steps: give a whole number, 0 for none")
        job: EraseJob = from_mapping(EraseJob, values, "")
        concepts = [text.strip() for text in job.concept if text.strip()]
        if not concepts:
            raise ConfigError("say what the model should forget: choose a preset, or write a word or two")
        self.host.python()
        asked = {"preview_every": preview_every, "host": self.host.name, "name": name}
        own = own_name(name) if name.strip() else None
        with self._naming:
            folder = self._new_run("-".join(concepts))
            outputs = self._outputs(folder, own, (_stem(title), f"no-{'-'.join(concepts)}"), model)
            job_options = dataclasses.replace(job, concept=concepts, model=model, run_dir=str(folder), output=outputs)
            asked["options"] = dataclasses.asdict(job_options)
            return self.queue.submit("erase", f"forget {', '.join(concepts)}", asked, folder.name)

    def _within(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with every name of a file confined to its folder. Raises ConfigError for one that leads out, or for
        an option that cannot be set here."""
        strange = [key for key in options if key not in OFFERED]
        if strange:
            raise ConfigError(f"{', '.join(map(repr, strange))[:200]} cannot be set here")
        check_lengths(options)
        values = {key: value for key, value in options.items() if value is not None}
        endless = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if endless:
            raise ConfigError(f"{endless[0]} is {values[endless[0]]}: give a number")
        values["mask"] = self._mask(values.get("mask", "saliency"))
        for key in ("forget_images", "retain_images", "components"):
            if not isinstance(values.get(key, ""), str):
                raise ConfigError(f"{key} is {repr(values[key])[:80]}, but must be str")
        for key in ("forget_images", "retain_images"):
            if key in values:
                values[key] = str(confined(unquoted(values[key]), self.pictures))
        if "components" in values:
            values["components"] = _components(unquoted(values["components"]))
        return values

    def mask(self, options: Mapping[str, Any]) -> Job:
        """Put the making of a mask alone into the queue, to be chosen by its name later. options: as for `erase`."""
        values = self._within(options)
        title = values.pop("model", None)
        job: EraseJob = from_mapping(EraseJob, {"concept": values.pop("concept", [])}, "")
        concept = [text.strip() for text in job.concept if text.strip()]
        kept = {item.name for item in dataclasses.fields(EraseOptions)}
        checked: EraseOptions = from_mapping(EraseOptions, {k: v for k, v in values.items() if k in kept}, "")
        if not concept:
            raise ConfigError("say for which concept: choose a preset, or write a word or two")
        source = self._source(title)
        self.host.python()
        asked = {"options": dataclasses.asdict(checked), "concept": concept, "model": source}
        with self._naming:
            stem = made_name(_stem(title), "-".join(concept))
            target = new_file(self.masks, stem, ".safetensors", self._promised())
            return self.queue.submit("mask", f"mask of {', '.join(concept)}", {**asked, "output": str(target)})

    def stack(self, model: str, deltas: Sequence[str], strengths: Sequence[float], name: str = "") -> Job:
        """Put the writing of a checkpoint with deltas in it into the queue."""
        if not deltas:
            raise ConfigError("choose a delta")
        if len(deltas) != len(strengths):
            raise ConfigError(f"{len(deltas)} deltas, but {len(strengths)} strengths: give one for each")
        for value in strengths:
            if isinstance(value, bool) or not isinstance(value, int | float) or not -0.5 <= value <= 1.5:
                raise ConfigError(f"the strength {value!r} is none: give a number from -0.5 to 1.5")
        files = [str(self.delta(one)) for one in deltas]
        told = ", ".join(f"{one} at {strength:g}" for one, strength in zip(deltas, strengths, strict=True))
        asked = {"deltas": files, "strengths": [float(s) for s in strengths]}
        return self._rewritten("stack", f"{model} with {told}", model, asked, name, f"with-{'-'.join(deltas)}")

    def undo(self, model: str, delta: str, name: str = "") -> Job:
        """Put the writing of a checkpoint without a delta into the queue."""
        asked = {"delta": str(self.delta(delta))}
        return self._rewritten("undo", f"{model} without {delta}", model, asked, name, "undone")

    def _rewritten(self, kind: str, told: str, model: str, asked: dict[str, Any], name: str, otherwise: str) -> Job:
        """A job that writes a copy of a model, under a name or under the model's own with `otherwise` behind it."""
        source = self._model(model)
        asked |= {"model": source, "name": name}
        self.host.python()
        new_name = own_name(name) if name.strip() else made_name(_stem(model), otherwise)
        with self._naming:
            output = self._written(source, new_name)
            return self.queue.submit(kind, told, {**asked, "output": output})

    def export(
        self, delta: str, form: str = "lora", rank: int | None = None, model: str | None = None, otherwise: str = ""
    ) -> Job:
        """Put the writing of a LoRA ("lora", low rank) or of all differences ("diff") into the queue.

        model: the delta's base; by default the one that the run was made with, and `otherwise` where that is gone.
        """
        if form not in ("lora", "diff"):
            raise ConfigError(f"a delta can be exported as lora or diff, not as {form!r}")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 4096):
            raise ConfigError(f"the rank {rank!r} is none: give a whole number from 1 to 4096")
        file = self.delta(delta)
        base = self._model(model) if model else self._base_of(file, otherwise)
        asked = {"delta": str(file), "model": base, "form": form, "rank": rank}
        self.host.python()
        with self._naming:
            target = new_file(self.host.loras() or file.parent, f"no-{delta}", f".{form}.safetensors", self._promised())
            return self.queue.submit("export", f"{delta} as {form}", {**asked, "output": str(target)})

    def overlaps(self, deltas: Sequence[str]) -> Job:
        """Put the counting of what deltas both change into the queue."""
        if len(deltas) < 2:
            raise ConfigError("choose at least two deltas to see how far they overlap")
        self.host.python()
        return self.queue.submit(
            "overlaps", f"overlap of {', '.join(deltas)}", {"deltas": [str(self.delta(one)) for one in deltas]}
        )

    def inspect(self, run: str, against: str | None = None) -> Job:
        """Put a look at a run's mask into the queue, or at how far the masks of two runs agree."""
        path = str(self.run(run))
        other = str(self.run(against)) if against else None
        self.host.python()
        return self.queue.submit(
            "inspect", f"mask of {run}" + (f" and {against}" if against else ""), {"path": path, "against": other}
        )

    def forget(self, job_id: str) -> None:
        """Take an ended job off the list. What is kept of its run so that it can be resumed goes with it: nothing else
        would ever remove that. Raises ConfigError for a job that is not over, and while another works in its folder.
        """
        job = self.queue.get(job_id)
        state = self._state(job)
        if state is None:
            self.queue.forget(job_id)
            return
        with exclusive_lock(state.parent):
            self.queue.forget(job_id)
            if job.resumable:
                shutil.rmtree(state, ignore_errors=True)
            if state.exists():
                logger.warning("%s could not be removed", state)

    def kept(self, job: Job) -> int:
        """Bytes on disk that a stopped job keeps so that it can be resumed."""
        state = self._state(job)
        try:
            return sum(file.stat().st_size for file in state.iterdir()) if state is not None else 0
        except OSError:  # its process is still coming to its end
            return 0

    def _state(self, job: Job) -> Path | None:
        """The folder of a stopped job's training state, if there is one."""
        if not job.resumable or job.run is None:
            return None
        try:
            place = self.run(job.run) / STATE
        except ConfigError:  # its folder is gone
            return None
        return place if place.is_dir() and not place.is_symlink() else None

    # once a job is done

    def offers(self, job: Job) -> list[str]:
        """What can be done with the result of a job: "use", "undo", "lora", "diff", "delta"."""
        if job.state != "done":
            return []
        loads = ["use"] if self.host.checkpoints() is not None else []  # where there is none, nothing generates
        if job.kind in ("stack", "undo"):
            return loads
        if job.kind == "erase" and job.run and (self.runs / job.run / DELTA).is_file():
            return [*loads, "undo", "lora", "diff", "delta"]
        return []

    def use(self, run: str) -> str:
        """Have the host generate with the erased checkpoint of a run from now on. Returns a line for people."""
        return self._use(self.checkpoint(run))

    def use_result(self, job_id: str) -> str:
        """The same with the checkpoint that a job wrote."""
        job = self.queue.get(job_id)
        if "use" not in self.offers(job):
            raise ConfigError(f"{job.title} gave no checkpoint that could be used")
        return self.use(str(job.run)) if job.kind == "erase" else self._use(Path(job.request["output"]))

    def undo_result(self, job_id: str) -> str:
        """Back to what was before an erasure: the host goes on with the base. Where it has the base no more, or there
        is no host, the base is written again: the erased checkpoint without the delta, to the bit.
        """
        job = self.queue.get(job_id)
        if "undo" not in self.offers(job):
            raise ConfigError(f"{job.title} changed nothing that could be undone")
        run = str(job.run)
        base = Path(str(options_in(self.run(run)).get("model")))
        if self.host.checkpoints() is not None and str(base) in self.models().values():
            return f"{self._use(base)} The erased one stays in the list."
        return f"“{self.undo(run, run).title}” is in the queue."

    def resume(self, run: str) -> Job:
        """Go on with a run that stopped. Raises ConfigError where no job of the list can."""
        self.run(run)
        job = next((job for job in self.queue.all() if job.run == run and job.resumable), None)
        if job is None:
            raise ConfigError(f"there is nothing to go on with in {run}: it is over, or its job is off the list")
        return self.queue.resume(job.id)

    def set_up(self) -> str:
        """Make an environment for the jobs, in the background. Returns a line for people."""
        self._at_rest()
        return environment.set_up(self.host)

    def _use(self, path: Path) -> str:
        self._at_rest()
        return self.host.use(path)

    def _at_rest(self) -> None:
        """Raises ConfigError while a job is not over. One that only waits for the host's turn counts: what is asked for
        now would wait behind it, for as long as it takes.
        """
        job = next((job for job in self.queue.all() if job.open), None)
        if job is not None:
            raise ConfigError(f"“{job.title}” is not over yet: wait until it is, or cancel it")

    # what there is

    def models(self) -> dict[str, str]:
        """Title → what salun takes for it."""
        return {title: place for title, place in self.host.models().items() if displayable(title)}

    def first_model(self) -> str | None:
        """What a list shows before anything is chosen: what the host generates with, else the first."""
        return self.host.loaded() or next(iter(self.models()), None)

    def concepts(self, model: str | None) -> dict[str, str]:
        """Word → its anchor: of the model's own vocabulary where it has one, else the presets."""
        from salun.checkpoints.locate import ASSETS, aliases
        from salun.diffusion.model.loading import describe
        from salun.diffusion.prompts.concepts import presets

        # only models that come along are looked into here: others may be large, or on the hub
        default = aliases()["default"] if self.host.checkpoints() is None else None
        entry = aliases()["models"].get(model or default, {})
        if "path" in entry and (ASSETS / entry["path"]).is_dir():
            vocabulary = describe(str(ASSETS / entry["path"])).settings.vocabulary
            if vocabulary is not None:
                words = [value for values in vocabulary.attributes.values() for value in values]
                return {word: vocabulary.anchors.get(word, "") for word in words}
        return {name: str(entry["anchors"][0]) for name, entry in presets().items()}

    def history(self) -> list[dict[str, Any]]:
        """Every run's summary, the latest first. One that cannot be read has the status "unreadable", and why."""
        open_runs = {job.run for job in self.queue.all() if job.open}
        names = [file.parent.name for file in self.runs.glob("*/run.json")]
        return [self._summary(name, open_runs) for name in sorted(names, reverse=True)]

    def _summary(self, name: str, open_runs: set[str | None]) -> dict[str, Any]:
        try:
            if not displayable(name):
                raise ConfigError("the name of its folder is not UTF-8: rename the folder")
            record = read_run(confined(name, self.runs))
        except (ConfigError, DataError) as error:
            return {"run": displayed(name), **UNREADABLE, "error": self.without_places(str(error))}
        told = summary(record, self.runs / name)
        if record["status"] == "running" and name not in open_runs:
            told["status"] = "stopped"
        if told["error"]:
            told["error"] = self.without_places(str(told["error"]), record["options"].get("model"))
        return {"run": name, **told}

    def without_places(self, text: str, model: Any = None) -> str:
        """A text for everybody: files are called by their names, not by where they lie on this machine.

        model: what the text may be about; it may lie anywhere.
        """
        folders = {self.host.data, self.host.checkpoints(), self.host.loras()}
        if isinstance(model, str) and Path(model).is_absolute():
            folders.add(Path(model).parent)
        return without_folders(text, [folder for folder in folders if folder is not None])

    def run(self, name: str) -> Path:
        """A run's folder. Raises ConfigError for a name that none has."""
        place = confined(name, self.runs)
        if "/" in name or not (place / "run.json").is_file():
            raise ConfigError(f"there is no run {name[:80]!r}")
        return place

    def file(self, run: str, name: str) -> tuple[Path, str]:
        """A file of a run that may be shown, and its type."""
        if name not in SHOWN:
            raise ConfigError(f"{name[:80]!r} is no file that a run shows: {', '.join(SHOWN)}")
        return confined_file(name, self.run(run)), SHOWN[name]

    def preview(self, job: str, name: str) -> Path:
        """A preview picture of a job."""
        if name not in self.queue.get(job).previews:
            raise ConfigError(f"there is no preview {name[:80]!r}")
        return confined_file(name, self.queue.folder / job)

    def options_of(self, run: str) -> dict[str, Any]:
        """The options of a run, as a form shows them: to load them again."""
        options = {key: value for key, value in options_in(self.run(run)).items() if key in OFFERED}
        from_mapping(EraseJob, options, f"the options of {run}")  # who wrote them is not known
        titles = {place: title for title, place in self.models().items()}
        options["model"] = titles.get(str(options.get("model")), options.get("model"))
        for key in ("forget_images", "retain_images"):
            if options.get(key):
                options[key] = Path(options[key]).name
        if options.get("mask") not in MASKS:
            file = Path(str(options.get("mask")))  # named as `made_masks` does
            of_a_run = file.parent.parent.resolve() == self.runs.resolve()
            options["mask"] = file.parent.name if of_a_run else file.stem
        return options

    def deltas(self) -> list[str]:
        """Names of runs that have a delta, the latest first."""
        return sorted(filter(displayable, (p.parent.name for p in self.runs.glob(f"*/{DELTA}"))), reverse=True)

    def picture_folders(self) -> list[str]:
        """Names of the folders of a user's own pictures, but for links that lead out of the folder meant for them."""
        return sorted(place.name for place in self.pictures.iterdir() if place.is_dir() and self._holds(place))

    def _holds(self, folder: Path) -> bool:
        try:
            return bool(confined(folder.name, self.pictures))  # half a character is none that a name may have
        except ConfigError:
            return False

    def made_masks(self) -> list[str]:
        """Names of masks that can be chosen beside the controls."""
        own = sorted(p.stem for p in self.masks.glob("*.safetensors"))
        of_runs = sorted((p.parent.name for p in self.runs.glob("*/mask.safetensors")), reverse=True)
        return list(filter(displayable, own + of_runs))

    def delta(self, run: str) -> Path:
        """The delta's file of a run."""
        return confined_file(DELTA, self.run(run))

    def checkpoint(self, run: str) -> Path:
        """The erased checkpoint that a run wrote. Raises ConfigError if it wrote none, or it is gone."""
        folder = self.run(run)
        homes = [home.resolve() for home in (folder, self._home())]
        for path in [*options_in(folder).get("output", []), folder / "model.safetensors", folder / "model"]:
            place = Path(os.path.realpath(path))  # who wrote run.json is not known: it may name what is in our folders
            whole = not place.name.endswith((".salun.safetensors", ".lora.safetensors", ".diff.safetensors"))
            if whole and any(home in place.parents for home in homes) and os.path.exists(place):
                return place
        raise ConfigError(f"the erased model of {run} is not there any more")

    # inside

    def _model(self, title: Any) -> str:
        if not isinstance(title, str):  # JSON holds lists and objects as well
            raise ConfigError(f"model is {repr(title)[:80]}, but must be a text: choose one of the list")
        models = self.models()
        if title in models:
            return models[title]
        if not _pathlike(title):
            try:
                return str(self.checkpoint(title))  # a run's erased model
            except ConfigError:
                pass
        raise ConfigError(f"no model {title[:80]!r}: choose one of the list")

    def _source(self, title: Any) -> str | None:
        """What salun takes for a title; None for no title, where that means the embedded model: never on a host with
        checkpoints of its own, as the result would be put among them.
        """
        if title is None and self.host.checkpoints() is not None:
            none = "" if self.models() else f": {self.host.name} lists none yet that ends in .safetensors"
            raise ConfigError(f"choose a checkpoint{none}")
        return self._model(title) if title is not None else None

    def _mask(self, name: Any) -> str:
        if name in MASKS:
            return str(name)
        if not isinstance(name, str):
            raise ConfigError(f"no mask {str(name)[:80]!r}")
        if (self.masks / f"{safe_name(name)}.safetensors").is_file():
            return str(confined(f"{safe_name(name)}.safetensors", self.masks))
        return str(confined_file("mask.safetensors", self.run(name)))

    def _new_run(self, name: str) -> Path:
        folder = new_run_folder(name, self.runs)
        taken = {job.run for job in self.queue.all()}
        n, stem = 1, folder.name
        while folder.name in taken or folder.exists():
            n += 1
            folder = self.runs / f"{stem}-{n}"
        return folder

    def _outputs(self, folder: Path, own: str | None, made: tuple[str, str], source: str | None) -> list[str]:
        """What an erasure writes. own: the name that the checkpoint is to have; made: of what it is made otherwise."""
        checkpoints = self.host.checkpoints()
        if checkpoints is None:  # the run's folder, unless it is to have a name
            return [self._written(source or "", own), str(folder / DELTA)] if own else []
        stamp = "-" + "-".join(folder.name.split("-")[:2])
        target = new_file(checkpoints, own or made_name(*made, stamp), ".safetensors", self._promised())
        return [str(target), str(folder / DELTA)]

    def _written(self, source: str, name: str) -> str:
        """Where a copy of a model goes, in the model's own layout."""
        folder = self._home()
        folder.mkdir(parents=True, exist_ok=True)
        single = Path(source).suffix.lower() in (".safetensors", ".ckpt")
        ending = ".safetensors" if single else ""
        return f"{new_file(folder, name, ending, self._promised())}{'' if single else '/'}"

    def _home(self) -> Path:
        """Where checkpoints with a name of their own go."""
        return self.host.checkpoints() or self.host.data / "models"

    def _promised(self) -> list[str]:
        """What jobs that are not over, or may go on, will write."""
        found = []
        for job in self.queue.all():
            if job.open or job.resumable:
                found += [*job.request.get("options", {}).get("output", []), job.request.get("output", "")]
        return [path.rstrip("/") for path in found]

    def _base_of(self, delta: Path, otherwise: str) -> str:
        """What a run was made with, if it is one of the host's models or another run's; else the model `otherwise`."""
        from salun.checkpoints.locate import aliases

        model = options_in(delta.parent).get("model") or aliases()["default"]
        if isinstance(model, str):
            if model in self.models().values():
                return model
            real = Path(os.path.realpath(model))
            for place in real.parents:
                if place.parent == self.runs.resolve() and self.checkpoint(place.name) == real:
                    return model
        if otherwise:
            return self._model(otherwise)
        raise ConfigError(
            f"the base of {delta.parent.name} is not among the checkpoints any more: under Deltas, choose it as "
            "Checkpoint and the run as Delta 1, and save it there"
        )


def _components(name: str) -> str:
    """Raises ConfigError unless it is an alias or a hub id: folders of this machine are not for a form to name."""
    from salun.checkpoints.locate import aliases

    if name in aliases()["models"] or re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", name):
        return name
    raise ConfigError(f"components: {name[:80]!r} is neither an alias nor a hub id (owner/name)")


def _pathlike(text: str) -> bool:
    return any(c in text for c in "/\\:") or text.startswith(".")


def _stem(title: Any) -> str:
    return safe_name(
        re.sub(r"\.(safetensors|ckpt)|(?<!\s)\s*\[[0-9a-f]+\]$", "", str(title or "shapes").split("/")[-1]), "model"
    )
