"""The tab's controls hold the core's options and defaults, and read back what the core takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from extension.controls import ADVANCED, FIELDS, FIRST, default_of, help_of, shown_of, value_of
from extension.host import Alone
from extension.service import OURS, Service
from salun.errors import ConfigError
from salun.options import MASKS, EraseJob, from_mapping

ALL = [item.name for item in dataclasses.fields(EraseJob)]
OTHERS = {  # a value beside the default, as a run.json holds it
    "bool": True, "str": "text", "int": 7, "float": 0.25, "list": ["one", "two"],
}  # fmt: skip


def test_every_option_of_an_erasure_has_one_control_but_for_places() -> None:
    shown = [*FIRST, *(name for group in ADVANCED.values() for name in group)]
    assert sorted([*shown, *OURS]) == sorted(ALL)
    assert all(help_of(name) for name in shown)


def test_untouched_controls_give_the_cores_defaults() -> None:
    values = {name: value_of(name, default_of(name)) for name in FIELDS}
    given = {name: value for name, value in values.items() if value is not None}
    assert from_mapping(EraseJob, given, "the controls") == EraseJob()


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_shown_is_read_back(name: str) -> None:
    item = FIELDS[name]
    choices = item.metadata["choices"] or (MASKS if name == "mask" else ())
    kind = str(item.type).removesuffix(" | None")
    other = choices[-1] if choices else OTHERS[kind.split("[")[0]]
    for value in (other, item.default if item.default is not dataclasses.MISSING else []):
        assert value_of(name, shown_of(name, value)) == value


def test_what_is_no_number_is_said_by_its_name() -> None:
    with pytest.raises(ConfigError, match="learning rate is 'fast': give a number"):
        value_of("lr", "fast")
    assert value_of("lr", " 1e-5 ") == 1e-5
    assert value_of("steps", "") is None
    assert value_of("retain_prompts", "a dog\n\n a cat ") == ["a dog", "a cat"]


@pytest.fixture
def service(tmp_path: Path) -> Any:
    made = Service(Alone(tmp_path))
    yield made
    made.queue.close()


def test_a_jobs_request_is_what_the_command_line_would_run(service: Service) -> None:
    """Same dataclass, same defaults; only the run folder is ours."""
    job = service.erase({"concept": ["circle"], "model": "shapes", "steps": 3})
    service.queue.cancel(job.id)
    asked = job.request["options"]
    expected = EraseJob(concept=["circle"], model="shapes", steps=3, run_dir=asked["run_dir"])
    assert asked == dataclasses.asdict(expected)
    assert Path(asked["run_dir"]).parent == service.runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concept": ["a"], "run_dir": "/tmp/x"}, "'run_dir' cannot be set here"),
        ({"concept": ["a"], "output": ["/tmp/x.safetensors"]}, "'output' cannot be set here"),
        ({"concept": ["a"], "models_dir": ["/"]}, "'models_dir' cannot be set here"),
        ({"concept": ["a"], "allow_pickle": True}, "'allow_pickle' cannot be set here"),
        ({"concept": ["a"], "model": "/etc/passwd"}, "no model '/etc/passwd'"),
        ({"concept": ["a"], "model": "../../x.safetensors"}, "no model"),
        ({"concept": ["a"], "mask": "/tmp/mask.safetensors"}, "cannot be a name here"),
        ({"concept": ["a"], "mask": "no-such-run"}, "there is no 'no-such-run' here"),
        ({"concept": ["a"], "forget_images": "/etc"}, "cannot be a name here"),
        ({"concept": ["a"], "forget_images": "../jobs"}, "cannot be a name here"),
        ({"concept": ["a"], "components": "/etc"}, "neither an alias nor a hub id"),
        ({"concept": ["a"], "components": "../x"}, "neither an alias nor a hub id"),
        ({"concept": ["a"], "density": 2}, "--density is 2, but must be at most 1"),
        ({"concept": [" "]}, "say what the model should forget"),
        ({"concept": ["a"], "stepz": 3}, "'stepz' cannot be set here"),
    ],
    ids=str,
)
def test_what_a_form_must_not_say_is_refused_before_anything_begins(
    service: Service, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        service.erase(options)
    assert service.queue.all() == []


def test_jobs_of_one_second_write_to_different_places_and_a_repeated_one_is_the_same(service: Service) -> None:
    class Keeping(Alone):
        def checkpoints(self) -> Path | None:
            return self.data

    service.host = Keeping(service.host.data)
    asked = {"concept": ["circle"], "model": "shapes"}
    first, second = service.erase(asked), service.erase({**asked, "seed": 1})
    assert service.erase(asked) is first
    outputs = [path for job in (first, second) for path in job.request["options"]["output"]]
    assert len(set(outputs)) == 4
    assert Path(outputs[0]).parent == service.host.data
    named = [service.erase({**asked, "seed": seed}, name="mine").request["options"]["output"][0] for seed in (2, 3)]
    assert [Path(path).name for path in named] == ["mine.safetensors", "mine-2.safetensors"]
    for job in service.queue.all():
        service.queue.cancel(job.id)
