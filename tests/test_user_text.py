"""Pasted and typed text: quoted paths, decomposed Unicode, prompt syntax of hosts, names that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import salun
from cli.main import app
from salun.checkpoints.locate import ASSETS, checkpoint_folders, find
from salun.classification.unlearn_options import UnlearnOptions
from salun.config import read_config
from salun.diagnostics.inspect import inspect
from salun.diffusion.data.images import concept_folders, encode_folder
from salun.diffusion.model.loading import describe
from salun.diffusion.model.stable_diffusion import Model
from salun.diffusion.options import EraseJob, EraseOptions, Sampling
from salun.diffusion.plan import make_plan
from salun.diffusion.prompts.concepts import Concept, mentions, prompts_of, resolve
from salun.errors import ConfigError
from salun.runs.cache import size_of
from salun.user_text import is_data_set_id, is_hub_id, prompt_text, syntax_note, unquoted

from .conftest import SHORT

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
RAW = os.fsdecode(b"x\xff")  # a name that is not UTF-8, as Python holds it
posix_names = pytest.mark.skipif(sys.platform != "linux", reason="its file systems take no such names")


# -- quoted paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (r'"C:\models\a b.safetensors"', r"C:\models\a b.safetensors"),
        ("'/models/x'", "/models/x"),
        (' "x" ', "x"),
        ('"x', '"x'),
        ("it's", "it's"),
        ('""', '""'),
        ('""x""', '"x"'),  # one pair
        (" a b ", " a b "),
    ],
)
def test_unquoted_removes_one_pair_of_quotes(given: str, read: str) -> None:
    assert unquoted(given) == read


def test_quotes_go_from_every_path_option_and_no_other() -> None:
    job = EraseJob(
        model='"m.safetensors"', components="'c'", mask='"m.safetensors"', forget_images='"f"', retain_images='"r"',
        models_dir=['"a"', "b"], output=['"o.safetensors"'], run_dir='"run"', concept=['"quoted"'],
        negative_prompt='"n"',
    )  # fmt: skip
    assert (job.model, job.components, job.mask, job.run_dir) == ("m.safetensors", "c", "m.safetensors", "run")
    assert (job.forget_images, job.retain_images) == ("f", "r")
    assert (job.models_dir, job.output) == (["a", "b"], ["o.safetensors"])
    assert (job.concept, job.negative_prompt) == (['"quoted"'], '"n"')
    other = UnlearnOptions(data='"pictures"', original='"a"', model='"b"')
    assert (other.data, other.original, other.model) == ("pictures", "a", "b")


def test_quotes_go_from_paths_in_yaml_and_names_of_models(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "my model"))
    (tmp_path / "c.yaml").write_text(f"concept: circle\nmodel: '\"{folder}\"'\n", encoding="utf-8")
    assert read_config(tmp_path / "c.yaml")["model"] == str(folder)
    assert find(f'"{folder}"')[0] == folder
    assert [*checkpoint_folders([f'"{tmp_path}"'])] == [tmp_path]


def test_quotes_go_from_paths_of_commands(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    mask = tmp_path / "m.safetensors"
    run("mask", "--concept", "circle", "--mask", "random", "--output", f'"{mask}"')
    assert json.loads(run("inspect", f"'{mask}'", "--against", f'"{mask}"', "--json"))["jaccard"] == 1
    (tmp_path / "c.yaml").write_text("concept: circle\nmask: random\neval_images: 0\n", encoding="utf-8")
    printed = run(
        "erase", "--config", f'"{tmp_path / "c.yaml"}"', "--dry-run", "--json", "--run-dir", f'"{tmp_path}/r"'
    )
    assert json.loads(printed)["run_dir"] == f"{tmp_path}/r"


# -- Unicode's forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "typed"), [(NFD, NFC), (NFC, NFD)])
def test_names_are_compared_in_one_form(tmp_path: Path, on_disk: str, typed: str) -> None:
    """macOS decomposes file names; people type composed ones."""
    folder = Path(shutil.copytree(ASSETS / "shapes", tmp_path / "models" / on_disk))
    assert os.path.samefile(find(str(tmp_path / "models" / typed))[0], folder)
    (tmp_path / "files" / on_disk).mkdir(parents=True)
    (tmp_path / "files" / on_disk / f"{on_disk}.ckpt").touch()
    for name in (typed, f"{typed}.ckpt", f"{typed}/{typed}"):
        assert find(name, [str(tmp_path / "files")])[0].name == f"{on_disk}.ckpt", name
    (tmp_path / "files" / "dog").mkdir()
    assert [p.name for p in concept_folders(tmp_path / "files", [typed, "dog"])] == [on_disk, "dog"]


def test_concepts_are_compared_in_one_form() -> None:
    decomposed, composed = (resolve(Concept(name, anchor="a bar"), None, "a model")[0] for name in (NFD, NFC))
    assert decomposed == composed and prompts_of([decomposed], None).digest == prompts_of([composed], None).digest
    keep = Concept("dog", retain=(f"a {NFD} at night", "a street")).retain
    assert mentions(keep[0], composed.name) and not mentions(keep[1], composed.name)
    with pytest.raises(ConfigError, match="which is the concept itself"):
        Concept(NFD, anchor=NFC)


# -- prompt syntax of hosts -------------------------------------------------------------------------------------------


def test_escaped_brackets_are_brackets() -> None:
    assert prompt_text(r"saber \(fate\), \[x\]") == "saber (fate), [x]"
    assert prompt_text(prompt_text(r"a \\(b\\) c:\dir")) == r"a \\(b\\) c:\dir"
    assert Concept(r"saber \(fate\)", anchor=r"a \(b\)", retain=(r"c \(d\)",)).name == "saber (fate)"
    assert Sampling(negative_prompt=r"bad \(x\)").negative_prompt == "bad (x)"


def test_escaped_and_plain_brackets_are_one_prompt_for_the_text_encoder(shapes: Model) -> None:
    """The prompts that are made, and with them everything that follows, are the same."""

    def digest(name: str, **options: Any) -> str:
        settings = describe("shapes").settings
        free = salun.diffusion.plan.replace(settings, vocabulary=None)
        return make_plan(free, "a model", name, EraseOptions(anchor=["a dog"], **options)).prompts.digest

    assert digest(r"saber \(fate\)") == digest("saber (fate)") != digest("saber fate")
    assert digest("a cat", retain_prompts=[r"rin \(fate\)"]) == digest("a cat", retain_prompts=["rin (fate)"])


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("a (cat:1.3)", "(cat:1.3)"),
        ("((a cat))", "((a cat))"),
        ("[a cat] b", "[a cat]"),
        ("[a:b:0.5]", "[a:b:0.5]"),
        ("a BREAK b", "BREAK"),
        ("a AND b", "AND"),
        ("<lora:x:0.8> a", "<lora:x:0.8>"),
        ("{a|b}", "{a|b}"),
    ],
)
def test_other_syntax_is_reported_once_as_taken_literally(text: str, piece: str) -> None:
    (note,) = syntax_note([text, text, "plain"])
    assert "taken literally" in note and note.count(repr(piece)) == 1
    concept = Concept(text, anchor="a dog")
    assert concept.name == text  # literally
    plain = salun.diffusion.plan.replace(describe("shapes").settings, vocabulary=None)
    notes = make_plan(plain, "a model", concept, EraseOptions(negative_prompt=text)).notes
    assert sum("taken literally" in line for line in notes) == 1


@pytest.mark.parametrize(
    "text", ["a cat", "saber (fate)", "12:30 (noon)", "breakfast and dinner", "a < b", "1 (of 2)", "embedding:bad", ""]
)
def test_plain_text_is_not_reported(text: str) -> None:
    assert not syntax_note([text])


def test_syntax_is_looked_for_in_linear_time() -> None:
    for piece in ("(", "[", "((", "(:1", "{|", "<lora:", "(a:1 ", "AND"):
        syntax_note([piece * 50_000])


def test_captions_are_read_like_prompts(shapes: Model, tmp_path: Path) -> None:
    for i, text in enumerate((rf"{NFD} \(place\)", "(a cat:1.3)")):
        Image.fromarray(np.full((64, 64, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    found = encode_folder(shapes, tmp_path)
    assert found.captions == [f"{NFC} (place)", "(a cat:1.3)"]
    assert sum("taken literally" in note for note in found.notes) == 1


# -- names that are not UTF-8, sizes, folders that cannot be read -----------------------------------------------------


@pytest.mark.parametrize("name", ["model", "components", "run_dir", "forget_images", "negative_prompt"])
def test_an_option_that_is_not_utf8_is_rejected_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*udcff.*UTF-8"):
        EraseJob(**{name: RAW})
    for lists in ("output", "retain_prompts", "models_dir"):
        with pytest.raises(ConfigError, match="UTF-8"):
            EraseJob(**{lists: [RAW]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="UTF-8"):
        Concept(RAW)


@posix_names
def test_inspect_of_a_folder_that_is_not_utf8_agrees_with_erase(tmp_path: Path) -> None:
    place = tmp_path / RAW
    place.symlink_to(find("shapes")[0])
    with pytest.raises(ConfigError) as refused:
        EraseJob(model=str(place))
    assert inspect(str(place))["verdict"] == str(refused.value)


@posix_names
def test_files_with_names_that_are_not_utf8_are_used_and_recorded(shapes: Model, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(np.full((64, 64, 3), 50 * i + 40, np.uint8)).save(pictures / f"{i}{RAW}.png", "png")
    (pictures / f"broken{RAW}.png").write_text("no picture")
    few = {**SHORT, "steps": 1, "eval_images": 0}
    run = salun.erase(shapes, "circle", run_dir=tmp_path / "run", retain_images=str(pictures), **few)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == run.record.status == "done"
    assert (tmp_path / "run" / "report.html").is_file()


@posix_names
def test_sample_refuses_a_prompt_that_is_not_utf8(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sample", "--prompt", RAW, "--output", str(tmp_path / "x.png")])
    assert isinstance(done.exception, ConfigError)


@pytest.mark.parametrize("text", ["9" * 400, "1" + "0" * 5000 + "GB", "1e400", "9999999999TB", "nan"])
def test_cache_sizes_beyond_any_disk_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="SALUN_CACHE_SIZE") as error:
        size_of(text)
    assert len(str(error.value)) < 250


def test_folders_of_extra_model_paths_that_cannot_be_read_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, closed = tmp_path / "good", tmp_path / "closed"
    good.mkdir()
    closed.mkdir()
    long = "x" * 300  # a name that the system refuses to look up
    lines = "\n".join(f"        {folder}" for folder in ("missing", closed, long, good))
    (tmp_path / "extra_model_paths.yaml").write_text(f"a:\n    checkpoints: |\n{lines}\n", encoding="utf-8")
    scan = os.scandir

    def refused(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [*checkpoint_folders([str(tmp_path)])] == [good]
    assert "closed" in caplog.text and "Permission denied" in caplog.text
    assert "missing" not in caplog.text


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("AIML-TUDA/i2p", True), ("AIML-TUDA/i2p@main", True), ("owner/name@v1.0", True), ("i2p.csv", False),
        ("owner/name.csv", False), ("../i2p", False), ("/etc/passwd", False), ("owner/name/more", False),
        ("owner/name:test", True), ("owner/name@main:test", True), ("owner/name:../x", False), ("owner/name:", False),
        ("owner/name@../x", False), ("owner/name@", False), ("C:/name", False), ("owner/name\n", False),
    ],
)  # fmt: skip
def test_ids_of_data_sets_are_distinguished_from_files(name: str, is_id: bool) -> None:
    assert is_data_set_id(name) is is_id


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("openai/clip-vit-large-patch14", True),
        ("timm/resnet50.tv2_in1k@v1.0", True),
        ("a/b@" + "0" * 40, True),
        ("a/b@", False),
        ("a/b@..", False),
        ("a/b@refs/pr/1", False),
        ("/models/clip@main", False),
    ],
)
def test_is_hub_id_takes_a_revision_only_where_it_may_have_one(name: str, is_id: bool) -> None:
    assert is_hub_id(name, revised=True) is is_id
    assert is_hub_id(name) is (is_id and "@" not in name)
