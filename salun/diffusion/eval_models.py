"""The two models that an evaluation compares: of a run folder, or of names; or one without its original."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from salun.checkpoints.locate import find
from salun.checkpoints.outputs import output_layout
from salun.compute.device import DTYPES
from salun.config import read_record
from salun.delta.delta import Delta
from salun.diffusion.eval_options import ComparedOptions
from salun.diffusion.model.loading import load_with
from salun.diffusion.model.protocol import DiffusionModel
from salun.diffusion.model.settings import SAMPLING, display_name
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseJob, EraseOptions
from salun.diffusion.plan import Plan
from salun.diffusion.prompts.concepts import Concept
from salun.diffusion.unread import unread, without
from salun.errors import ConfigError, DataError, ModelError, literal
from salun.runs.reading import file_of, read_finished
from salun.runs.record import RunRecord


@dataclass(frozen=True, eq=False)
class Compared:
    """A model, and the original that it came from, if that is known.

    Args:
        name: What is evaluated, for people.
        erased: The model of a file of its own, or `original`, which `change` turns into the erased one.
        change: Network tensors of the erased model, where it is not a model of its own.
        weights: A hash of these.
        names: What to evaluate, and `options` how its prompts are made.
    """

    name: str
    erased: DiffusionModel
    original: DiffusionModel | None
    names: Sequence[Concept]
    options: EraseOptions
    change: Mapping[str, Tensor] | None = None
    weights: str | None = None

    @property
    def known(self) -> DiffusionModel:
        """The original, or else the model itself: the one that says how images are sampled."""
        return self.original or self.erased

    @property
    def facts(self) -> dict[str, dict[str, str] | None]:
        """Both models as in `eval.json`: name, and hashes of the network's weights and of all other parts."""
        original = self.original
        return {
            "model": _facts(self.name, self.erased, self.weights),
            "original": _facts(display_name(original.name), original) if original is not None else None,
        }

    @contextmanager
    def as_erased(self) -> Iterator[DiffusionModel]:
        """Context manager: the model with its erased weights."""
        if self.change is None:
            yield self.erased
            return
        self.erased.load(self.change)
        try:
            yield self.erased
        finally:
            self.erased.load(self.erased.original())


def _facts(name: str, model: DiffusionModel, weights: str | None = None) -> dict[str, str]:
    return {"name": name, "weights": weights or model.base_hash, "parts": model.parts_hash}


def compared_models(target: str, options: ComparedOptions) -> Compared:
    """The models of a run folder, or of the names in the options.

    Raises:
        ConfigError: The concept is missing, or something is named that the run folder has already.
        DataError: The run's delta cannot be used.
        ModelError: A model cannot be loaded, or is not of its original's kind.
    """
    folder = Path(target).expanduser()
    if (folder / "run.json").is_file():
        for given in ("against", "concept", "anchor"):
            if getattr(options, given):
                raise ConfigError("is named by the run folder already", option=given, advice=f"Omit {{{given}}}")
        return _of_run(folder, options)
    if not options.concept:
        raise ConfigError(
            f"{target} is not a run folder, so a concept is needed",
            advice="Name what the model should have forgotten: {concept} circle",
        )
    names = [Concept(name) for name in options.concept]
    if not options.against:
        return Compared(display_name(target), load_with(target, options), None, names, _erase_options(options))
    original, erased = _loaded([options.against, target], options)
    if original.family.name != erased.family.name or original.latent_shape != erased.latent_shape:
        raise ModelError(
            f"{target} ({erased.family.name}) and {options.against} ({original.family.name}) differ in kind"
        )
    return Compared(display_name(target), erased, original, names, _erase_options(options))


def _loaded(names: Sequence[str], options: ComparedOptions) -> list[Model]:
    """The models of these names; `components` are for those that are single files."""
    files = [find(name, options.models_dir)[0].is_file() for name in names]
    without = replace(options, components=None)
    return [load_with(n, options if file or not any(files) else without) for n, file in zip(names, files, strict=True)]


def _of_run(folder: Path, options: ComparedOptions) -> Compared:
    """The models of a finished run, from its folder alone, which is untrusted input."""
    record = read_finished(folder)
    delta = file_of(record, folder, "delta")
    if delta is None:
        raise DataError(f"{folder} holds no delta", advice=_without_delta(record, folder))
    job = EraseJob(**read_record(record, folder / "run.json"))
    used = _erase_options(options, job.options)
    used = replace(used, device=options.device, allow_pickle=options.allow_pickle)  # not as recorded
    used = without(used, unread(used))  # which a record may hold of another recipe
    model = load_with(str(job.model), used)
    loaded = Delta.load(delta)
    change = loaded.apply(model.original())
    names = [Concept(name) for name in job.concept]
    return Compared(folder.resolve().name, model, model, names, used, change, loaded.result_hash)


def _without_delta(record: Mapping[str, Any], folder: Path) -> str:
    """What to do with a run that has no delta: name the model that it wrote, or else erase again."""
    given, model = record["options"], file_of(record, folder, "checkpoint")
    if model is None and (network := file_of(record, folder, "folder")) is not None:
        model = network.parents[1]
    outside = [path for path in given.get("output", []) if output_layout(path) in ("file", "folder")]
    written = [str(model)] if model is not None else outside
    if not written:
        return "run the erasure again without {output}, or with one that ends in .salun.safetensors"
    texts = [written[0], given["model"] or "ORIGINAL", *given["concept"]]
    erased, original, *concepts = (literal(quote(text)) if text.isprintable() else "…" for text in texts)
    named = " ".join(f"{{concept}} {concept}" for concept in concepts)
    return f"Name the model that it wrote instead: {erased} {{against}} {original} {named}"


def _erase_options(options: ComparedOptions, base: EraseOptions | None = None) -> EraseOptions:
    """The options by which prompts are made and images sampled: the given ones, others as in `base`.

    The detector is that of `base`, which the given ones replace in the evaluation alone.
    """
    defaults = type(options)()
    shared = {item.name for item in dataclasses.fields(EraseOptions)} & {i.name for i in dataclasses.fields(options)}
    given = {name: getattr(options, name) for name in shared - {"detector"}}
    given = {name: value for name, value in given.items() if value != getattr(defaults, name)}
    return replace(base or EraseOptions(), **given)


def record_of(
    target: str,
    options: ComparedOptions,
    compared: Compared,
    plan: Plan,
    command: str,
    resolved: Mapping[str, Any],
) -> RunRecord:
    """The record of how models are looked at, with every option resolved that the model or the run decides.

    Args:
        resolved: Further options that were resolved, by name.
    """
    model = compared.known
    known = {
        "concept": [concept.name for concept in plan.concepts],
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == model.dtype),
        **{name: getattr(plan.options, name) for name in ("anchor", "prediction_type", "clip_skip", "components")},
        **{name: getattr(plan.sampling, field) for name, field in SAMPLING.items()},
        **resolved,
    }
    sampler = model.sampler_facts()  # of which only names are for people, no config
    facts = {name: value for name in ("scheduler", "sampler") if isinstance(value := sampler.get(name), str)}
    used = {"target": target, **dataclasses.asdict(options), **known}
    return RunRecord(None, command, used, options.seed, str(model.device), facts)
