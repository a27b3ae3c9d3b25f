"""Strangers' files: whatever is in them, every reader ends in an answer or one error of ours, soon and with few bytes.

A small checkpoint, a mask and a delta are damaged at random: some in their raw bytes, others with knowledge of what the
bytes mean, so that the damage gets past the first checks. All of it follows from `SEED`. More cases, or one case alone,
are read by

    python -m tests.test_fuzz FOLDER --cases 100000
    python -m tests.test_fuzz FOLDER --case 1234

and with `--deltas` given to what writes: apply, undo and export, of a damaged delta on its base, and of a sound one on
a damaged base.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from salun.checkpoints import keymap, safetensors_io
from salun.checkpoints.families.sd2 import GUESS_KEY
from salun.checkpoints.single_file import CheckpointContents
from salun.delta import commands as deltas
from salun.delta.delta import Delta
from salun.diagnostics.inspect import inspect
from salun.errors import SalunError
from salun.masking.mask import Mask
from tools import checkpoints

SEED = 0
CASES = 4_000
DELTA_CASES = 400
SECONDS = 5.0  # of CPU time, for one file
MEMORY = 1_000_000_000  # bytes, of which diffusers and torch take half before anything is read

# -- JSON that may be wrong -------------------------------------------------------------------------------------------


class Raw(str):
    """Text to be put into JSON as it is."""


class Pairs(list[Any]):
    """A JSON object that may hold a name twice: [name, value] lists."""


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def written(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{written(value)}" for name, value in node) + "}"
    return "[" + ",".join(map(written, node)) + "]" if isinstance(node, list) else json.dumps(node)


# -- what to put there ------------------------------------------------------------------------------------------------

NUMBERS = [-1, 0, 1, 2, 255, 2**31, 2**32 + 1, 2**53 + 1, 2**62, 2**63, 2**64, 10**300, 10**4299, 0.5, -0.0, 1e308]
PLAIN = """
    C64 F99 f32 v epsilon __metadata__ format shapes tensors salun-mask-1 salun-mask-2 salun-delta-1 v_pred ztsnr
    lora_unet_x.alpha down_blocks.0.x down_blocks up_blocks.0 conv_in.weight model_ema.decay first_stage_model.x
    first_stage_model.decoder.up.99999999.block.0.x conditioner.embedders.1.model.x
"""
UNET = """
    input_blocks.0.0.weight out.2.weight output_blocks.0.0.conv.weight input_blocks.00.0.op.weight label_emb.0.0.weight
    input_blocks.٣.1.transformer_blocks.0.attn2.to_k.weight middle_block.1.proj_in.weight
"""
WORDS = [*safetensors_io.DTYPES, *PLAIN.split(), *(keymap.UNET + name for name in UNET.split()), GUESS_KEY, keymap.UNET]
WORDS += ["", " ", "\0", "\x1b[31m\r\n", "../../etc/passwd", "\ud800", "é" * 50, "9" * 5000, "x" * 30_000]
WORDS += [f"{keymap.UNET}input_blocks.{'9' * 5000}.0.in_layers.0.weight"]
WRONG: list[Any] = [None, True, False, [], Pairs(), [[]], Pairs([["", 0]]), [-1], [0], [1, 2], ["1"], [2**62, 2**62]]
WRONG += [
    Raw(text) for text in ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "{", "'x'", "\\", '"\\ud800"', ""]
]
WRONG += [Raw("[" * depth + "]" * depth) for depth in (20, 990, 100_000)]
WRONG += [Raw('{"a":' * depth + "0" + "}" * depth) for depth in (20, 990)]
WRONG += [Raw(f"[{','.join(numbers)}]") for numbers in (["1"] * 20_000, ["9" * 4200] * 200)]


def slots(node: Any) -> list[tuple[list[Any], int]]:
    """Every place below a node that holds a value: (list, index)."""
    found = []
    for i, item in enumerate(node if isinstance(node, list) else ()):
        holder, at = (item, 1) if isinstance(node, Pairs) else (node, i)
        found += [(holder, at), *slots(holder[at])]
    return found


def meddle(tree: Any, chance: random.Random) -> Any:
    """The JSON value with one change somewhere in it. JSON inside of strings is looked into."""
    whole = [tree]
    places = slots(whole)
    holder, i = chance.choice(places)
    value, kind = holder[i], chance.randrange(8)
    if isinstance(value, str) and value.startswith(("{", "[")) and chance.random() < 0.9:
        holder[i] = written(meddle(parsed(value), chance))
    elif kind == 0:
        holder[i] = chance.choice(WRONG)
    elif kind == 1:
        holder[i] = chance.choice(NUMBERS)
    elif kind == 2:
        holder[i] = chance.choice(WORDS)
    elif kind == 3:
        other, j = chance.choice(places)
        holder[i], other[j] = other[j], holder[i]
    elif isinstance(value, int):
        holder[i] = chance.choice([-value, value + 1, value - 1, value * 2, Raw(f"{value}.0"), str(value), bool(value)])
    elif isinstance(value, list) and value:
        at = chance.randrange(len(value))
        if kind < 6 and isinstance(value, Pairs):
            value[at] = [chance.choice(WORDS), value[at][1]]
        elif kind == 6:
            value.insert(chance.randrange(len(value)), value[at])
        else:
            del value[at]
    return whole[0]


def reshape(header: Pairs, chance: random.Random) -> Pairs:
    """The header with another shape, dtype or name for some tensor, which may well be allowed."""
    entry = chance.choice(header)
    own = dict(entry[1])
    shape = own.get("shape")
    if isinstance(shape, list) and shape:
        n = prod(shape)
        others = [[], shape[::-1], [n], [1, *shape], [*shape, 1], [0, *shape], shape[:-1], [*shape[:-1], 3], [1] * 17]
        own["shape"] = chance.choice([shape, *others])
        own["dtype"] = chance.choice([own["dtype"], own["dtype"], *safetensors_io.DTYPES])
        entry[1] = Pairs([key, value] for key, value in own.items())
        if chance.random() < 0.3:
            entry[0] = chance.choice([*WORDS, *(name for name, _ in header)])
    return header


# -- whole files ------------------------------------------------------------------------------------------------------


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and body of a sound file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def laid_out(header: Pairs, body: bytes) -> bytes:
    """A body that fits the header, whose offsets are set, as far as they can be."""
    position = 0
    for _, item in header:
        own = dict(item) if isinstance(item, Pairs) else {}
        dtype, shape = own.get("dtype"), own.get("shape")
        if not isinstance(dtype, str) or dtype not in safetensors_io.DTYPES or not safetensors_io.is_shape(shape):
            continue
        size = prod(shape) * safetensors_io.DTYPES[dtype].itemsize
        if size < 1 << 20:
            own["data_offsets"] = [position, position + size]
            item[:] = [[key, value] for key, value in own.items()]
            position += size
    return (body * (position // max(len(body), 1) + 1))[:position].ljust(position, b"\0")


def flip(content: bytes, start: int, end: int, chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        if end > start:
            found[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
    return bytes(found)


def damaged_bytes(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A change of the raw bytes."""
    header, body = split(content)
    start = 8 + len(header)
    kind = chance.randrange(12)
    if kind < 2:
        return flip(content, 0, 8, chance)
    if kind < 5:
        return flip(content, 8, start, chance)
    if kind == 5:
        return flip(content, start, len(content), chance)
    if kind == 6:
        return content[: chance.choice([chance.randrange(len(content)), chance.randrange(start), chance.randrange(9)])]
    if kind == 7:
        return content + chance.choice([b"\0", chance.randbytes(9), content])
    if kind == 8:
        length = chance.choice([0, 1, 2, len(header) - 1, len(header) + 1, len(content), 1 << 30, (1 << 64) - 1])
        return length.to_bytes(8, "little") + header + body
    if kind == 9:
        at = chance.randrange(len(header))
        put = chance.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b'"', b"\\", b"{", b"]", b",", b"-", b"e9"])
        return joined(header[:at] + put + header[at + chance.randrange(2) :], body)
    if kind == 10:
        return joined(split(chance.choice(others))[0], body)
    noise = chance.choice([b"\xff", b"\0", b"\x01", chance.randbytes(64)])
    return joined(header, (noise * len(body))[: len(body)])


def damaged_meaning(content: bytes, chance: random.Random) -> bytes:
    """A change of what the header says; mostly with a body that fits again."""
    header, body = split(content)
    tree = parsed(header.decode("utf-8"))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        tree = (reshape if chance.random() < 0.4 else meddle)(tree, chance)
    if chance.random() < 0.1:
        chance.shuffle(tree)
    if chance.random() < 0.7:
        body = laid_out(tree, body)
    return joined(written(tree).encode("utf-8", "surrogatepass"), body)


def case(number: int, sources: list[bytes]) -> bytes:
    """The damaged file of this number."""
    chance = random.Random(f"{SEED} {number}")
    content = sources[number % len(sources)]
    for _ in range(chance.choice([1, 1, 1, 2])):
        meaning = chance.random() < 0.65
        try:
            content = damaged_meaning(content, chance) if meaning else damaged_bytes(content, sources, chance)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            content = damaged_bytes(sources[0], sources, chance)  # was too damaged already to be understood
    return content


# -- readers ----------------------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    for _ in safetensors_io.tensors(path, safetensors_io.read_header(path).names):
        pass


def read_checkpoint(path: Path) -> None:
    found = CheckpointContents.of(path)
    _ = found.prediction, found.zero_snr, dict(found.unet)


def read_mask(path: Path) -> None:
    mask = Mask.load(path)
    _ = mask.density, mask.densities(), mask & mask


def read_delta(path: Path) -> None:
    _ = Delta.load(path).changed


READERS: dict[str, Callable[[Path], object]] = {
    "tensors": read_all,
    "checkpoint": read_checkpoint,
    "mask": read_mask,
    "delta": read_delta,
    "inspect": lambda path: json.dumps(inspect(str(path))),
}


def sources(folder: Path) -> list[bytes]:
    """Sound files to damage: a checkpoint of a few tensors, a mask and a delta; now and then a checkpoint with all."""
    whole = small_checkpoint(folder / "whole")
    ends = (
        ".input_blocks.0.0.weight",
        ".out.2.weight",
        ".attn2.to_k.weight",
        ".norm1.bias",
        "time_embed.0.bias",
        "betas",
    )
    few = {name: tensor for name, tensor in safetensors_io.tensors(whole) if name.endswith(ends)}
    safetensors_io.write(folder / "few", {**few, "model_ema.decay": torch.tensor(0.9), "v_pred": torch.empty(0)}, TOLD)
    generator = torch.Generator().manual_seed(SEED)
    base = {f"down_blocks.{i}.w": torch.rand(i + 3, 5, generator=generator) for i in range(4)}
    base |= {"conv_in.bias": torch.rand(9, generator=generator), "mid_block.x": torch.rand(70, 9, generator=generator)}
    Mask.from_scores(base, 0.5).save(folder / "mask")
    new = {name: w + (torch.rand(w.shape, generator=generator) < 0.5) for name, w in base.items()}
    new["mid_block.x"] = base["mid_block.x"].clone()
    new["mid_block.x"][3, 3] = 1.5  # one entry of many, which a delta may keep in another way
    Delta.between(base, new, {"salun.concept": "circle"}).save(folder / "delta")
    return [(folder / name).read_bytes() for name in ["few", "mask", "delta"] * 20 + ["whole"]]


TOLD = {"modelspec.prediction_type": "v", "salun.concept": "circle"}


def small_checkpoint(path: Path) -> Path:
    """A Stable Diffusion 1 of one level, without VAE and text encoder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    one_level = {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": 8,
    }
    return checkpoints.make(path, "sd1", vae=False, text=False, unet=one_level, metadata=TOLD)


def attack(folder: Path, numbers: range) -> dict[str, Any]:
    """Give the damaged files to every reader. Gives failures, and how often each reader understood one."""
    files, path = sources(folder), folder / "stranger.safetensors"
    understood: Counter[str] = Counter()
    failures, slowest = [], 0.0
    for number in numbers:
        path.write_bytes(case(number, files))
        (folder / "number").write_text(str(number), encoding="utf-8")  # for a case that never ends
        for name, reader in READERS.items():
            began = time.process_time()
            try:
                reader(path)
                understood[name] += 1
            except SalunError as error:
                if str(path) not in str(error) or len(str(error)) > 5000:
                    failures.append(f"case {number}, {name}: {len(str(error))} letters: {str(error)[:300]!r}")
            except Exception:
                failures.append(f"case {number}, {name}: {traceback.format_exc()[-1500:]}")
            took = time.process_time() - began
            slowest = max(slowest, took)
            if took > SECONDS:
                failures.append(f"case {number}, {name}: {took:.1f} s")
    return {"failures": failures, "understood": understood, "slowest": slowest, "memory": peak_memory()}


def attack_deltas(folder: Path, numbers: range) -> dict[str, Any]:
    """Give damaged deltas and damaged models to the commands that write. Gives failures, and how often each wrote."""
    base = small_checkpoint(folder / "base.safetensors")
    old = dict(safetensors_io.tensors(base))
    moved = {name: w + 0.5 if name.endswith(".attn2.to_k.weight") else w for name, w in old.items()}
    moved["model.diffusion_model.out.2.bias"] = old["model.diffusion_model.out.2.bias"] + 1
    erased, delta = folder / "erased.safetensors", folder / "sound.salun.safetensors"
    safetensors_io.write(erased, moved, TOLD)
    deltas.extract(str(base), str(erased), str(delta))
    files = [delta.read_bytes(), delta.read_bytes(), base.read_bytes()]
    given, out = folder / "given", folder / "out.safetensors"
    lora, diff = folder / "out.lora.safetensors", folder / "out.diff.safetensors"
    wrote: Counter[str] = Counter()
    failures, slowest = [], 0.0
    for number in numbers:
        bad = given.with_suffix(".salun.safetensors" if number % 3 < 2 else ".safetensors")
        bad.write_bytes(case(number, files))
        (folder / "number").write_text(str(number), encoding="utf-8")
        layer, model, changed = (bad, base, erased) if number % 3 < 2 else (delta, bad, bad)
        commands: dict[str, Callable[[], object]] = {
            "apply": lambda layer=layer, model=model: deltas.apply(str(model), str(layer), str(out)),
            "a part": lambda layer=layer, model=model: deltas.apply(
                str(model), str(layer), str(out), 0.5, fine_tune_of_base=str(base)
            ),
            "undo": lambda layer=layer, changed=changed: deltas.undo(str(changed), str(layer), str(out)),
            "low rank": lambda layer=layer, model=model: deltas.export(str(layer), str(model), str(lora), rank=1),
            "full": lambda layer=layer, model=model: deltas.export(str(layer), str(model), str(diff)),
        }
        for name, command in commands.items():
            began = time.process_time()
            try:
                command()
                wrote[name] += 1
            except SalunError as error:
                if len(str(error)) > 5000:
                    failures.append(f"case {number}, {name}: {len(str(error))} letters: {str(error)[:300]!r}")
                if left := [one.name for one in folder.iterdir() if "out." in one.name]:
                    failures.append(f"case {number}, {name}: left {left}")
            except Exception:
                failures.append(f"case {number}, {name}: {traceback.format_exc()[-1500:]}")
            took = time.process_time() - began
            slowest = max(slowest, took)
            if took > SECONDS:
                failures.append(f"case {number}, {name}: {took:.1f} s")
            for made in (out, lora, diff):
                made.unlink(missing_ok=True)
    return {"failures": failures, "wrote": wrote, "slowest": slowest, "memory": peak_memory()}


def peak_memory() -> int:
    """Bytes. Linux's own count: getrusage's begins with what the parent process had."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(folder: Path, *options: str) -> dict[str, Any]:
    """What `main` finds in a process of its own."""
    command = [sys.executable, "-m", "tests.test_fuzz", str(folder), *options]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"case {(folder / 'number').read_text(encoding='utf-8')} did not end")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_no_damage_brings_a_reader_down(tmp_path: Path) -> None:
    found = child(tmp_path)
    assert not found["failures"], "\n".join([f"{len(found['failures'])} failures", *found["failures"][:10]])
    assert found["memory"] < MEMORY
    for reader in READERS:  # the damage is neither always too coarse nor always without effect
        assert CASES / 100 < found["understood"][reader] < CASES * 0.6, found["understood"]


@pytest.mark.slow
def test_no_damage_brings_a_command_down_or_leaves_a_file(tmp_path: Path) -> None:
    found = child(tmp_path, "--deltas")
    assert not found["failures"], "\n".join([f"{len(found['failures'])} failures", *found["failures"][:10]])
    assert found["memory"] < MEMORY
    for command in ("apply", "a part", "undo", "low rank", "full"):
        assert 0 < found["wrote"][command] < DELTA_CASES * 0.6, found["wrote"]


@pytest.mark.slow
def test_no_header_takes_a_gigabyte(tmp_path: Path) -> None:
    """The longest header that is read at all, of what takes most memory when parsed."""
    limit, deep = 12 * 1024 * 1024, b"[" * 400 + b"]" * 400
    names = []
    for item in (b'{"a":0}', b"[[]]", deep, b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'):
        parts, size = [], 1
        while size < limit - 2000:
            parts.append(b'"%d":%b' % (len(parts), item))
            size += len(parts[-1]) + 1
        names.append(f"{len(names)}.safetensors")
        (tmp_path / names[-1]).write_bytes(joined((b"{" + b",".join(parts) + b"}").ljust(limit), b""))
    found = child(tmp_path, "--read", *names)
    assert found["memory"] < MEMORY
    assert len(found["seconds"]) == 4 and max(found["seconds"]) < 2 * SECONDS


def main() -> None:
    """The child process: all cases, one case, or files that are there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", type=int)
    parser.add_argument("--deltas", action="store_true")
    parser.add_argument("--cases", type=int)
    parser.add_argument("--read", nargs="*", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.read:
        seconds = []
        for name in given.read:
            began = time.process_time()
            try:
                safetensors_io.read_header(given.folder / name)
            except SalunError as error:
                print(error, file=sys.stderr)
            seconds.append(time.process_time() - began)
        print(json.dumps({"memory": peak_memory(), "seconds": seconds}))
        return
    number, cases = given.case, given.cases or (DELTA_CASES if given.deltas else CASES)
    numbers = range(cases) if number is None else range(number, number + 1)
    print(json.dumps((attack_deltas if given.deltas else attack)(given.folder, numbers)))


if __name__ == "__main__":
    main()
