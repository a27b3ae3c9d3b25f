"""The nodes in a real ComfyUI, over its HTTP interface: every example workflow, and what a host can do to a training.

COMFYUI_DIR names a checkout of ComfyUI; COMFYUI_PYTHON the Python that has its requirements (default: `venv/bin/python`
in the checkout or beside it). Models are small, of random weights: what is tested is the host, not the erasing.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import salun
from comfy_nodes.inputs import SHARED
from salun import Delta, Mask
from salun.checkpoints import safetensors_io
from salun.checkpoints.keymap import UNET
from salun.checkpoints.single_file import open_unet
from salun.diffusion.context import RunContext, training_session
from salun.diffusion.data.training_set import UserLatents, build_training_set
from salun.diffusion.erase import unlearn
from salun.diffusion.options import EraseOptions
from salun.diffusion.plan import make_plan
from salun.progress import silent
from salun.runs.cache import Cache
from salun.runs.record import RunRecord
from tools import checkpoints

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = os.environ.get("COMFYUI_DIR")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_DIR names no checkout of ComfyUI: see docs/tested-hosts.md"),
]
STARVED = """
from comfy import model_management
model_management.vram_state = model_management.VRAMState.NO_VRAM
model_management.is_device_cpu = lambda device: False
NODE_CLASS_MAPPINGS = {}
"""
PACK = "another-name"  # without a space: ComfyUI serves no help from a folder that has one
SOURCE = "host.safetensors"
NODES = 17
TINY = {"forget_latents": 2, "retain_latents": 2, "resolution": 64}
TRAIN = {
    "until": "auto",
    "steps": 3,
    "batch_size": 1,
    "lr": 1e-4,
    "retain_weight": "auto",
    "density": 0.5,
    "eval_images": 0,
    "seed": 0,
}
AT_ONCE = {"target": "online", "retain_target": "noise"}  # no frozen targets to make before the training


# -- a server ---------------------------------------------------------------------------------------------------------


class Server:
    """A ComfyUI on loopback with a base directory of its own."""

    def __init__(self, base: Path, *flags: str, **environment: str) -> None:
        self.base, self.log, self.client = base, base / "server.log", "test"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for folder in ("models/checkpoints", "models/loras", "custom_nodes", "input", "output"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        home = base / "custom_nodes" / PACK
        if not home.exists():
            home.symlink_to(ROOT, target_is_directory=True)
        assert COMFYUI is not None
        command = [_python(Path(COMFYUI)), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        command += ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, *flags]
        hidden = ("PYTHONPATH", "SALUN_CACHE", "SALUN_CACHE_SIZE")
        own = {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            command, cwd=COMFYUI, env=own, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return bytes(answer.read())

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else {}

    def queue(self, prompt: dict[str, Any]) -> str:
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
        assert answer.get("node_errors") == {}, answer  # an invalid branch is dropped without a word otherwise
        return str(answer["prompt_id"])

    def wait(self, number: str, seconds: float = 400) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.get(f"/history/{number}")
            if number in found:
                return dict(found[number])
            time.sleep(0.1)
        raise AssertionError(f"no end after {seconds} s: {self.log.read_text()[-2000:]}")

    def run(self, prompt: dict[str, Any], *anew: str) -> dict[str, Any]:
        """The outputs of a prompt that must succeed. anew: nodes that must not come out of ComfyUI's cache."""
        done = self.wait(self.queue(prompt))
        assert done["status"]["status_str"] == "success", messages(done)
        cached = [facts["nodes"] for kind, facts in done["status"]["messages"] if kind == "execution_cached"]
        assert len(cached) == 1 and not set(anew) & set(cached[0]), cached
        return dict(done["outputs"])

    def fails(self, prompt: dict[str, Any]) -> str:
        """What a prompt that must fail says."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
        if "prompt_id" not in answer or answer["node_errors"]:
            return json.dumps(answer)
        done = self.wait(answer["prompt_id"])
        assert done["status"]["status_str"] == "error", done["status"]
        return messages(done)

    def file(self, shown: str) -> Path:
        return self.base / "output" / shown

    def image(self, outputs: dict[str, Any], node: str) -> np.ndarray:
        facts = outputs[node]["images"][0]
        folder = self.base / ("output" if facts["type"] == "output" else "temp") / facts["subfolder"]
        return np.asarray(Image.open(folder / facts["filename"]).convert("RGB"))


def _python(checkout: Path) -> str:
    named = os.environ.get("COMFYUI_PYTHON")
    for path in (checkout / "venv/bin/python", checkout.parent / "venv/bin/python"):
        if named is None and path.exists():
            return str(path)
    return named or sys.executable


def messages(done: dict[str, Any]) -> str:
    return json.dumps(done["status"]["messages"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("models") / SOURCE, "sd1", size="host")


@pytest.fixture(scope="module")
def start(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def begin(*flags: str, pack: str = "", **environment: str) -> Server:
        """pack: the content of another node pack, named by the first flag."""
        base = tmp_path_factory.mktemp("comfyui")
        if pack:
            (base / "custom_nodes" / flags[0]).mkdir(parents=True)
            (base / "custom_nodes" / flags[0] / "__init__.py").write_text(pack)
        (base / "models/checkpoints").mkdir(parents=True)
        (base / "models/checkpoints" / SOURCE).symlink_to(checkpoint)
        (base / "elsewhere").mkdir()
        (base / "output").mkdir()
        (base / "output/checkpoints").symlink_to(base / "elsewhere", target_is_directory=True)  # as users have it
        running.append(Server(base, *flags, **environment))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    return start()


# -- prompts ----------------------------------------------------------------------------------------------------------


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


PARTS = {"model": ["load", 0], "clip": ["load", 1], "concept": ["concept", 0], "options": ["options", 0]}


def masking(**changes: Any) -> dict[str, Any]:
    return node(
        "SalUnSaliencyMask", **PARTS, **{"density": 0.5, "mask": "saliency", "batch_size": 1, "seed": 0, **changes}
    )


def erasing(**changes: Any) -> dict[str, Any]:
    """load → concept, options → erase. changes: inputs of SalUn Erase, the others of SalUn Options."""
    shared = {name: changes.pop(name) for name in list(changes) if name in SHARED}
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=SOURCE),
        "concept": node("SalUnConcept", preset="custom", text="a cat", anchor="a dog", retain_prompts=""),
        "options": node("SalUnOptions", **{**TINY, **shared}),
        "erase": node("SalUnErase", **{**PARTS, "vae": ["load", 2], **TRAIN, **changes}),
    }


def sampling(model: list[Any], name: str = "image", load: str = "load") -> dict[str, Any]:
    return {
        f"{name} text": node("CLIPTextEncode", clip=[load, 1], text="a photo of a cat"),
        f"{name} latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        f"{name} sample": node(
            "KSampler",
            model=model,
            positive=[f"{name} text", 0],
            negative=[f"{name} text", 0],
            latent_image=[f"{name} latent", 0],
            **{"seed": 5, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
        ),
        f"{name} decode": node("VAEDecode", samples=[f"{name} sample", 0], vae=[load, 2]),
        name: node("SaveImage", images=[f"{name} decode", 0], filename_prefix="seen"),
    }


def once_more(graph: dict[str, Any], name: str = "image") -> dict[str, Any]:
    """A graph of `sampling` that ComfyUI has not in its cache: an input that no node has is nothing but another key."""
    graph[f"{name} sample"]["inputs"]["again"] = next(_numbers)
    return graph


def after_erasing(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """A graph of `sampling` that waits for SalUn Erase but is not changed by it: of its words a share of 0 counts."""
    metrics = node("CLIPTextEncode", clip=["load", 1], text=["erase", 3])
    both = node("ConditioningAverage", conditioning_to=[f"{name} text", 0], conditioning_from=[f"{name} metrics", 0])
    both["inputs"]["conditioning_to_strength"] = 1.0
    graph[f"{name} sample"]["inputs"]["positive"] = [f"{name} both", 0]
    return {**graph, f"{name} metrics": metrics, f"{name} both": both}


_numbers = itertools.count()


def keeping(kind: str = "SalUnSaveDelta", name: str = "keep", **inputs: Any) -> dict[str, Any]:
    return {name: node(kind, delta=["erase", 1], filename_prefix="erased", **inputs)}


def weights_of(model: list[Any], name: str) -> dict[str, Any]:
    """ComfyUI's own saver, to read what weights a MODEL has."""
    return {f"save {name}": node("ModelSave", model=model, filename_prefix=f"seen/{name}")}


def unet(path: Path) -> dict[str, Tensor]:
    header = safetensors_io.read_header(path)
    names = [name for name in header.names if name.startswith(UNET)]
    return {name: tensor.float() for name, tensor in safetensors_io.tensors(path, names)}


def from_front_end(workflow: dict[str, Any], info: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """A saved workflow as a prompt, as the front end makes it: widgets in the order of the node's inputs.

    changes: class → inputs to replace.
    """
    wires = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for each in workflow["nodes"]:
        kind, values = each["type"], list(each["widgets_values"])
        if kind == "MarkdownNote":  # of the front end alone
            continue
        declared = info[kind]["input"]
        inputs: dict[str, Any] = {}
        for name, (what, *rest) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            options = rest[0] if rest else {}
            if isinstance(what, list) or what in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs[name] = values.pop(0)
                if name in ("seed", "noise_seed") and options.get("control_after_generate") is not False:
                    values.pop(0)
        assert not values, f"{kind} has {len(values)} values more than widgets"
        inputs |= {i["name"]: wires[i["link"]] for i in each["inputs"] if i["link"] is not None}
        inputs |= {k: v for k, v in changes.get(kind, {}).items() if not isinstance(inputs.get(k), list)}
        if "options" in declared.get("optional", {}):  # some examples go without, but tests need small numbers
            inputs.setdefault("options", ["small", 0])
        prompt[str(each["id"])] = {"class_type": kind, "inputs": inputs}
    return {**prompt, "small": node("SalUnOptions", **TINY)}


SMALLER = {
    "CheckpointLoaderSimple": {"ckpt_name": SOURCE},
    "SalUnErase": TRAIN,
    "SalUnOptions": TINY,
    "SalUnSaliencyMask": {"batch_size": 1},
    "SalUnEvaluate": {"n": 2},
    "SalUnAttack": {"n": 2, "images": 2, "attack": "seeds+tries=1\nquantize"},
    "SalUnSaveErasedCheckpoint": {"ckpt_name": SOURCE},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}


# -- the hard points --------------------------------------------------------------------------------------------------


def test_1_a_fresh_server_has_every_node_with_tooltips_help_templates_and_words(server: Server) -> None:
    log = server.log.read_text()
    assert f"IMPORT FAILED): {PACK}" not in log and "(IMPORT FAILED)" not in log
    own = {name: facts for name, facts in server.get("/object_info").items() if name.startswith("SalUn")}
    assert len(own) == NODES
    for name, facts in own.items():
        assert facts["display_name"].startswith("SalUn "), name
        assert facts["description"], name
        for part in ("required", "optional"):
            for label, (_, *rest) in facts["input"].get(part, {}).items():
                assert rest and rest[0].get("tooltip"), f"{name}.{label}"
        assert len(facts["output_tooltips"]) == len(facts["output"]), name
        page = server.fetch(f"/extensions/{PACK}/docs/{name}.md").decode()
        assert page.startswith(f"# {facts['display_name']}")
    templates = server.get("/workflow_templates")[PACK]
    assert sorted(templates) == sorted(p.stem for p in (ROOT / "example_workflows").glob("*.json"))
    for name in templates:
        assert json.loads(server.fetch(f"/api/workflow_templates/{PACK}/{name}.json"))["nodes"]
        assert server.fetch(f"/api/workflow_templates/{PACK}/{name}.jpg")[:2] == b"\xff\xd8"
    words = server.get("/i18n")
    assert all(words[language]["nodeCategories"]["SalUn"] for language in ("en", "zh", "ja"))
    for language in ("zh", "ja"):
        assert set(own) <= set(words[language]["nodeDefs"])


def test_2_every_example_workflow_runs_and_gives_all_its_outputs(server: Server) -> None:
    info = server.get("/object_info")
    for path in sorted((ROOT / "example_workflows").glob("*.json"), key=lambda p: "erase" not in p.name):
        saved = sorted(p.name for p in server.file("salun").glob("*.salun.safetensors"))
        changes = {**SMALLER, "SalUnLoadDelta": {"file": saved[0] if saved else ""}}
        prompt = from_front_end(json.loads(path.read_text()), info, **changes)
        if any(each["class_type"] == "SalUnAttack" for each in prompt.values()):
            with pytest.raises(
                AssertionError, match="no attack can be judged"
            ):  # images of random weights show nothing
                server.run(prompt)
            continue
        outputs = server.run(prompt)
        wanted = {number for number, each in prompt.items() if info[each["class_type"]]["output_node"]}
        assert set(outputs) == wanted, path.name
        for number in wanted:
            if "images" in outputs[number]:
                assert server.image(outputs, number).std() > 0, f"{path.name} {number}"


def test_3_and_4_only_the_masks_weights_move_and_the_graphs_model_stays_as_it_was(
    server: Server, checkpoint: Path
) -> None:
    prompt = {
        **erasing(mask=["mask", 0], seed=3),
        "mask": masking(density=0.1),
        "keep mask": node("SalUnSaveMask", mask=["mask", 0], filename_prefix="mask"),
        **keeping("SalUnSaveErasedCheckpoint", ckpt_name="auto"),
        "metrics": node("PreviewAny", source=["erase", 3]),
        **after_erasing(sampling(["load", 0], "between"), "between"),
        **sampling(["erase", 0], "after"),
    }
    base = server.run({"load": prompt["load"], **sampling(["load", 0], "before")})
    done = server.run(prompt, "erase", "between sample", "after sample")
    losses = json.loads(done["metrics"]["text"][0])["losses"]
    assert all(np.isfinite(_values(row)).all() for row in losses)
    mask = Mask.load(server.base / done["keep mask"]["text"][0])
    old, new = (dict(open_unet(p)) for p in (checkpoint, server.file("checkpoints") / _name(done["keep"])))
    for name in old:
        outside = ~mask.dense(name)
        assert torch.equal(old[name][outside].view(torch.int16), new[name][outside].view(torch.int16)), name
    moved = sum(int((old[name] != new[name]).sum()) for name in old)
    assert 0.5 * mask.selected < moved <= mask.selected
    again = server.run({"load": prompt["load"], **once_more(sampling(["load", 0]))}, "image sample")
    assert np.array_equal(server.image(base, "before"), server.image(done, "between"))
    assert np.array_equal(server.image(base, "before"), server.image(again, "image"))
    assert not np.array_equal(server.image(base, "before"), server.image(done, "after"))


def test_5_an_interrupt_stops_within_two_steps_and_leaves_nothing(server: Server) -> None:
    base = server.image(server.run({**erasing(), **sampling(["load", 0])}), "image")
    files = sorted(p for p in server.file("").rglob("*") if p.is_file())
    with Events(server) as events:
        number = server.queue({**erasing(steps=500, seed=8, **AT_ONCE), **keeping()})
        events.until(lambda: len(events.progress) > 3 + 8 + 2)  # samples, saliency, two steps of training
        asked, at = time.monotonic(), len(events.progress)
        server.post("/interrupt", {})
        done = server.wait(number, 60)
        took = time.monotonic() - asked
    assert "execution_interrupted" in messages(done)
    assert len(events.progress) - at <= 3, "more than two steps after the interrupt"
    assert took < 20
    assert sorted(p for p in server.file("").rglob("*") if p.is_file()) == files
    again = server.run({"load": erasing()["load"], **once_more(sampling(["load", 0]))}, "image sample")
    assert np.array_equal(server.image(again, "image"), base)
    assert _name(server.run({**erasing(seed=8), **keeping()})["keep"])


def test_5_queued_again_an_interrupted_training_continues_to_the_same_file(server: Server) -> None:
    prompt = {**erasing(steps=30, seed=9, **AT_ONCE), **keeping()}
    with Events(server) as events:
        number = server.queue(prompt)
        events.until(lambda: len(events.progress) > 3 + 8 + 4)  # samples, saliency, four steps of training
        server.post("/interrupt", {})
        assert "execution_interrupted" in messages(server.wait(number, 60))
        reached = max(events.progress)
    with Events(server) as events:
        resumed = _name(server.run(prompt)["keep"])
        events.until(lambda: events.progress[-1:] == [events.most])
    training = events.most - 30
    trained = [value for value in events.progress if value > training]
    assert trained == list(range(trained[0], events.most + 1)) and trained[0] >= reached > training + 2
    shutil.rmtree(server.base / "user/salun/cache")
    whole = _name(server.run({**erasing(steps=30, seed=9, **AT_ONCE, show_sensitive=True), **keeping()})["keep"])
    assert (server.file("salun") / whole).read_bytes() == (server.file("salun") / resumed).read_bytes()


def test_6_every_step_is_reported_once_in_order_with_a_preview(server: Server) -> None:
    with Events(server) as events:
        server.run({**erasing(steps=4, seed=21), **keeping()})
        events.until(lambda: events.progress[-1:] == [events.most])
    # 4 + 2·2 samples come in one batch, then 4 draws × 2 latents of saliency, 4 frozen targets, 4 training steps
    values = [value for value in events.progress if value > 6]
    assert values == list(range(7, 6 + 8 + 4 + 4 + 1))
    assert events.most == 22
    assert events.previews >= 4 + 4


def test_6_nodes_that_sample_show_what_they_sample(server: Server) -> None:
    data = node("SalUnTrainingData", **PARTS, seed=22, retain_captions="")
    prompt = {**erasing(), "data": data, "mask": masking(data=["data", 0], seed=22)}
    del prompt["erase"]
    prompt |= {"keep": node("SalUnSaveMask", mask=["mask", 0], filename_prefix="shown")}
    judged = {"before": ["load", 0], "after": ["lora", 0], "vae": ["load", 2], "n": 2, "seed": 22}
    judged |= {name: PARTS[name] for name in ("clip", "concept", "options")} | {"detector": "auto"}
    prompt["lora"] = node("LoraLoaderModelOnly", model=["load", 0], lora_name=_small_lora(server), strength_model=0.7)
    prompt |= {"judge": node("SalUnEvaluate", **judged), "see": node("PreviewImage", images=["judge", 0])}
    with Events(server) as events:
        done = server.run(prompt)
        server.run({**erasing(seed=23), **keeping()})  # at its end all earlier events have arrived
        events.until(lambda: events.progress[-1:] == [events.most])
    assert server.image(done, "see").std() > 0
    assert events.shown["data"] == 3, "one for each batch: forget, anchor and retain"
    assert events.shown["judge"] == 2, "one for each model"
    assert events.shown["mask"] == 0, "with data given nothing is sampled, so there is no preview"


def test_7_the_saved_files_through_stock_loaders_give_the_erased_model(server: Server, checkpoint: Path) -> None:
    whole = node(
        "SalUnSaveAsLora", model=["load", 0], delta=["erase", 1], filename_prefix="whole", energy=0.9, rank="auto"
    )
    whole["inputs"]["kind"] = "every difference"
    prompt = {
        **erasing(),
        "whole": whole,
        **keeping("SalUnSaveErasedCheckpoint", ckpt_name=SOURCE),
        **sampling(["erase", 0], "in graph"),
    }
    done = server.run(prompt)
    erased, lora = _name(done["keep"]), done["whole"]["text"][0].split(":")[0]
    reloaded = {"load": node("CheckpointLoaderSimple", ckpt_name=erased), **sampling(["load", 0], "reloaded")}
    assert np.array_equal(server.image(server.run(reloaded), "reloaded"), server.image(done, "in graph"))
    before = len(server.log.read_text())
    graph: dict[str, Any] = {"load": node("CheckpointLoaderSimple", ckpt_name=SOURCE)}
    for s in (0, 0.5, 1):
        loader = node("LoraLoaderModelOnly", model=["load", 0], lora_name=lora, strength_model=s)
        graph |= {f"lora {s}": loader, **weights_of([f"lora {s}", 0], f"at{s}")}
    server.run(graph)
    log = server.log.read_text()[before:].lower()
    assert "not loaded" not in log and "shape mismatch" not in log
    old, new = unet(checkpoint), unet(server.file("checkpoints") / erased)
    for s in (0, 0.5, 1):
        seen = unet(next(server.file("seen").glob(f"at{s}_*")))
        for name in old:
            difference = (new[name] - old[name]).half().float()  # as the file has it
            # ComfyUI adds in fp32 on this machine: half an ulp of fp32 for the sum, and one for the product
            bound = 2.0**-23 * old[name].abs().clamp(min=1e-6)
            assert ((seen[name] - (old[name] + s * difference)).abs() <= bound).all(), (name, s)
    for path in server.file("seen").glob("at*"):
        path.unlink()


def test_8_the_same_inputs_do_not_train_twice_and_no_file_is_overwritten(server: Server) -> None:
    def trained(prompt: dict[str, Any]) -> tuple[int, str]:
        with Events(server) as events:
            done = server.run(prompt)
        return len(events.progress), _name(done["keep"])

    first = {**erasing(seed=40), **keeping()}
    steps, one = trained(first)
    assert steps
    assert trained(first) == (0, one)  # ComfyUI runs nothing again
    # another input, on which no result depends: the node runs again, and finds on disk what it did before
    steps, two = trained({**erasing(seed=40, show_sensitive=True), **keeping()})
    assert steps == 0
    both = [server.file("salun") / name for name in (one, two)]
    assert both[0] != both[1] and both[0].read_bytes() == both[1].read_bytes()
    for change in ({"seed": 41}, {"lr": 2e-4}):
        assert trained({**erasing(**{"seed": 40, **change}), **keeping()})[0]


def test_8_bad_names_and_numbers_are_refused_before_anything_is_computed(server: Server) -> None:
    with Events(server) as events:
        for seed, prefix in enumerate(("../out", "/tmp/out", "a/../../out", "C:\\out"), 400):
            prompt = {**erasing(seed=seed), **keeping()}
            prompt["keep"]["inputs"]["filename_prefix"] = prefix
            assert "filename_prefix" in server.fails(prompt), prefix
        for seed, change in enumerate(({"lr": 2.0}, {"density": 0}, {"steps": -3}, {"retain_weight": -0.5}), 410):
            message = server.fails({**erasing(seed=seed, **change), **keeping()})
            assert "must be" in message or "value_" in message, change
        server.run({**erasing(seed=420), **keeping()})
        events.until(lambda: events.progress[-1:] == [events.most])
    assert events.progress == sorted(set(events.progress)), "the events are of more than one erasure"
    assert events.progress[0] < 6, "the erasure's samples were not made anew"


def test_9_loras_before_and_after_add_up(server: Server, checkpoint: Path) -> None:
    lora = _small_lora(server)

    def with_lora(model: list[Any], s: float) -> dict[str, Any]:
        return node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=s)

    prompt = {**erasing(model=["up", 0], seed=50), "up": with_lora(["load", 0], 0.7)}
    prompt |= {"down": with_lora(["erase", 0], 0.3), **weights_of(["up", 0], "up")}
    prompt |= {**weights_of(["erase", 0], "erased"), **weights_of(["down", 0], "down")}
    server.run(prompt)
    up, erased, down = (unet(next(server.file("seen").glob(f"{name}_*"))) for name in ("up", "erased", "down"))
    old = unet(checkpoint)
    for name in old:
        difference = (up[name] - old[name]) / 0.7
        bound = 2.0**-21 * (old[name].abs() + difference.abs()).clamp(min=1e-5)  # a few roundings of fp32
        assert ((down[name] - (erased[name] + 0.3 * difference)).abs() <= bound).all(), name
    moved = sum(int(((erased[name] - up[name]).abs() > 1e-9).sum()) for name in old)
    assert 0.4 < moved / sum(t.numel() for t in old.values()) <= 0.5
    # such an erasure fits no file: rejected, but written by ComfyUI's saver if model, clip and vae are connected
    saver = keeping("SalUnSaveErasedCheckpoint", ckpt_name=SOURCE)
    assert "connect model, clip and vae" in server.fails({**prompt, **saver})
    saver["keep"]["inputs"] |= {"model": ["erase", 0], "clip": ["load", 1], "vae": ["load", 2]}
    done = server.run({**prompt, **saver})
    assert "own saver" in done["keep"]["text"][0]
    whole = unet(server.file("checkpoints") / _name(done["keep"]))
    assert all(torch.equal(whole[name], erased[name]) for name in old)
    for path in server.file("seen").glob("*"):
        path.unlink()


@pytest.mark.parametrize("flag", ["--fp16-unet", "--bf16-unet", "--fp8_e4m3fn-unet"])
def test_9_in_other_storage_types(start: Callable[..., Server], flag: str) -> None:
    server = start(flag)
    try:
        lora = _small_lora(server)
        up = node("LoraLoaderModelOnly", model=["load", 0], lora_name=lora, strength_model=0.7)
        prompt = {**erasing(model=["up", 0]), "up": up, **sampling(["load", 0], "before")}
        prompt |= {**sampling(["erase", 0], "after"), **keeping()}
        prompt["down"] = node("LoraLoaderModelOnly", model=["erase", 0], lora_name=lora, strength_model=0.3)
        prompt |= {**weights_of(["erase", 0], "erased"), **weights_of(["down", 0], "down")}
        done = server.run(prompt)
        erased, down = (unet(next(server.file("seen").glob(f"{name}_*"))) for name in ("erased", "down"))
        changed = [name for name in erased if not torch.equal(erased[name], down[name])]
        assert changed == [f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
        old, new, lora_part = erased[changed[0]], down[changed[0]], _small_lora_difference()
        # each side is rounded to the storage dtype: to the nearest, or in fp8 by chance to one of the two neighbours
        half = 2.0 ** -{"--fp16-unet": 11, "--bf16-unet": 8, "--fp8_e4m3fn-unet": 3}[flag]
        least = 2.0**-24 if "fp8" not in flag else 2.0**-9  # between neighbours below the normal numbers
        bound = 2 * half * torch.maximum(old.abs(), new.abs()) + 2 * least
        assert ((new - (old + 0.3 * lora_part)).abs() <= bound).all()
        # of what that bound lets pass in fp8 the mean is left: the LoRA's share of the difference, over 245,760 entries
        # whose roundings are of the size of the LoRA's own at most, is known to some 1/sqrt(245,760) = 0.002
        assert abs(float((new - old).flatten() @ lora_part.flatten() / lora_part.square().sum()) - 0.3) < 0.01
        before, after = server.image(done, "before"), server.image(done, "after")
        assert before.std() > 0 and after.std() > 0 and not np.array_equal(before, after)
        again = server.run({"load": prompt["load"], **once_more(sampling(["load", 0]))}, "image sample")
        assert np.array_equal(server.image(again, "image"), before)
        dtypes = {change.dtype for change in Delta.load(server.base / done["keep"]["text"][0]).changes.values()}
        assert dtypes == {torch.bfloat16 if "bf16" in flag else torch.float16}
    finally:
        server.stop()


def test_a_comfyui_short_of_memory_trains_with_little_and_keeps_its_model(
    server: Server, start: Callable[..., Server]
) -> None:
    """--novram goes with a GPU alone; this makes ComfyUI hold its weights as it would then, on the CPU."""
    starved = start("starved", pack=STARVED)
    try:
        base = starved.run({"load": erasing()["load"], **sampling(["load", 0], "before")})
        wanted = server.run({"load": erasing()["load"], **sampling(["load", 0], "before")})
        assert np.array_equal(starved.image(base, "before"), server.image(wanted, "before"))
        lora = _small_lora(starved)
        up = node("LoraLoaderModelOnly", model=["load", 0], lora_name=lora, strength_model=0.7)
        prompt = {**erasing(model=["up", 0]), "up": up, "metrics": node("PreviewAny", source=["erase", 3])}
        done = starved.run({**prompt, **sampling(["up", 0], "before"), **sampling(["erase", 0], "after")})
        assert json.loads(done["metrics"]["text"][0])["options"]["low_vram"] is True
        assert not np.array_equal(starved.image(done, "before"), starved.image(done, "after"))
        again = starved.run({"load": prompt["load"], **once_more(sampling(["load", 0]))}, "image sample")
        assert np.array_equal(starved.image(again, "image"), starved.image(base, "before"))
    finally:
        starved.stop()


SD2_V = {  # as deep as the true SD 2.1, by one of whose last weights ComfyUI knows that a file predicts v
    "block_out_channels": (320,) * 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
PREDICTIONS = pytest.mark.parametrize(("prediction", "known"), [("epsilon", "EPS"), ("v_prediction", "V_PREDICTION")])


@PREDICTIONS
def test_sd_2_is_erased(server: Server, prediction: str, known: str) -> None:
    path = server.base / f"models/checkpoints/sd2-{prediction}.safetensors"
    changes = SD2_V if prediction == "v_prediction" else {}
    checkpoints.make(path, "sd2", size="host", prediction=prediction, unet=changes)
    first_layer = {"first layer": node("CLIPSetLastLayer", clip=["load", 1], stop_at_clip_layer=-24)}
    _is_erased(server, path, known, first_layer)  # the others are not in the file


@PREDICTIONS
def test_sdxl_is_erased(server: Server, prediction: str, known: str) -> None:
    """Its UNet is narrow; the text encoders are of true size, as ComfyUI takes no smaller ones and uses all layers."""
    path = server.base / f"models/checkpoints/sdxl-{prediction}.safetensors"
    marks = ("ztsnr",) if prediction == "v_prediction" else ()
    checkpoints.make(path, "sdxl", size="host", prediction=prediction, marks=marks)
    _is_erased(server, path, known, {})


def _is_erased(server: Server, path: Path, known: str, parts: dict[str, Any]) -> None:
    """parts: a node "first layer", whose CLIP is to be used in place of the file's."""
    clip = ["first layer", 0] if parts else ["load", 1]

    def drawn(model: list[Any], name: str) -> dict[str, Any]:
        graph = sampling(model, name)
        graph[f"{name} text"]["inputs"]["clip"] = clip
        return graph

    log = len(server.log.read_text())
    prompt = {**erasing(clip=clip, seed=80), **parts, **keeping("SalUnSaveErasedCheckpoint", ckpt_name=path.name)}
    prompt["load"] = node("CheckpointLoaderSimple", ckpt_name=path.name)
    done = server.run({**prompt, **drawn(["load", 0], "before"), **drawn(["erase", 0], "after")})
    before, after = server.image(done, "before"), server.image(done, "after")
    assert before.std() > 0 and after.std() > 0 and not np.array_equal(before, after)
    erased = server.file("checkpoints") / _name(done["keep"])
    loader = node("CheckpointLoaderSimple", ckpt_name=erased.name)
    again = server.run({"load": loader, **parts, **drawn(["load", 0], "reloaded")})
    assert np.array_equal(server.image(again, "reloaded"), after)
    types = re.findall(r"model_type (\w+)", server.log.read_text()[log:])
    assert types == [known, known], "both files are taken for models of this prediction"
    old, new = safetensors_io.tensors(path), safetensors_io.tensors(erased)
    moved = total = 0
    for (name, one), (also, other) in zip(old, new, strict=True):  # one at a time: an SDXL file is large
        assert name == also
        if name.startswith(UNET):
            moved, total = moved + int((one != other).sum()), total + one.numel()
        else:
            assert torch.equal(one, other), name
    assert 0.2 < moved / total <= 0.5
    for each in (path, erased):
        each.unlink()


def test_a_model_that_predicts_v_is_erased_as_one(server: Server, checkpoint: Path) -> None:
    """The stock ModelSamplingDiscrete makes any MODEL one: here the weights are random anyway."""
    prompt = erasing(model=["v", 0], seed=70)
    prompt["v"] = node("ModelSamplingDiscrete", model=["load", 0], sampling="v_prediction", zsnr=True)
    prompt |= {
        **keeping("SalUnSaveErasedCheckpoint", ckpt_name=SOURCE),
        "metrics": node("PreviewAny", source=["erase", 3]),
    }
    prompt |= {**sampling(["v", 0], "before"), **sampling(["erase", 0], "after")}
    done = server.run(prompt)
    assert all(np.isfinite(_values(row)).all() for row in json.loads(done["metrics"]["text"][0])["losses"])
    before, after = server.image(done, "before"), server.image(done, "after")
    assert after.std() > 0 and not np.array_equal(before, after)
    plain = server.run({**erasing(seed=70), **keeping("SalUnSaveErasedCheckpoint", ckpt_name=SOURCE)})
    one, two = (unet(server.file("checkpoints") / _name(each["keep"])) for each in (done, plain))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_10_memory_stays_over_rounds_and_the_same_seed_gives_the_same_file(start: Callable[..., Server]) -> None:
    server = start(SALUN_CACHE_SIZE="0")
    try:
        sizes = []
        for turn in range(5):
            server.run({**erasing(seed=turn), **keeping()})
            with Events(server) as events:
                number = server.queue({**erasing(seed=100 + turn, steps=500, **AT_ONCE), **keeping()})
                events.until(lambda: len(events.progress) > 3 + 8 + 10)  # samples, saliency, ten steps
                server.post("/interrupt", {})
                assert "execution_interrupted" in messages(server.wait(number, 60))
            sizes.append(_rss(server.process.pid))
        # the first rounds fill ComfyUI's own caches; from then on no more than the noise of the allocator
        assert sizes[-1] - sizes[1] < 150e6, [round(s / 1e6) for s in sizes]
        print("RSS (MB) after each round:", [round(s / 1e6) for s in sizes])
        one = _name(server.run({**erasing(seed=7), **keeping()})["keep"])
        two = _name(server.run({**erasing(seed=7, show_sensitive=True), **keeping()})["keep"])  # runs again
        assert one != two
        assert (server.file("salun") / one).read_bytes() == (server.file("salun") / two).read_bytes()
    finally:
        server.stop()


def test_the_node_does_what_the_command_line_does(server: Server, checkpoint: Path) -> None:
    """Same file, latents, prompts, seed and options: ComfyUI's UNet is other code than diffusers', so sums differ."""
    generator = torch.Generator().manual_seed(9)
    forget, retain = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for name, scaled in (("forget", forget), ("retain", retain)):
        held = {"latent_tensor": scaled / 0.18215, "latent_format_version_0": torch.tensor([])}
        safetensors_io.write(server.base / "input" / f"{name}.latent", held)
    numbers = {"steps": 3, "batch_size": 2, "lr": 1e-4, "anchor_share": 0.0, "retain_latents": 0, "resolution": 64}
    captions = "a house\na tree"
    prompt = {
        **erasing(**numbers, data=["data", 0], mask=["mask", 0]),
        "forget": node("LoadLatent", latent="forget.latent"),
        "retain": node("LoadLatent", latent="retain.latent"),
        "data": node(
            "SalUnTrainingData",
            **PARTS,
            **{"seed": 0, "retain_captions": captions},
            forget_samples=["forget", 0],
            retain_samples=["retain", 0],
        ),
        "mask": masking(data=["data", 0], batch_size=2),
        "keep mask": node("SalUnSaveMask", mask=["mask", 0], filename_prefix="same"),
        **keeping("SalUnSaveErasedCheckpoint", ckpt_name=SOURCE),
    }
    done = server.run(prompt)
    nodes_mask = Mask.load(server.base / done["keep mask"]["text"][0])
    theirs = dict(open_unet(server.file("checkpoints") / _name(done["keep"])))

    model = salun.load(str(checkpoint), device="cpu")
    options = EraseOptions(**{**numbers, "forget_latents": 2, "eval_images": 0, "seed": 0})
    plan = make_plan(model.settings, model.name, salun.Concept("a cat", anchor="a dog"), options)
    record = RunRecord(None, "test", {}, 0, "cpu")
    with record.running(), training_session(model, plan):
        own = UserLatents([forget], retain, tuple(captions.splitlines()))
        data = build_training_set(model, plan, silent, cache=Cache(Path("unused"), 0), given=own)
        run = unlearn(RunContext(model, plan, record), data)
    jaccard = nodes_mask.jaccard(run.mask)
    old, worst, far, total = model.original(), 0.0, 0, 0
    for name in run.erased:
        apart = (theirs[name].float() - run.erased[name].float()).abs()
        step = (run.erased[name].float() - old[name].float()).abs().max()
        worst, total = max(worst, float(apart.max())), total + apart.numel()
        far += int((apart > 2.0**-10 * run.erased[name].float().abs() + 0.05 * step).sum())
    print(f"Jaccard {jaccard:.6f}, largest difference {worst:.3g}, {far} of {total} weights apart")
    assert jaccard >= 0.999
    # Adam's first steps are of size lr whatever the gradient's size, so a gradient near 0 whose sign differs in its
    # last bits moves its weight the other way: at most 2·lr a step, and rarely
    assert worst <= 3 * 2 * 1e-4 + 2.0**-9
    assert far / total < 0.002


def _values(row: Any) -> list[float]:
    """The losses of a step, in either form that a history has."""
    return list(row.values()) if isinstance(row, dict) else row


# -- helpers ----------------------------------------------------------------------------------------------------------


def _name(output: dict[str, Any]) -> str:
    """The name of the file that a SalUn node saved."""
    return re.sub(r"^output/salun/", "", output["text"][0]).split(":")[0]


def _small_lora_factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(320, 2, generator=generator) * 0.1, torch.randn(2, 768, generator=generator) * 0.1


def _small_lora_difference() -> Tensor:
    up, down = _small_lora_factors()
    return up @ down


def _small_lora(server: Server) -> str:
    """A LoRA file of one layer."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = _small_lora_factors()
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
    safetensors_io.write(server.base / "models/loras/small.safetensors", tensors)
    return "small.safetensors"


def _rss(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return float(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


class Events:
    """A server's websocket: progress of SalUn Erase in order, and previews. Only what a server sends is understood.

    shown: how many previews each node with progress has sent.
    """

    def __init__(self, server: Server) -> None:
        self.progress: list[int] = []
        self.most = self.previews = 0
        self.shown: dict[str, int] = {}
        self._last = ""
        server.client = f"test-{next(_numbers)}"  # the end of an earlier one takes none from this one
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={server.client} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._rest = b""
        while b"\r\n\r\n" not in self._rest:
            self._rest += self._socket.recv(4096)
        self._rest = self._rest.partition(b"\r\n\r\n")[2]
        self._socket.settimeout(None)  # a server that computes has nothing to say for minutes
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def until(self, true: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"{self.progress[-3:]} of {self.most}"
            time.sleep(0.02)

    def _take(self, n: int) -> bytes:
        while len(self._rest) < n:
            part = self._socket.recv(65536)
            if not part:
                raise OSError("closed")
            self._rest += part
        found, self._rest = self._rest[:n], self._rest[n:]
        return found

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                first, size = struct.unpack("!BB", self._take(2))
                if size == 126:
                    (size,) = struct.unpack("!H", self._take(2))
                elif size == 127:
                    (size,) = struct.unpack("!Q", self._take(8))
                body = self._take(size)
                if first & 15 == 2:
                    self.previews += 1
                    self.shown[self._last] += 1  # a preview follows its progress
                elif first & 15 == 1:
                    message = json.loads(body)
                    if message["type"] != "progress":
                        continue
                    self._last = message["data"]["node"]
                    self.shown.setdefault(self._last, 0)
                    if self._last == "erase":
                        self.progress.append(message["data"]["value"])
                        self.most = message["data"]["max"]
