"""`salun delta` as a user meets it: models in both layouts, exact in both directions, refusals in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from salun.__main__ import main
from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.hashing import base_hash
from salun.checkpoints.single_file import open_unet
from salun.delta import commands as deltas
from salun.delta.delta import Delta, applied_metadata
from salun.delta.stacking import stack
from salun.errors import Cancelled, ConfigError, ModelError
from salun.progress import Event

UNET = "unet/diffusion_pytorch_model.safetensors"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SHAPES = {
    "conv_in.weight": (32, 4, 3, 3),
    "conv_in.bias": (32,),
    "time_embedding.linear_1.weight": (16, 32),
    "down_blocks.0.resnets.0.conv1.weight": (32, 32, 3, 3),
    "down_blocks.0.resnets.1.conv1.weight": (32, 32, 3, 3),
    f"{BLOCK}.norm1.bias": (32,),
    f"{BLOCK}.attn1.to_q.weight": (32, 32),
    f"{BLOCK}.attn2.to_k.weight": (32, 768),
    f"{BLOCK}.attn2.to_v.weight": (32, 768),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (32, 768),
    "up_blocks.1.resnets.2.conv1.weight": (32, 64, 3, 3),
    "conv_norm_out.weight": (32,),
    "conv_out.weight": (4, 32, 3, 3),
}
FOREIGN = {"modelspec.title": "a stranger's, with „quotes“", "z": "1", "a": "2"}
Weights = dict[str, torch.Tensor]


class ReportingMapping(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str


Command = Callable[..., ReportingMapping]


@pytest.fixture
def salun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command line, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> ReportingMapping:
        monkeypatch.setattr(sys, "argv", ["salun", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return ReportingMapping(int(stop.value.code or 0), *capsys.readouterr())

    return run


def weights(seed: int = 0, dtype: torch.dtype = torch.float16) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) / 50).to(dtype) for name, shape in SHAPES.items()}


def moved(base: Weights, seed: int, only: str = "", share: float = 0.3) -> Weights:
    """The base with a share of the entries of the tensors with `only` in their names moved a little."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in base.items():
        step = torch.randn(tensor.shape, generator=generator) / 500
        chosen = torch.rand(tensor.shape, generator=generator) < (share if only in name else 0)
        new[name] = torch.where(chosen, (tensor.float() + step).to(tensor.dtype), tensor)
    return new


def folder(path: str, unet: Weights, metadata: dict[str, str] | None = None) -> str:
    """A diffusers folder, as far as deltas look at it. Gives its name as --output takes it."""
    (Path(path) / "unet").mkdir(parents=True)
    (Path(path) / "vae").mkdir()
    (Path(path) / "model_index.json").write_text("{}", encoding="utf-8")
    save_file({"x": torch.ones(3)}, Path(path) / "vae" / "model.safetensors")
    save_file(unet, Path(path) / UNET, metadata)
    return f"{path}/"


def single(path: str, unet: Weights, ema: bool = False, metadata: dict[str, str] | None = None) -> str:
    """A single file: the UNet by LDM names, and other parts in another dtype."""
    names = keymap.unet_to_ldm(unet)
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.ones(4, 4),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(7, 3),
        "alphas_cumprod": torch.linspace(1, 0, 10),
    }
    if ema:
        others |= {f"{keymap.EMA}diffusion_modelconv_inweight": unet["conv_in.weight"].clone()}
    save_file({**others, **{names[n]: t for n, t in unet.items()}}, path, FOREIGN if metadata is None else metadata)
    return path


def unet_of(path: str) -> Weights:
    return dict(open_unet(Path(path)))


def same(one: Weights, other: Weights) -> bool:
    """To the bit."""
    return base_hash(one) == base_hash(other)


def metadata_of(path: str) -> dict[str, str]:
    return safetensors_io.read_header(Path(path) / UNET if Path(path).is_dir() else Path(path)).metadata


def done(result: ReportingMapping) -> dict[str, Any]:
    """The JSON of a command that must have worked."""
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def refused(result: ReportingMapping, code: int, *parts: str) -> None:
    """The command failed with one line that has these parts, and no file was left half-written."""
    assert result.code == code, (result.out, result.err)
    assert not result.out
    lines = [line for line in result.err.splitlines() if line.startswith("salun: ")]
    assert len(lines) == 1, result.err
    for part in parts:
        assert part in lines[0]
    assert not list(Path().glob(".*tmp*"))


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [folder, single])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_delta_leads_to_the_erased_model_and_back_bit_exactly(
    layout: Callable[..., str], dtype: torch.dtype, salun: Command
) -> None:
    base, new = weights(dtype=dtype), moved(weights(dtype=dtype), 1)
    ending = "/" if layout is folder else ".safetensors"
    model, erased = layout("base" + ending, base), layout("erased" + ending, new)
    found = done(salun("delta", "extract", model, erased, "--output", "x.salun.safetensors", "--json"))
    assert found["bytes"] == Path("x.salun.safetensors").stat().st_size
    assert found["changed"] == sum(int((base[name] != new[name]).sum()) for name in base)
    assert found["density"] == pytest.approx(0.3, abs=0.03)
    applied = done(salun("delta", "apply", model, "x.salun.safetensors", "--output", f"again{ending}", "--json"))
    assert (applied["exact"], applied["result_hash"]) == (True, base_hash(new))
    assert same(unet_of(f"again{ending}"), new)
    undone = done(
        salun("delta", "undo", f"again{ending}", "x.salun.safetensors", "--output", f"back{ending}", "--json")
    )
    assert undone["base_hash"] == base_hash(base)
    assert same(unet_of(f"back{ending}"), base)


def test_all_else_of_a_single_file_stays_and_comes_back_byte_for_byte(salun: Command) -> None:
    base, erased = single("base.safetensors", weights()), single("erased.safetensors", moved(weights(), 1))
    done(salun("delta", "extract", base, erased, "--output", "x.salun.safetensors", "--json"))
    done(salun("delta", "apply", base, "x.salun.safetensors", "--output", "again.safetensors", "--json"))
    before, after = load_file(base), load_file("again.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert name.startswith(keymap.UNET) or torch.equal(tensor, after[name])
    assert metadata_of("again.safetensors").items() >= FOREIGN.items()
    done(salun("delta", "undo", "again.safetensors", "x.salun.safetensors", "--output", "back.safetensors", "--json"))
    assert not any(text for key, text in metadata_of("back.safetensors").items() if key.startswith("salun."))
    assert Path("back.safetensors").read_bytes() == Path(base).read_bytes()


def test_all_else_of_a_folder_stays(salun: Command) -> None:
    base, erased = folder("base", weights()), folder("erased", moved(weights(), 1))
    done(salun("delta", "extract", base, erased, "--output", "x.salun.safetensors", "--json"))
    done(salun("delta", "apply", base, "x.salun.safetensors", "--output", "again/", "--json"))
    for name in ("model_index.json", "vae/model.safetensors"):
        assert (Path("again") / name).read_bytes() == (Path("base") / name).read_bytes()
    done(salun("delta", "undo", "again/", "x.salun.safetensors", "--output", "back/", "--json"))
    assert (Path("back") / UNET).read_bytes() == (Path("base") / UNET).read_bytes()


def test_one_delta_serves_the_single_file_and_the_folder(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    file, place = single("base.safetensors", base), folder("base", base)
    erased = folder("erased", new)
    for given, output in ((file, "one.salun.safetensors"), (place, "two.salun.safetensors")):
        done(salun("delta", "extract", given, erased, "--output", output, "--json"))
    assert Path("one.salun.safetensors").read_bytes() == Path("two.salun.safetensors").read_bytes()
    for given, output in ((file, "again.safetensors"), (place, "again/")):
        assert done(salun("delta", "apply", given, "one.salun.safetensors", "--output", output, "--json"))["exact"]
        assert same(unet_of(output), new)


def test_what_is_written_lists_what_was_applied(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = single("base.safetensors", base)
    delta = Delta.between(base, new, {"salun.concept": "circle", "note": "not for models"})
    delta.save("x.salun.safetensors")
    done(salun("delta", "apply", model, "x.salun.safetensors", "--output", "again.safetensors", "--json"))
    assert metadata_of("again.safetensors") == {**FOREIGN, "salun.concept": "circle", **applied_metadata(delta)}


def test_a_delta_made_of_an_erased_model_keeps_what_that_says_of_itself(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    delta = Delta.between(base, new, {"salun.concept": "circle"})
    notes = {"salun.concept": "circle", **applied_metadata(delta)}
    model, erased = folder("base", base), folder("erased", new, notes)
    done(salun("delta", "extract", model, erased, "--output", "x.salun.safetensors", "--json"))
    delta.save("y.salun.safetensors")
    assert Path("x.salun.safetensors").read_bytes() == Path("y.salun.safetensors").read_bytes()


@pytest.mark.parametrize("strength", [-0.5, 0.0, 0.4, 1.5])
def test_other_strengths_go_part_of_the_way(strength: float, salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = folder("base", base)
    Delta.between(base, new).save("x.salun.safetensors")
    result = salun(
        "delta", "apply", model, "x.salun.safetensors", "--strength", str(strength), "--output", "part/", "--json"
    )
    assert done(result)["exact"] is (strength == 0.0)
    for name, tensor in unet_of("part/").items():
        old = base[name].float()
        expected = (old + strength * (new[name].float() - old)).half()
        assert torch.equal(tensor, torch.where(base[name] == new[name], base[name], expected))
    listed = json.loads(metadata_of("part/").get("salun.applied", "[]"))
    assert [one["strength"] for one in listed] == ([strength] if strength else [])


def test_people_are_reported_in_sentences(salun: Command) -> None:
    base, erased = single("base.safetensors", weights()), single("erased.safetensors", moved(weights(), 1))
    result = salun("delta", "extract", base, erased, "--output", "x.salun.safetensors")
    assert "weights (" in result.out
    assert "Comparing: 13/13" in result.err
    result = salun("delta", "apply", base, "x.salun.safetensors", "--output", "again.safetensors")
    assert "at strength 1, bit-exact (hash " in result.out
    assert "Checking the model: 13/13" in result.err
    assert "Writing: 13/13" in result.err
    result = salun("delta", "undo", "again.safetensors", "x.salun.safetensors", "--output", "back.safetensors")
    assert "is undone, bit-exact" in result.out
    result = salun("delta", "inspect", "x.salun.safetensors")
    assert re.search(rf"base hash: +{base_hash(weights())[:12]}…\n", result.out)
    assert "down_blocks.0" in result.out
    one, other = (done(salun(*way, "x.salun.safetensors", "--json")) for way in (("inspect",), ("delta", "inspect")))
    assert one == other
    assert one["id"] == Delta.load("x.salun.safetensors").id


def test_taking_the_last_delta_out_leaves_what_the_one_before_says(salun: Command) -> None:
    base = weights()
    new = moved(base, 1, only="down_blocks")
    last = moved(new, 2, only="up_blocks")
    single("base.safetensors", base)
    Delta.between(base, new, {"salun.concept": "circle"}).save("one.salun.safetensors")
    Delta.between(new, last, {"salun.concept": "square"}).save("two.salun.safetensors")
    for given, delta, output in (("base", "one", "erased"), ("erased", "two", "twice")):
        name = f"{delta}.salun.safetensors"
        done(salun("delta", "apply", f"{given}.safetensors", name, "--output", f"{output}.safetensors", "--json"))
    assert metadata_of("twice.safetensors")["salun.concept"] == "circle, square"
    done(salun("delta", "undo", "twice.safetensors", "two.salun.safetensors", "--output", "back.safetensors", "--json"))
    assert metadata_of("back.safetensors")["salun.concept"] == "circle"
    assert same(unet_of("back.safetensors"), new)


def test_models_are_found_and_pickles_read_as_by_erase(salun: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALUN_CACHE", str(Path("cache").resolve()))
    base, new = weights(), moved(weights(), 1)
    Path("models").mkdir()
    torch.save({"state_dict": load_file(single("base.safetensors", base))}, "models/old.ckpt")
    Delta.between(base, new).save("x.salun.safetensors")
    apply = ("delta", "apply", "old", "x.salun.safetensors", "--output", "again.safetensors", "--json")
    refused(salun(*apply, "--models-dir", "models"), 1, "pickle")
    assert done(salun(*apply, "--models-dir", "models", "--allow-pickle"))["exact"]
    assert same(unet_of("again.safetensors"), new)


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        (
            ("export", "x.salun.safetensors", "--base", "none", "--output", "x.lora.safetensors", "--energy", "2"),
            "energy",
        ),
        (
            ("export", "x.salun.safetensors", "--base", "none", "--output", "x.diff.safetensors", "--rank", "4"),
            "rank is 4",
        ),
        (("apply", "none", "x.salun.safetensors", "--output", "y.safetensors", "--strength", "7"), "strength is 7"),
    ],
)
def test_wrong_option_is_reported_before_reading(arguments: tuple[str, ...], result: str, salun: Command) -> None:
    refused(salun("delta", *arguments), 2, result)


class Counted(dict[str, torch.Tensor]):
    """Weights that count how often each is read."""

    def __init__(self, content: Weights) -> None:
        super().__init__(content)
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("how", ["same", "other dtype", "fine-tune"])
def test_a_model_is_read_once_to_be_checked_and_once_to_be_written(how: str) -> None:
    base = weights()
    delta = Delta.between(base, moved(base, 1))
    given = {"same": base, "other dtype": weights_as(base, torch.float32), "fine-tune": moved(base, 9)}[how]
    model, other = Counted(given), Counted(base) if how == "fine-tune" else None
    made = stack(model, [(delta, 1.0)], fine_tune_of_base=other)
    assert set(model.reads.values()) == {1}
    dict(made)
    assert set(model.reads.values()) <= {1, 2}
    assert other is None or set(other.reads.values()) <= {1, 2}


def weights_as(content: Weights, dtype: torch.dtype) -> Weights:
    return {name: tensor.to(dtype) for name, tensor in content.items()}


KILLED = """
import os, signal, sys
from salun.delta import commands as deltas

def progress(event):
    if event.stage == "writing" and event.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

deltas.apply(sys.argv[1], "x.salun.safetensors", sys.argv[2], progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process can end itself like that there")
@pytest.mark.parametrize("layout", [folder, single])
def test_what_a_killed_command_left_is_cleared_away_by_the_next(layout: Callable[..., str], salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    ending = "/" if layout is folder else ".safetensors"
    model = layout(f"base{ending}", base)
    Delta.between(base, new).save("x.salun.safetensors")
    there = sorted(p.name for p in Path().iterdir())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, model, f"again{ending}"], env=environment, check=False)
    assert killed.returncode == -9
    left = sorted(p.name for p in Path().iterdir())
    assert len(left) == len(there) + 1  # a temporary name, and no output
    assert not Path(f"again{ending}").exists()
    done(salun("delta", "apply", model, "x.salun.safetensors", "--output", f"again{ending}", "--json"))
    assert sorted(p.name for p in Path().iterdir()) == sorted([*there, f"again{ending}".rstrip("/")])
    assert same(unet_of(f"again{ending}"), new)


def test_a_folder_that_a_killed_command_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    """It was killed between the two renames: the user's folder has only the temporary name."""
    from salun.files import new_folder

    aside = tmp_path / ".model.0123456789abcdef.old"
    aside.mkdir()
    (aside / "mine").write_text("the user's")
    with pytest.raises(ModelError), new_folder(tmp_path / "model"):
        raise OSError("the disk is full")
    assert (tmp_path / "model" / "mine").read_text() == "the user's"
    shutil.copytree(tmp_path / "model", aside)  # killed after both: this one is superfluous
    with new_folder(tmp_path / "model") as place:
        assert place.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("layout", [folder, single])
def test_what_appears_at_the_outputs_name_meanwhile_is_left(layout: Callable[..., str], salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    ending = "/" if layout is folder else ".safetensors"
    model, target = layout(f"base{ending}", base), Path(f"mine{ending}")
    Delta.between(base, new).save("x.salun.safetensors")

    def appear(event: Event) -> None:
        if event.stage == "writing" and event.step == 5:
            if layout is folder:
                target.mkdir()
            (target / "precious" if layout is folder else target).write_text("the user's")

    with pytest.raises(ConfigError, match="already exists"):
        deltas.apply(model, "x.salun.safetensors", f"mine{ending}", progress=appear)
    assert (target / "precious" if layout is folder else target).read_text() == "the user's"
    assert not list(Path().glob(".mine*"))


def test_a_place_that_cannot_be_written_to_is_reported_before_the_work(salun: Command) -> None:
    base = weights()
    model = single("base.safetensors", base)
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    seen: list[str] = []
    Path("file").write_text("no folder")
    for place in ("file/y.safetensors", "/proc/y.safetensors"):
        with pytest.raises(ConfigError, match=r"not a folder|cannot be written|free"):
            deltas.apply(model, "x.salun.safetensors", place, progress=lambda event: seen.append(event.stage))
    assert not seen


def test_links_that_lead_to_themselves_are_reported(salun: Command) -> None:
    base = weights()
    model = single("base.safetensors", base)
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    Path("loop.safetensors").symlink_to("loop.safetensors")
    Path("nowhere.safetensors").symlink_to("gone.safetensors")
    apply = ("delta", "apply", model)
    for link in ("loop.safetensors", "nowhere.safetensors"):
        refused(salun(*apply, "x.salun.safetensors", "--output", link), 2, "already exists")
    refused(salun(*apply, "loop.safetensors", "--output", "y.safetensors"), 1, "cannot be read")


def test_a_second_delta_of_the_same_base_says_how_both_are_applied(salun: Command) -> None:
    base = weights()
    single("base.safetensors", base)
    for number in (1, 2):
        Delta.between(base, moved(base, number)).save(f"{number}.salun.safetensors")
    done(salun("delta", "apply", "base.safetensors", "1.salun.safetensors", "--output", "one.safetensors", "--json"))
    result = salun("delta", "apply", "one.safetensors", "2.salun.safetensors", "--output", "both.safetensors")
    refused(result, 1, "already has", "`salun delta stack`", base_hash(base)[:12])


def test_a_copy_of_a_folder_has_no_hidden_copies_of_the_weights_and_no_file_of_the_users(salun: Command) -> None:
    base = weights()
    model = folder("base", base)
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    for place in ("unet_ema/diffusion_pytorch_model.safetensors", "unet/old/model.safetensors", "old/unet.safetensors"):
        Path("base", place).parent.mkdir(parents=True, exist_ok=True)
        save_file(base, Path("base", place))
    Path("base", "old", "pytorch.bin").write_bytes(b"who knows")
    Path("base", "detector").mkdir()
    save_file({"layer.weight": torch.ones(2)}, Path("base", "detector", "detector.safetensors"))
    Path("secret").write_text("the user's")
    for name in ("notes", "LICENSE.key", "LICENSE", "README.md"):
        Path("base", name).symlink_to(Path("secret").resolve())
    Path("shared").mkdir()
    save_file({"x": torch.ones(3)}, Path("shared", "model.safetensors"))
    Path("base", "extras").symlink_to(Path("shared").resolve())
    found = done(salun("delta", "apply", model, "x.salun.safetensors", "--output", "again/", "--json"))
    copied = {p.relative_to("again").as_posix() for p in Path("again").rglob("*") if p.is_file()}
    assert copied == {
        "model_index.json", UNET, "vae/model.safetensors", "detector/detector.safetensors",
    }  # fmt: skip
    assert any("LICENSE.key" in note and "links out" in note for note in found["notes"])
    assert any("old/pytorch.bin" in note for note in found["notes"])
    Path("base", "text_encoder").symlink_to(Path("shared").resolve())
    result = salun("delta", "apply", model, "x.salun.safetensors", "--output", "third/")
    refused(result, 1, "base/text_encoder is a link out of the model's folder")


def test_second_copies_of_the_weights_are_kept_only_when_asked_to(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = single("base.safetensors", base, ema=True)
    Delta.between(base, new).save("x.salun.safetensors")
    apply = ("delta", "apply", model, "x.salun.safetensors", "--output", "again.safetensors", "--json")
    assert not done(salun(*apply, "--keep-ema"))["notes"]
    assert any(name.startswith(keymap.EMA) for name in load_file("again.safetensors"))


def test_second_copies_of_the_weights_are_skipped_and_this_is_said(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = single("base.safetensors", base, ema=True)
    Delta.between(base, new).save("x.salun.safetensors")
    found = done(salun("delta", "apply", model, "x.salun.safetensors", "--output", "again.safetensors", "--json"))
    assert "skipped" in found["notes"][0]
    assert not any(name.startswith(keymap.EMA) for name in load_file("again.safetensors"))


# -- bases in another dtype, other models -----------------------------------------------------------------------------


def test_an_fp32_copy_of_the_fp16_base_gets_differences_and_this_is_said(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = single("base.safetensors", {name: tensor.float() for name, tensor in base.items()})
    Delta.between(base, new).save("x.salun.safetensors")
    found = done(salun("delta", "apply", model, "x.salun.safetensors", "--output", "again.safetensors", "--json"))
    assert not found["exact"]
    assert "another dtype" in found["notes"][0]
    for name, tensor in unet_of("again.safetensors").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, base[name].float() + (new[name].float() - base[name].float()))
    result = salun("delta", "undo", "again.safetensors", "x.salun.safetensors", "--output", "back.safetensors")
    its_own = base_hash(weights_as(base, torch.float32))
    refused(result, 1, "at strength 1 as differences", "Start from its base", its_own[:12])


def test_an_fp16_copy_of_the_fp32_base_is_rejected_with_the_way_out(salun: Command) -> None:
    base = weights(dtype=torch.float32)
    new = moved(base, 1)
    model, full = folder("half", {name: tensor.half() for name, tensor in base.items()}), folder("full", base)
    Delta.between(base, new).save("x.salun.safetensors")
    apply = ("delta", "apply", model, "x.salun.safetensors", "--output", "again/")
    refused(salun(*apply), 1, "a dtype of less precision", "adds the differences", base_hash(base)[:12])
    found = done(salun(*apply, "--fine-tune-of-base", full, "--json"))
    assert "differences" in found["notes"][0]
    for name, tensor in unet_of("again/").items():
        old = base[name].half()
        expected = (old.float() + (new[name] - base[name])).half()
        assert torch.equal(tensor, torch.where(new[name] != base[name], expected, old))


def test_another_base_is_rejected_with_both_hashes_and_a_fine_tune_gets_differences(salun: Command) -> None:
    base, new, tuned = weights(), moved(weights(), 1), moved(weights(), 2)
    model, other = folder("base", base), single("tuned.safetensors", tuned)
    Delta.between(base, new).save("x.salun.safetensors")
    apply = ("delta", "apply", other, "x.salun.safetensors", "--output", "again.safetensors")
    refused(salun(*apply), 1, "was made for the base", base_hash(base)[:12], base_hash(tuned)[:12], "fine")
    refused(salun(*apply, "--fine-tune-of-base", other), 1, "Give the base that the delta was made from")
    done(salun(*apply, "--fine-tune-of-base", model, "--json"))
    for name, tensor in unet_of("again.safetensors").items():
        expected = (tuned[name].float() + (new[name].float() - base[name].float())).half()
        assert torch.equal(tensor, torch.where(new[name] != base[name], expected, tuned[name]))
    assert json.loads(metadata_of("again.safetensors")["salun.applied"])[0]["differences"] is True


def test_a_delta_that_is_applied_already_is_not_applied_again(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    Delta.between(base, new).save("x.salun.safetensors")
    result = salun("delta", "apply", folder("erased", new), "x.salun.safetensors", "--output", "again/")
    refused(result, 1, "it is applied already", base_hash(base)[:12], base_hash(new)[:12])


def test_models_that_do_not_pair_up_are_rejected(salun: Command) -> None:
    base = folder("base", weights())
    smaller = folder("smaller", {name: t for name, t in weights().items() if name != "conv_norm_out.weight"})
    floats = folder("floats", weights(dtype=torch.float32))
    extract = ("delta", "extract", base)
    refused(salun(*extract, smaller, "--output", "x.salun.safetensors"), 1, "only one of them has conv_norm_out.weight")
    refused(salun(*extract, floats, "--output", "x.salun.safetensors"), 1, "float16", "float32", "in one dtype")
    shutil.copytree("base", "copy")
    refused(salun(*extract, "copy", "--output", "x.salun.safetensors"), 1, "the same weights")
    assert not Path("x.salun.safetensors").exists()


# -- several ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(salun: Command) -> tuple[str, Weights, Delta, Delta]:
    """A base and two deltas of it, one.salun.safetensors and two.salun.safetensors, that change different tensors."""
    base = weights()
    one, other = (Delta.between(base, moved(base, 1, part)) for part in ("attn2", "conv"))
    one.save("one.salun.safetensors")
    other.save("two.salun.safetensors")
    return single("base.safetensors", base), base, one, other


def test_deltas_without_overlap_stack_in_any_order_and_come_out_in_any_order(
    two: tuple[str, Weights, Delta, Delta], salun: Command
) -> None:
    model, base, one, other = two
    names = ["one.salun.safetensors", "two.salun.safetensors"]
    for order, output in ((names, "both.safetensors"), (names[::-1], "htob.safetensors")):
        found = done(salun("delta", "stack", model, *order, "--output", output, "--json"))
        assert found["exact"]
        assert found["overlaps"] == []
    assert same(unet_of("both.safetensors"), unet_of("htob.safetensors"))
    assert same(unet_of("both.safetensors"), {**base, **one.apply(base), **other.apply(base)})
    for first, second in (names, names[::-1]):
        undo = ("delta", "undo", "both.safetensors", first, "--output", f"less-{first[:3]}.safetensors", "--json")
        left = done(salun(*undo))
        kept = Delta.load(second)
        assert left["applied"] == [{"id": kept.id, "strength": 1.0}]
        assert left["base_hash"] == kept.result_hash
        assert metadata_of(f"less-{first[:3]}.safetensors") == {**FOREIGN, **applied_metadata(kept)}
        undo = ("delta", "undo", f"less-{first[:3]}.safetensors", second, "--output", f"back-{first[:3]}.safetensors")
        done(salun(*undo, "--json"))
        assert same(unet_of(f"back-{first[:3]}.safetensors"), base)


def test_an_overlap_is_reported_and_neither_of_the_two_comes_out_alone(salun: Command) -> None:
    base = weights()
    one, other = (Delta.between(base, moved(base, seed)) for seed in (1, 2))
    one.save("one.salun.safetensors")
    other.save("two.salun.safetensors")
    model = folder("base", base)
    stack = ("delta", "stack", model, "one.salun.safetensors", "two.salun.safetensors")
    found = done(salun(*stack, "--output", "both/", "--json"))
    (pair,) = found["overlaps"]
    changed = [{n: base[n] != new[n] for n in base} for new in (unet_at(base, one), unet_at(base, other))]
    assert pair["entries"] == sum(int((changed[0][n] & changed[1][n]).sum()) for n in base)
    assert sorted(pair["deltas"]) == sorted([one.id, other.id])
    assert "get the sum of both" in found["notes"][0]
    result = salun("delta", "undo", "both/", "one.salun.safetensors", "--output", "back/")
    refused(result, 1, other.id, "changed some of the same weights", "Start from its base", base_hash(base)[:12])


def unet_at(base: Weights, delta: Delta) -> Weights:
    return {**base, **delta.apply(base)}


def test_strengths_of_a_stack_go_in_the_order_of_its_deltas(
    two: tuple[str, Weights, Delta, Delta], salun: Command
) -> None:
    model, base, one, other = two
    stack = ("delta", "stack", model, "one.salun.safetensors", "two.salun.safetensors", "--output", "both.safetensors")
    done(salun(*stack, "--strength", "0.5", "--strength", "1", "--json"))
    expected = {**base, **one.apply(base, 0.5), **other.apply(base)}
    assert same(unet_of("both.safetensors"), expected)
    result = salun("delta", "undo", "both.safetensors", "one.salun.safetensors", "--output", "back.safetensors")
    refused(result, 1, "at strength 0.5", "Start from its base")
    done(salun("delta", "undo", "both.safetensors", "two.salun.safetensors", "--output", "back.safetensors", "--json"))
    assert same(unet_of("back.safetensors"), {**base, **one.apply(base, 0.5)})


def test_what_cannot_be_stacked_is_rejected(two: tuple[str, Weights, Delta, Delta], salun: Command) -> None:
    model = two[0]
    foreign = weights(7)
    Delta.between(foreign, moved(foreign, 1)).save("foreign.salun.safetensors")
    stack = ("delta", "stack", model, "one.salun.safetensors")
    output = ("--output", "both.safetensors")
    refused(salun(*stack, "foreign.salun.safetensors", *output), 1, "different bases", base_hash(foreign)[:12])
    refused(salun(*stack, "one.salun.safetensors", *output), 2, "given twice")
    refused(salun(*stack, "two.salun.safetensors", "--strength", "1", *output), 2, "strength has 1 values for 2 deltas")
    refused(salun(*stack, "--strength", "2", *output), 2, "strength is 2.0, but must be from -0.5 to 1.5")
    refused(salun(*stack, "--strength", "nan", *output), 2, "strength is nan")
    refused(salun(*stack, "gone.salun.safetensors", *output), 1, "gone.salun.safetensors cannot be read")
    refused(salun(*stack, model, *output), 1, "not a salun delta")
    assert not Path("both.safetensors").exists()


# -- undoing what cannot be undone, and models erased twice -----------------------------------------------------------


def test_a_delta_at_another_strength_is_not_undone(salun: Command) -> None:
    base = weights()
    delta = Delta.between(base, moved(base, 1))
    delta.save("x.salun.safetensors")
    model = single("base.safetensors", base)
    done(
        salun(
            "delta", "apply", model, "x.salun.safetensors", "--strength", "0.5", "--output", "p.safetensors", "--json"
        )
    )
    result = salun("delta", "undo", "p.safetensors", "x.salun.safetensors", "--output", "back.safetensors")
    refused(result, 1, f"{delta.id} at strength 0.5", "Start from its base", base_hash(base)[:12])
    assert not Path("back.safetensors").exists()


def test_a_delta_is_not_undone_from_a_model_that_never_had_it(salun: Command) -> None:
    base = weights()
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    model = single("base.safetensors", base)
    result = salun("delta", "undo", model, "x.salun.safetensors", "--output", "back.safetensors")
    refused(result, 1, "is the delta's base", "nothing to undo", base_hash(base)[:12])
    never = single("never.safetensors", moved(base, 2))
    result = salun("delta", "undo", never, "x.salun.safetensors", "--output", "back.safetensors")
    refused(result, 1, "list no applied delta", base_hash(base)[:12])


def test_another_name_of_the_base_is_no_output_either(salun: Command) -> None:
    base = weights()
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    model = single("base.safetensors", base)
    Path("hard.safetensors").hardlink_to(model)
    result = salun("delta", "apply", model, "x.salun.safetensors", "--output", "hard.safetensors", "--force")
    refused(result, 2, "the input", "Write somewhere else")


def test_a_low_rank_file_as_large_as_the_exact_one_is_reported(salun: Command) -> None:
    """Steps without structure are of full rank, and then nothing is won."""
    base = weights()
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    model = single("base.safetensors", base)
    export = ("delta", "export", "x.salun.safetensors", "--base", model, "--json", "--output")
    large = done(salun(*export, "large.lora.safetensors", "--energy", "0.99"))
    assert any("loses nothing" in note for note in large["notes"])
    full = done(salun(*export, "x.diff.safetensors"))
    # the account counts tensors' bytes; files have a header besides
    assert large["kept"]["bytes_in_full"] <= full["bytes"] < large["kept"]["bytes_in_full"] + 4096
    assert 0.8 * large["kept"]["bytes_in_full"] <= large["kept"]["bytes"]
    small = done(salun(*export, "small.lora.safetensors", "--rank", "1"))
    assert small["notes"] == [] and small["bytes"] < large["bytes"] / 4


def test_a_list_that_was_copied_to_other_weights_counts_for_nothing(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    delta = Delta.between(base, new)
    delta.save("x.salun.safetensors")
    other = single("other.safetensors", moved(new, 3), metadata=applied_metadata(delta))
    result = salun("delta", "undo", other, "x.salun.safetensors", "--output", "back.safetensors")
    refused(result, 1, "list no applied delta")


def test_a_model_erased_twice_is_undone_last_first(salun: Command) -> None:
    base = weights()
    once = moved(base, 1)
    twice = moved(once, 2)
    one, other = Delta.between(base, once), Delta.between(once, twice)
    one.save("one.salun.safetensors")
    other.save("two.salun.safetensors")
    model = single("base.safetensors", base)
    done(salun("delta", "apply", model, "one.salun.safetensors", "--output", "once.safetensors", "--json"))
    done(
        salun("delta", "apply", "once.safetensors", "two.salun.safetensors", "--output", "twice.safetensors", "--json")
    )
    assert same(unet_of("twice.safetensors"), twice)
    assert metadata_of("twice.safetensors")["salun.base_hash"] == base_hash(base)
    result = salun("delta", "undo", "twice.safetensors", "one.salun.safetensors", "--output", "back.safetensors")
    refused(result, 1, other.id, "came on top of it")
    undo = ("delta", "undo", "twice.safetensors", "two.salun.safetensors", "--output", "again.safetensors", "--json")
    assert done(salun(*undo))["applied"] == [{"id": one.id, "strength": 1.0}]
    undo = ("delta", "undo", "again.safetensors", "one.salun.safetensors", "--output", "back.safetensors", "--json")
    assert done(salun(*undo))["applied"] == []
    assert same(unet_of("back.safetensors"), base)


def test_a_damaged_delta_is_reported_as_one(salun: Command) -> None:
    base = weights()
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    content = bytearray(Path("x.salun.safetensors").read_bytes())
    content[-5] ^= 1
    Path("x.salun.safetensors").write_bytes(content)
    model = single("base.safetensors", base)
    result = salun("delta", "apply", model, "x.salun.safetensors", "--output", "again.safetensors")
    refused(result, 1, "x.salun.safetensors is damaged", "Download")
    assert not Path("again.safetensors").exists()


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_must_suit_and_overwrite_nothing(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    file, place, erased = single("base.safetensors", base), folder("base", base), folder("erased", new)
    delta = "x.salun.safetensors"
    Delta.between(base, new).save(delta)
    Path("kept.safetensors").write_text("mine", encoding="utf-8")
    Path("kept").mkdir()
    for given, output, message in [
        (file, "again/", "must end in .safetensors"),
        (file, "again.salun.safetensors", "must end in .safetensors"),
        (file, "again.ckpt", "must end in .safetensors"),
        (place, "again.safetensors", "is a diffusers folder"),
        (file, "kept.safetensors", "already exists"),
        (place, "kept/", "already exists"),
        (file, file, "the input"),
        (place, "base/inside/", "the input"),
        (place, "./", "the input"),
    ]:
        refused(salun("delta", "apply", given, delta, "--output", output), 2, message)
    refused(salun("delta", "apply", file, delta, "--output", file, "--force"), 2, "the input")
    refused(salun("delta", "apply", place, delta, "--output", "kept/", "--force"), 2, "is not a diffusers folder")
    refused(
        salun("delta", "extract", file, erased, "--output", "again.safetensors"), 2, "must end in .salun.safetensors"
    )
    refused(salun("delta", "extract", file, erased, "--output", delta), 2, "already exists")
    refused(
        salun("delta", "export", delta, "--base", file, "--output", "x.safetensors"), 2, "must end in .lora.safetensors"
    )
    assert salun("delta", "apply", file, delta).code == 2
    assert Path("kept.safetensors").read_text(encoding="utf-8") == "mine"
    assert done(salun("delta", "apply", file, delta, "--output", "kept.safetensors", "--force", "--json"))["exact"]
    assert same(unet_of("kept.safetensors"), new)


def test_a_command_that_is_stopped_leaves_nothing(salun: Command) -> None:
    base = weights()
    Delta.between(base, moved(base, 1)).save("x.salun.safetensors")
    before = sorted(Path().iterdir())
    for stage in ("checking", "writing"):

        def stop(event: Event, /, stage: str = stage) -> None:
            if (event.stage, event.step) == (stage, 5):
                raise Cancelled("stopped")

        for model, output in ((single(f"{stage}.safetensors", base), "a.safetensors"), (folder(stage, base), "a/")):
            with pytest.raises(Cancelled):
                deltas.apply(model, "x.salun.safetensors", output, progress=stop)
            assert not Path(output).exists()
    assert [p for p in sorted(Path().iterdir()) if p.stem not in ("checking", "writing")] == before


# -- for stock loaders ------------------------------------------------------------------------------------------------


def test_every_difference_is_exported_as_lora_loaders_add_it(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = folder("base", base)
    delta = Delta.between(base, new, {"salun.concept": "circle"})
    delta.save("x.salun.safetensors")
    export = ("delta", "export", "x.salun.safetensors", "--base", model, "--output")
    done(salun(*export, "x.diff.safetensors", "--json"))
    found = load_file("x.diff.safetensors")
    key = f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k"
    difference = new[f"{BLOCK}.attn2.to_k.weight"].float() - base[f"{BLOCK}.attn2.to_k.weight"].float()
    assert torch.equal(found[f"{key}.diff"], difference.half())
    with safe_open("x.diff.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["salun.concept"], metadata["salun.delta"]) == ("circle", delta.id)
    assert "modelspec.architecture" in metadata
    refused(salun(*export, "y.diff.safetensors", "--rank", "4"), 2, "only low-rank files")


def test_a_low_rank_file_reports_what_it_keeps(salun: Command) -> None:
    base, new = weights(), moved(weights(), 1)
    model = single("base.safetensors", base)
    Delta.between(base, new).save("x.salun.safetensors")
    export = ("delta", "export", "x.salun.safetensors", "--base", model, "--output")
    found = done(salun(*export, "x.lora.safetensors", "--json"))
    assert all(row["kept"] >= 0.9 for row in found["kept"]["layers"].values() if row["ranks"])
    low = done(salun(*export, "low.lora.safetensors", "--rank", "1", "--json"))
    assert low["kept"]["kept"] < found["kept"]["kept"]
    assert low["bytes"] < found["bytes"]
    result = salun(*export, "again.lora.safetensors", "--energy", "0.5")
    assert "of the difference's energy" in result.out
    assert "down_blocks.0 attn2" in result.out
    refused(salun(*export, "z.lora.safetensors", "--energy", "0.5", "--rank", "2"), 2, "either a rank or an energy")
    refused(salun(*export, "z.lora.safetensors", "--energy", "1.5"), 2, "energy is 1.5")
    wrong = single("wrong.safetensors", moved(base, 5))
    result = salun("delta", "export", "x.salun.safetensors", "--base", wrong, "--output", "z.lora.safetensors")
    refused(result, 1, "was made for the base")
