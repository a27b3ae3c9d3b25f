"""The story of a run on the digits: what it writes, what it compares, what it refuses; and its commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salun.classification.data import load_data
from salun.classification.experiment import evaluate, train, unlearn
from salun.classification.models import load_model, new_model, save_model
from salun.classification.options import TrainOptions
from salun.classification.plan import resolve_options
from salun.classification.preview import preview_training, preview_unlearning
from salun.classification.splits import Split
from salun.classification.task import Task, train_from_scratch
from salun.classification.unlearn_options import GROUPS, CompareOptions, UnlearnOptions
from salun.config import read_config
from salun.errors import Cancelled, ConfigError, DataError, ModelError
from salun.masking.mask import Mask
from salun.progress import Event, Stage
from salun.runs.cache import Cache

from .conftest import run_command as salun

QUICK: dict[str, Any] = {"train_epochs": 2, "epochs": 2, "device": "cpu"}


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short SalUn run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "salun"
    unlearn(run_dir=folder, **QUICK)
    return folder


def test_a_run_writes_its_figures_beside_retrains(run: Path) -> None:
    record = record_of(run)
    metrics = record["metrics"]
    assert record["status"] == "done"
    for side in (metrics, metrics["original"], metrics["retrain"]):
        for name in ("UA", "RA", "TA", "MIA"):
            assert side[name]["low"] <= side[name]["value"] <= side[name]["high"]
    assert metrics["RTE"]["value"] > 0 < metrics["retrain"]["RTE"]["value"]
    assert metrics["gap"]["UA"] == abs(metrics["UA"]["value"] - metrics["retrain"]["UA"]["value"])
    assert metrics["gap_mean"] == pytest.approx(sum(metrics["gap"].values()) / 4)
    assert 0 < metrics["ToW"] <= 1
    assert metrics["reason"] is None and metrics["verdict"]["outcome"] != "can't tell"
    assert metrics["gap_original"] > 40  # by default there is something to forget
    banner = metrics["verdict"]["text"].split(";")[0]
    assert f"{metrics['gap_original']:.2f}" in banner and banner in (run / "report.html").read_text(encoding="utf-8")
    assert [row["epoch"] for row in record["losses"]] == [1, 2]


def test_a_runs_options_have_no_number_left_open(run: Path) -> None:
    options = record_of(run)["options"]
    assert set(options) == {item.name for item in fields(UnlearnOptions)}
    open_ones = {name for name, value in options.items() if value is None}
    of_data = {"image_column", "label_column", "image_size", "data_config", "split"}
    assert open_ones == {"original", "ssd_alpha", "lfssd_alpha"} | of_data
    assert (options["model"], options["mask"], options["batchnorm"]) == ("small", "saliency", "frozen")


def test_a_run_moves_the_mask_alone(run: Path) -> None:
    mask, record = Mask.load(run / "mask.safetensors"), record_of(run)
    assert record["mask"]["selected"] == mask.selected == int(0.5 * mask.total)
    assert mask.metadata["split"] == Split.load(run / "split.json").digest
    assert 0.45 < record["moved"] <= 0.5
    original = train(train_epochs=2, device="cpu")  # from the cache
    unlearned, _ = load_model(run / "model.safetensors")
    for name, parameter in unlearned.named_parameters():
        outside = ~mask.dense(name)
        assert torch.equal(parameter[outside], original.model.state_dict()[name][outside]), name
    for name, buffer in unlearned.named_buffers():
        assert torch.equal(buffer, original.model.state_dict()[name]), name


def test_the_same_seed_gives_the_same_bytes_and_another_another_model(run: Path, tmp_path: Path) -> None:
    for folder, cache, seed in (("a", None, 0), ("b", Cache(tmp_path / "none", 0), 0), ("c", None, 1)):
        unlearn(run_dir=tmp_path / folder, cache=cache, seed=seed, **QUICK)
    bytes_of = [(folder / "model.safetensors").read_bytes() for folder in (run, *(tmp_path / n for n in "abc"))]
    assert bytes_of[0] == bytes_of[1] == bytes_of[2] != bytes_of[3]
    figures = [record_of(folder)["metrics"] for folder in (run, tmp_path / "b")]
    assert figures[0]["gap"] == figures[1]["gap"]


def test_the_split_is_the_same_for_original_unlearned_and_retrain(run: Path, tmp_path: Path) -> None:
    split = Split.load(run / "split.json")
    _, unlearned = load_model(run / "model.safetensors")
    made = train(run_dir=tmp_path / "original", train_epochs=2, device="cpu")
    _, original = load_model(tmp_path / "original" / "model.safetensors")
    assert original.base == unlearned.base == split.base == made.split.base
    assert unlearned.split == split.digest
    assert torch.equal(torch.cat([split.forget, split.retain]).sort().values, made.split.train)


def test_an_original_that_was_trained_before_is_taken(run: Path, tmp_path: Path) -> None:
    train(run_dir=tmp_path / "original", train_epochs=2, device="cpu")
    done = unlearn(run_dir=tmp_path / "run", original=str(tmp_path / "original"), epochs=2, device="cpu")
    assert done.record.options["train_epochs"] == 2  # Retrain is trained likewise
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    for changes, kind, message in (
        ({"split_seed": 1}, DataError, "was trained on another split"),
        ({"train_epochs": 3}, ConfigError, "train_epochs is 3, but the original was trained with 2"),
    ):
        with pytest.raises(kind, match=message):
            unlearn(original=str(tmp_path / "original"), device="cpu", **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is an unlearned model, but must be an original"):
        unlearn(original=str(run), device="cpu")


def test_retrain_is_trained_as_the_original_was_whatever_the_options_of_unlearning(tmp_path: Path) -> None:
    """Its seed, momentum, weight decay and all: the method Retrain gives the bits of a training by hand."""
    recipe: dict[str, Any] = {"seed": 7, "momentum": 0.5, "weight_decay": 0.01, "train_epochs": 1, "device": "cpu"}
    train(run_dir=tmp_path / "original", **recipe)
    _, facts = load_model(tmp_path / "original" / "model.safetensors")
    assert {name: facts.training[name] for name in recipe if name != "device"} == {
        name: value for name, value in recipe.items() if name != "device"
    }
    settings: dict[str, Any] = {"original": str(tmp_path / "original"), "device": "cpu", "seed": 1}
    exact = unlearn(method="retrain", **settings)
    data, split = load_data("digits"), exact.split
    options = resolve_options(UnlearnOptions(**recipe), data, split)
    fresh = new_model("small", 1, 10, seed=7).to(memory_format=torch.channels_last)  # as all are trained
    task = Task(fresh, replace(data, preset={**data.preset, "augment": "none"}), split, options, lambda: fresh)
    train_from_scratch(task, Stage.RETRAINING)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, exact.model.state_dict()[name]), name
    beside = unlearn(method="ft", epochs=1, retrain="yes", **settings)
    assert beside.metrics["retrain"]["UA"] == exact.metrics["UA"]
    assert beside.metrics["retrain"]["MIA"] == exact.metrics["MIA"]


def test_an_original_whose_file_does_not_tell_all_of_its_training_has_no_retrain(tmp_path: Path) -> None:
    made = train(run_dir=tmp_path / "original", train_epochs=1, device="cpu")
    model, facts = load_model(tmp_path / "original" / "model.safetensors")
    less = {name: value for name, value in facts.training.items() if name != "momentum"}
    save_model(tmp_path / "less.safetensors", model, replace(facts, training=less))
    settings: dict[str, Any] = {"original": str(tmp_path / "less.safetensors"), "epochs": 1, "device": "cpu"}
    assert made.split.base == facts.base
    assert "the original's training options are not known" in unlearn(**settings).metrics["reason"]
    with pytest.raises(ConfigError, match="cannot be trained again"):
        unlearn(retrain="yes", **settings)


def test_the_cache_knows_a_trained_original_by_its_first_weights_and_its_threads(tmp_path: Path) -> None:
    """A pretrained body may change under its name, and another number of threads takes sums in another order."""
    from transformers import ViTConfig, ViTForImageClassification

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(tmp_path / "vit")

    cache, found, threads = Cache(tmp_path / "cache"), [], torch.get_num_threads()
    for seed, many in ((0, 1), (0, 1), (1, 1), (1, 2)):
        save(seed)
        try:
            torch.set_num_threads(many)
            found.append(train(model=str(tmp_path / "vit"), train_epochs=1, device="cpu", cache=cache))
        finally:
            torch.set_num_threads(threads)
    kept = [{k: v.clone() for k, v in done.model.state_dict().items()} for done in found[:3]]
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())
    assert any(not torch.equal(v, kept[2][k]) for k, v in kept[0].items())
    assert len(cache.entries()) == 3


def test_what_a_given_original_names_is_opened_for_retrain_only_when_the_user_names_it_too(tmp_path: Path) -> None:
    """The file may be a stranger's: a folder or a model of the hub that it says it began as is not for it to choose."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    train(run_dir=tmp_path / "original", model=str(tmp_path / "vit"), train_epochs=1, device="cpu")
    settings: dict[str, Any] = {"original": str(tmp_path / "original"), "method": "ft", "epochs": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match="If you trust it, set model to"):
        unlearn(**settings)
    assert unlearn(retrain="no", **settings).metrics["gap"] is None
    assert unlearn(model=str(tmp_path / "vit"), **settings).metrics["gap_mean"] is not None


def test_a_training_has_a_page(tmp_path: Path) -> None:
    train(run_dir=tmp_path / "original", train_epochs=2, device="cpu")
    html = (tmp_path / "original" / "report.html").read_text(encoding="utf-8")
    for text in ("Original model for digits", "test images", "Class by class", "mean loss"):
        assert text in html
    found = evaluate(tmp_path / "original", device="cpu")
    assert sum(map(sum, found["confusion"]["test"])) == found["test"]["n"] == 359


def test_a_run_that_was_stopped_continues_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "unlearning" and event.step == 5:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        unlearn(run_dir=tmp_path / "run", progress=stop, **QUICK)
    assert record_of(tmp_path / "run")["status"] == "cancelled"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        unlearn(run_dir=tmp_path / "run", **QUICK)
    unlearn(run_dir=tmp_path / "run", resume=True, **QUICK)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert record_of(tmp_path / "run")["resumed"] == 1


def test_a_training_that_was_stopped_continues_within_its_epoch_to_the_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_epochs": 3, "augment": "crop-flip", "device": "cpu"}
    kept, seen = [], []

    def stop(event: Event) -> None:
        seen.append(event.step)
        if event.stage == "training" and event.step == 30:  # of 21 a epoch
            raise Cancelled("stopped")

    for name in ("whole", "halved"):
        cache = Cache(tmp_path / name)
        if name == "halved":
            with pytest.raises(Cancelled):
                train(progress=stop, cache=cache, **options)
            seen.clear()
        kept.append(train(progress=lambda event: seen.append(event.step), cache=cache, **options).model.state_dict())
        assert len(cache.entries()) == 1  # the state is gone
    assert 31 in seen and 30 not in seen
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())


def test_a_run_judged_again_gives_the_same_figures(run: Path, tmp_path: Path) -> None:
    found, recorded = evaluate(run, device="cpu"), record_of(run)["metrics"]
    assert found["UA"] == recorded["UA"]
    assert found["mia_features"] == recorded["mia_features"]
    assert json.loads((run / "eval.json").read_text(encoding="utf-8")) == found
    with pytest.raises(ConfigError, match="is not a finished run"):
        evaluate(tmp_path)


def test_a_run_is_judged_again_on_its_own_split_alone(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    stored = json.loads((copy / "split.json").read_text(encoding="utf-8"))
    for changes, message in (
        ({"forget": stored["retain"], "retain": stored["forget"]}, "is not the split that"),
        ({"test": stored["train"]}, "is not the split that"),
        ({"test": [*stored["test"], 1797]}, "row 1797 is out of range, the data has rows 0 to 1796"),
        ({"test": [-1]}, "row -1 is out of range"),
        ({"test": [[1]]}, "a part is not a list of rows"),
    ):
        (copy / "split.json").write_text(json.dumps({**stored, **changes}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            evaluate(copy, device="cpu")


def test_a_class_can_be_forgotten(tmp_path: Path) -> None:
    done = unlearn(run_dir=tmp_path / "run", forget="class:3", method="rl", lr=0.02, **{**QUICK, "epochs": 5})
    assert done.metrics["retrain"]["UA"]["value"] == 100
    assert done.metrics["UA"]["value"] > 90
    assert done.metrics["TA"]["n"] < 359


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"method": "retrain"}, "this is Retrain itself"), ({"retrain": "no"}, "unless the option retrain is yes")],
)
def test_an_unknown_gap_is_null_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    done = unlearn(train_epochs=1, device="cpu", **changes)
    assert (done.metrics["gap"], done.metrics["gap_mean"], done.metrics["ToW"]) == (None, None, None)
    assert reason in done.metrics["reason"]


def test_a_folder_of_images_and_a_transformers_model_go_all_the_way(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    digits = load_data("digits")
    for row in range(120):
        label = int(digits.labels[row])
        (tmp_path / "set" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[row, 0].numpy()).save(tmp_path / "set" / str(label) / f"{row}.png")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    common: dict[str, Any] = {"data": str(tmp_path / "set"), "epochs": 1, "device": "cpu"}
    trained = unlearn(run_dir=tmp_path / "a", model=str(tmp_path / "vit"), train_epochs=1, retrain="yes", **common)
    assert trained.metrics["gap_mean"] is not None
    given = unlearn(run_dir=tmp_path / "b", original=str(tmp_path / "vit"), **common)
    assert given.metrics["gap"] is None
    assert "the original's training options are not known" in given.metrics["reason"]
    assert "is unknown" in given.record.notes[0]
    with pytest.raises(ConfigError, match="cannot be trained again"):
        unlearn(original=str(tmp_path / "vit"), **{**common, "retrain": "yes"})
    with pytest.raises(ModelError, match=r"has 10 classes, but \w+ has 9"):
        (tmp_path / "set" / "3").rename(tmp_path / "elsewhere")
        unlearn(original=str(tmp_path / "vit"), **common)


WRONG = [
    ({"method": "best"}, "method is 'best', but must be one of"),
    ({"density": 0.0}, "density is 0.0, but must be above 0"),
    ({"lr": 0.0}, "lr is 0.0, but must be above 0"),
    ({"mask": "good"}, "mask is 'good'"),
    ({"labels": "own"}, "labels is 'own'"),
    ({"batchnorm": "moving"}, "batchnorm is 'moving'"),
    ({"method": "ssd", "mask": "saliency"}, "mask is saliency, but the method SSD has none"),
    ({"method": "salun-soft", "mask": "full"}, "the method SalUn-soft has none"),
    ({"method": "ff", "lr": 0.1}, "lr is 0.1, but the method FF has none"),
    ({"method": "scrub", "epochs": 1}, "epochs is 1, but SCRUB begins to forget in its second epoch"),
    (
        {"method": "ssd", "ssd_alpha": 50.0},
        "ssd_alpha is 50, but for 131 of 1295 samples no weight can",
    ),
    (
        {"method": "unsir", "forget": "random:0.1"},
        "is random:0.1, but UNSIR forgets whole classes only, and other images of these are retained. Use class:NAME",
    ),
    ({"search": True, "validation_share": 0.0}, "search needs validation images, but the split has none"),
    ({"search": True, "method": "retrain"}, "search is set, but the method Retrain has no option"),
    ({"forget": "random:0"}, "above 0 and below 1"),
    ({"forget": "class:ten"}, "does not exist"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is trained, and by the dry run as well."""

    def never(event: Event, /) -> None:
        raise AssertionError(f"{event.stage} began")

    for way in (unlearn, preview_unlearning):
        with pytest.raises(ConfigError, match=message):
            way(UnlearnOptions(**{"device": "cpu", **options}), progress=never)


def test_every_option_has_its_place_in_the_help() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(item.name for item in fields(CompareOptions))
    assert {item.name for item in fields(UnlearnOptions)} < set(grouped)
    assert {item.name for item in fields(TrainOptions)} < set(grouped)


def test_a_run_json_repeats_its_run(run: Path) -> None:
    again = UnlearnOptions(**read_config(run / "run.json", UnlearnOptions))
    split = Split.load(run / "split.json")
    assert asdict(resolve_options(again, load_data("digits"), split)) == record_of(run)["options"]


# -- the commands --------------------------------------------------------------------------------------------------


def test_unlearning_on_the_digits_needs_no_more_than_a_method(tmp_path: Path) -> None:
    quick = ["--train-epochs", "1", "--epochs", "1"]
    done = salun("classify-unlearn", "--method", "salun", "--forget", "random:0.1", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Can't tell: Its mean gap") and "too few images to tell (n = 129)" in lines[0]
    assert lines[1].startswith("Next: ")
    assert lines[2].split() == ["UA", "%", "RA", "%", "TA", "%", "MIA", "%", "RTE", "s"]
    assert [line.split()[0] for line in lines[3:7]] == ["original", "unlearned", "Retrain", "gap"]
    folder = tmp_path / lines[-1].removeprefix("run folder: ")
    assert {"run.json", "split.json", "mask.safetensors", "model.safetensors", "report.html"} <= {
        p.name for p in folder.iterdir()
    }
    judged = salun("classify-eval", str(folder), "--json", cwd=tmp_path)
    assert json.loads(judged.stdout)["UA"] == record_of(folder)["metrics"]["UA"]


def test_training_tells_json_alone(tmp_path: Path) -> None:
    done = salun("classify-train", "--train-epochs", "1", "--run-dir", "original", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == record_of(tmp_path / "original")
    assert json.loads(done.stdout)["command"].startswith("salun classify-train --train-epochs 1")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["classify-train"],
            ["data: digits, 10 classes; 1,295 training", "model: small", "training: 2 epochs", "time:"],
        ),
        (
            ["classify-unlearn", "--method", "ssd", "--search"],
            [
                "data: digits",
                "model: small",
                "forget: class:3, 131 training images, by SSD",
                "original: to be trained",
                "Retrain: to be",
                "time:",
            ],
        ),
    ],
)
def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(
    arguments: list[str], lines: list[str], tmp_path: Path
) -> None:
    done = salun(*arguments, "--train-epochs", "2", "--seed", "77", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == len(lines)
    assert all(line.startswith(start) for line, start in zip(printed, lines, strict=True)), printed
    assert not list(tmp_path.iterdir())
    found = json.loads(
        salun(*arguments, "--train-epochs", "2", "--seed", "77", "--dry-run", "--json", cwd=tmp_path).stdout
    )
    assert found["seconds"] > 0
    assert found["cached"]["original"] is False


def test_a_dry_run_knows_what_the_cache_has() -> None:
    options = UnlearnOptions(train_epochs=1, epochs=1, device="cpu", seed=11)
    before = preview_unlearning(options)
    unlearn(options)
    after = preview_unlearning(options)
    assert (before["cached"], after["cached"]) == (
        {"original": False, "retrain": False},
        {"original": True, "retrain": True},
    )
    assert preview_training(TrainOptions(train_epochs=1, device="cpu", seed=11))["cached"] == {"original": True}
    assert preview_unlearning(replace(options, retrain="no"))["no_retrain"] is not None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify-unlearn", "--method", "best"], 2, "method is 'best'"),
        (["classify-unlearn", "--data", "nowhere"], 1, "there is no data set 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = salun(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify-train"], 2, "contains a run of `salun classify-unlearn`, not classify-train"),
        (["classify-unlearn", "--data", "./x"], 2, "contains a finished run with data 'digits', not './x'"),
        (["classify-unlearn", "--config", "run/run.json"], 0, "the run in run is finished"),
    ],
)
def test_resume_of_a_finished_run_answers_its_own_request(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    record = {"schema": 1, "status": "done", "options": asdict(UnlearnOptions())}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    done = salun(*arguments, "--resume", "--run-dir", "run", cwd=tmp_path)
    assert (done.returncode, message in done.stdout + done.stderr) == (code, True), done.stderr


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "salun", "classify-unlearn", "--train-epochs", "200", "--retrain", "no"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(
        [*command, "--run-dir", "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        while "Training" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130
    assert last == "salun: interrupted; resume with: salun classify-unlearn --resume --run-dir run"
    record = record_of(tmp_path / "run")
    assert (record["status"], record["options"]["train_epochs"]) == ("cancelled", 200)
    assert read_config(tmp_path / "run" / "run.json", UnlearnOptions)["retrain"] == "no"  # what --resume reads
