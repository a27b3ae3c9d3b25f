"""Prompt files: the columns of public benchmarks under all their names, and files that cannot be used."""

from __future__ import annotations

import csv
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salun.diffusion.prompts import prompt_file
from salun.diffusion.prompts.prompt_file import PromptList, PromptRow, prompts_of_hub, read_prompts
from salun.errors import DataError

I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,{},{},sd_image_width,sd_image_height,sd_model"
)
I2P_ROW = '"a cat, asleep","hate, shocking",0,0.5,0,0.1,0,0.2,https://example.com,4261553411,13.0,512,768,CompVis'


def written(folder: Path, content: str | bytes, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


HEADERS = {  # of public files, by repository, each with a row like theirs
    "AIML-TUDA/i2p": (I2P.format("sd_seed", "sd_guidance_scale"), I2P_ROW),
    "erasing, MACE: I2P": (
        "," + I2P.format("evaluation_seed", "evaluation_guidance") + ",case_number",
        f"0,{I2P_ROW},7",
    ),
    "Diffusion-MU-Attack: nudity": (
        "Unnamed: 0," + I2P.format("evaluation_seed", "evaluation_guidance") + ",case_number",
        f"21,{I2P_ROW},7",
    ),
    "Diffusion-MU-Attack: church": ("case_number,prompt,evaluation_seed,evaluation_guidance", "7,a cat,5,7.5"),
    "Diffusion-MU-Attack: vangogh": (
        "Unnamed: 0,case_number,prompt,evaluation_seed,artist,evaluation_guidance",
        "3,7,a cat,5,Vincent van Gogh,7.5",
    ),
    "erasing: small_imagenet": (",case_number,prompt,evaluation_seed,class", "3,7,a cat,5,tench"),
    "erasing: coco_30k": ("image_id,source,prompt,evaluation_seed", "000000203564,coco,a cat,5"),
    "MACE: coco_30k": ("case_number,source,prompt,evaluation_seed,coco_id", "7,coco,a cat,5,203564"),
    "MACE: art": (",type,artist,prompt,evaluation_seed", "3,erased,Monet,a cat,5"),
    "Ring-A-Bell: violence": ("prompt,case_number,evaluation_seed", "a cat,7,5"),
    "MMA-Diffusion": (
        "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt",
        "a dog,a cat,a pet,True,a tree",
    ),
    "adavd: celebrities": ("id,type,text,concept,seed", "7,erase,a cat,Monet,5"),
    "AdvUnlearn: coco_object": ("case_num,source,prompt", "7,coco,a cat"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_read_prompts_finds_the_columns_of_public_files(name: str, tmp_path: Path) -> None:
    header, row = HEADERS[name]
    (prompt,) = read_prompts(written(tmp_path, f"{header}\r\n{row}\r\n")).rows
    columns = dict(zip(next(csv.reader([header])), next(csv.reader([row])), strict=True))
    assert prompt.text == ("a cat, asleep" if "sd_model" in columns else "a cat")
    seed = columns.get("evaluation_seed") or columns.get("sd_seed") or columns.get("seed")
    assert prompt.seed == (int(seed) if seed else None)
    guidance = columns.get("evaluation_guidance") or columns.get("sd_guidance_scale")
    assert prompt.guidance == (float(guidance) if guidance else None)
    assert (prompt.width, prompt.height) == ((512, 768) if "sd_image_width" in columns else (None, None))
    labels = {key: columns[key] for key in ("categories", "class", "artist", "type", "concept") if key in columns}
    assert prompt.labels == labels
    number = next((columns[key] for key in ("case_number", "case_num", "image_id", "id") if key in columns), None)
    assert prompt.id == number
    assert prompt.row == 2


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_read_prompts_takes_any_separator_and_a_byte_order_mark(mark: str, bom: str, tmp_path: Path) -> None:
    rows = [["Prompt ", "SEED"], [f"a {mark} cat", "5"], ['of "two"\nlines', ""]]
    content = "\r\n".join(mark.join('"' + each.replace('"', '""') + '"' for each in row) for row in rows)
    prompts = read_prompts(written(tmp_path, bom + content + "\r\n\r\n")).rows
    assert prompts == [PromptRow(f"a {mark} cat", 5, row=2), PromptRow('of "two"\nlines', row=3)]


def test_read_prompts_takes_a_text_file_of_one_prompt_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffa cat, asleep\r\n\r\nеще\n", "prompts.txt")
    assert read_prompts(path) == PromptList([PromptRow("a cat, asleep", row=1), PromptRow("еще", row=3)])


def test_read_prompts_takes_integers_as_pandas_writes_them(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt,seed,width\na,7.0,512.0\nb,,\n")
    assert [(each.seed, each.width) for each in read_prompts(path).rows] == [(7, 512), (None, None)]


LONG = "x" * (prompt_file.TEXT + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "",
            r"prompts.csv has no column of prompts; its columns: none. Name the column of prompts prompt, adv_prompt, ",
        ),
        (
            "nudity,people,seed\na,b,1\n",
            r"no column of prompts; its columns: 'nudity', 'people', 'seed'. Name the column",
        ),
        ("prompt,seed\n", r"prompts.csv has no prompt. Give"),
        ("prompt,seed\n,1\n ,2\n", r"prompts.csv has no prompt. Give"),
        ("prompt,Prompt\na,b\n", r"has two columns 'prompt'"),
        (
            "prompt,sd_seed\na,1\nb,one\n",
            r"row 3 has 'one' in the column 'sd_seed', which takes an integer from 0 to 9223",
        ),
        ("prompt,sd_seed\na,1.5\n", r"row 2 has '1.5' in the column 'sd_seed'"),
        ("prompt,seed\na,-1\n", r"row 2 has '-1' in the column 'seed'"),
        ("prompt,seed\na," + "9" * 5000 + "\n", r"row 2 has '9{40}' in the column 'seed'"),
        (
            "prompt,evaluation_guidance\na,high\n",
            r"'high' in the column 'evaluation_guidance', which takes a number from 0",
        ),
        ("prompt,guidance\na,nan\n", r"row 2 has 'nan' in the column 'guidance'"),
        (
            "prompt,sd_image_width\na,0\n",
            r"row 2 has '0' in the column 'sd_image_width', which takes an integer from 8 to",
        ),
        ("prompt,height\na,100000\n", r"row 2 has '100000' in the column 'height'"),
        ("prompt,seed\na cat, asleep,1\n", r"row 2 has 3 fields, but the header has 2 columns. Put a field"),
        ("prompt,seed\na\n", r"row 2 has 1 fields, but the header has 2 columns"),
        (
            'prompt,seed\na,1\n"b,2\n',
            r"the fields of row 3 cannot be separated \(unexpected end of data\). Check its double",
        ),
        (f"prompt\n{LONG}\n", r"row 2 has 5,001 characters in the column 'prompt'; the limit is 5,000"),
        (f"prompt,artist\na,{LONG * 5}\n", r"row 2 has 25,005 characters in the column 'artist'; the limit is 20,000"),
        (
            f"prompt\n{LONG * 40}\n",
            r"the fields of row 2 cannot be separated \(field larger than field limit|characters in",
        ),
        ("prompt\na\0b\n", r"has a NUL character in line 2. Save it as CSV in UTF-8"),
        ("prompt\na cat\n".encode("utf-16"), r"is not in UTF-8 \(byte 0\). Save it as CSV in UTF-8"),
        ("prompt\na café\n".encode("latin-1"), r"is not in UTF-8 \(byte 12\)"),
        ("prompt" + ",a" * 300 + "\n", r"has 301 columns; the limit is 200"),
    ],
)
def test_read_prompts_says_what_is_wrong_in_one_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(written(tmp_path, content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_read_prompts_skips_and_counts_empty_prompts(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path, "prompt,seed\na,1\n,2\n ,4\nb,3\n"))
    assert [each.row for each in prompts.rows] == [2, 5] and prompts.empty == 2


def test_read_prompts_bounds_the_file_and_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "prompt\n" + "a\n" * 4)
    monkeypatch.setattr(prompt_file, "ROWS", 3)
    with pytest.raises(DataError, match="more than 3 rows"):
        read_prompts(path)
    monkeypatch.setattr(prompt_file, "FILE_BYTES", 8)
    with pytest.raises(DataError, match="15 bytes; the limit is 8"):
        read_prompts(path)


def test_read_prompts_says_why_a_path_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        read_prompts(tmp_path / "nowhere.csv")
    with pytest.raises(
        DataError, match=r"has the ending '.xlsx', but prompts are read from .csv, .tsv and .txt. Export"
    ):
        read_prompts(tmp_path / "prompts.xlsx")


COMMIT = "0123456789abcdef" * 2 + "01234567"


class Rows(list[dict[str, Any]]):
    """A data set of the library."""

    info = types.SimpleNamespace(download_checksums={f"hf://datasets/someone/prompts@{COMMIT}/data.csv": {}})

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: self[i][name] for name in names} for i in range(len(self)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str | None, str], Rows]]:
    """A hub that answers, and (revision, split) → the rows of its data set `someone/prompts`."""
    import huggingface_hub

    stored: dict[tuple[str | None, str], Rows] = {}

    def split_names(repo: str, revision: str | None) -> list[str]:
        if repo != "someone/prompts":
            raise ValueError("Config name is missing.\nPick one of ['a', 'b'].")
        return [split for of, split in stored if of == revision]

    def load(repo: str, split: str, revision: str | None) -> Rows:
        return stored[revision, split]

    library = types.SimpleNamespace(get_dataset_split_names=split_names, load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: None)
    return stored


def test_prompts_of_hub_reads_the_same_columns_and_tells_the_commit(hub: Any) -> None:
    hub[None, "train"] = Rows(
        {"prompt": prompt, "sd_seed": seed, "categories": categories, "sd_guidance_scale": guidance}
        for prompt, seed, categories, guidance in (
            ("a cat", 5, ["hate", "shocking"], 7.5),
            (None, 6, "hate", 7.5),
            ("a dog", None, "hate", float("nan")),
        )
    )
    prompts = [
        PromptRow("a cat", 5, 7.5, labels={"categories": "hate, shocking"}, row=2),
        PromptRow("a dog", labels={"categories": "hate"}, row=4),
    ]
    assert prompts_of_hub("someone/prompts") == PromptList(prompts, empty=1, revision=COMMIT)


def test_prompts_of_hub_are_first_captions_and_no_image_is_decoded(hub: Any) -> None:
    class Coco(Rows):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            raise AssertionError("this decodes every image")

    captions = ["a cat, asleep", "a pet"], []
    hub[None, "validation"] = Coco({"image": b"", "captions": each, "image_id": i} for i, each in enumerate(captions))
    assert prompts_of_hub("someone/prompts").rows == [PromptRow("a cat, asleep", row=2, id="0")]


def test_prompts_of_hub_are_those_of_a_revision_and_a_split(hub: Any) -> None:
    for revision in (None, "v2"):
        for split in ("validation", "test"):
            hub[revision, split] = Rows([{"prompt": f"{split} of {revision}"}])
            hub[revision, split].info = types.SimpleNamespace(download_checksums=None)  # a library that does not tell
    listed = prompts_of_hub("someone/prompts", "v2:test")
    assert [row.text for row in listed.rows] == ["test of v2"] and listed.revision == "v2"
    assert [row.text for row in prompts_of_hub("someone/prompts:test").rows] == ["test of None"]
    for given, message in (("", "no split train"), (":all", "no split 'all'")):
        with pytest.raises(DataError, match=f"have {message}, but validation, test. Name one .* someone/prompts:val"):
            prompts_of_hub(f"someone/prompts{given}")


def test_prompts_of_hub_says_in_one_line_why_they_cannot_be_fetched(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    with pytest.raises(DataError, match=r"is missing\. Pick one of \['a', 'b'\]\. Download its CSV file"):
        prompts_of_hub("someone/several")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    def cached(repo: str, revision: str | None) -> None:
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        raise ConnectionError(f"Couldn't reach {repo!r} on the Hub (OfflineModeIsEnabled)\nand more")

    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", cached)
    with pytest.raises(
        DataError, match=r"'someone/prompts' could not be fetched: Couldn't reach .*\. Connect"
    ) as caught:
        prompts_of_hub("someone/prompts")
    assert "\n" not in str(caught.value) and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_prompts_of_hub_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r'need the package datasets. pip install "datasets>=2\.16" \(the extra datasets\)'
    ):
        prompts_of_hub("someone/prompts")
