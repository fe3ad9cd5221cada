"""``diffalign score``: every kind of source, a table that is right, and a run that resumes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import urllib3
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from diffalign import score_images
from diffalign.cli import main
from diffalign.commands import score as module
from diffalign.commands.score import ScoreConfig, score_files
from diffalign.rewards import FunctionReward, as_images, get_reward
from diffalign.rewards.remote import RemoteReward
from diffalign.rewards.support.http_client import HTTPClient
from diffalign.rollout.scoring import RewardWarning
from tests.rewards import tiny_checkpoints

SIZES = {"a": (8, 8), "b": (8, 8), "c": (12, 6), "d": (8, 8)}


def picture(name):
    rng = np.random.default_rng(ord(name))
    width, height = SIZES[name]
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for name in SIZES:
        picture(name).save(place / f"{name}.png")
    return place


def kilobytes(name):
    image = torch.from_numpy(np.array(picture(name))).permute(2, 0, 1)[None] / 255
    return get_reward("jpeg_incompressibility")(image, [""], [{}]).item()


def config(*images, **fields):
    fields = {"prompt": "", "rewards": ("jpeg_incompressibility",), **fields}
    return ScoreConfig(images=tuple(map(str, images)), **fields)


def values(rows):
    return {Path(row["image"]).stem: row["rewards"]["jpeg_incompressibility"] for row in rows}


def test_a_folder_gives_a_table_csv_and_json(folder, tmp_path, capsys):
    command = ["score", str(folder), "--rewards", "jpeg_incompressibility", "--prompt", "x", "--batch_size", "2"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    wanted = {name: kilobytes(name) for name in SIZES}
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert [Path(row["image"]).stem for row in rows] == list(SIZES), "in the order of the pictures"
    for row in rows:
        assert float(row["jpeg_incompressibility"]) == pytest.approx(wanted[Path(row["image"]).stem])
        assert row["prompt"] == "x"
    found = json.loads((tmp_path / "out/summary.json").read_text())
    figures = found["rewards"]["jpeg_incompressibility"]
    assert found["pictures"] == figures["count"] == 4
    assert figures["mean"] == pytest.approx(np.mean(list(wanted.values())))
    assert figures["std"] == pytest.approx(np.std(list(wanted.values())))
    assert (figures["min"], figures["max"]) == pytest.approx((min(wanted.values()), max(wanted.values())))
    assert "| jpeg_incompressibility | 4 |" in capsys.readouterr().out


def test_parquet_json_lines_and_single_files_give_the_same(folder, tmp_path):
    rows = {"image": [str(folder / f"{name}.png") for name in SIZES], "caption": list(SIZES)}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "table.parquet")
    raw = {"jpg_0": [(folder / f"{name}.png").read_bytes() for name in SIZES], "caption": list(SIZES)}
    Dataset.from_dict(raw).to_parquet(tmp_path / "pick.parquet")
    with (folder / "list.jsonl").open("w") as file:
        for name in SIZES:
            file.write(json.dumps({"image": f"{name}.png", "text": name, "more": 1}) + "\n")
    wanted = pytest.approx([kilobytes(name) for name in SIZES])
    sources = [[tmp_path / "table.parquet"], [tmp_path / "pick.parquet"], [folder / "list.jsonl"]]
    for i, source in enumerate([*sources, [folder / f"{name}.png" for name in SIZES]]):
        prompt = None if i < 3 else ""
        rows = score_files(config(*source, prompt=prompt, output_dir=tmp_path / f"out{i}"))
        assert [row["rewards"]["jpeg_incompressibility"] for row in rows] == wanted
        assert [row["prompt"] for row in rows] == (list(SIZES) if i < 3 else [""] * 4)


def test_prompts_come_from_a_file_from_metadata_or_from_beside_the_picture(folder, tmp_path):
    seen = []

    def spy(images, prompts, metadata):
        seen.extend(zip(prompts, [dict(m) for m in metadata], strict=True))
        return torch.zeros(len(prompts))

    (tmp_path / "spy.py").write_text("import sys\nspy = sys.modules['spied'].spy\n")
    sys.modules["spied"] = type(sys)("spied")
    sys.modules["spied"].spy = spy
    options = {"rewards": (f"{tmp_path}/spy.py:spy",), "allow_reward_code": True, "batch_size": 1, "prompt": None}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": n, "k": n}) + "\n" for n in "wxyz"))
    score_files(config(folder, prompts=tmp_path / "prompts.jsonl", output_dir=tmp_path / "1", **options))
    assert seen == [(name, {"k": name}) for name in "wxyz"]
    seen.clear()
    for name in SIZES:
        (folder / f"{name}.txt").write_text(f"beside {name}\n")
    score_files(config(folder, output_dir=tmp_path / "2", **options))
    assert seen == [(f"beside {name}", {}) for name in SIZES]
    seen.clear()
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "listed", "k": 2}\n')
    score_files(config(folder, output_dir=tmp_path / "3", **options))
    assert seen == [("listed", {"k": 2})]


def test_broken_pictures_are_named_and_skipped(folder, tmp_path, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    rows = score_files(config(folder, output_dir=tmp_path / "out"))
    assert ["error" in row for row in rows] == [False, False, True, False, False]
    assert values([row for row in rows if "rewards" in row]) == pytest.approx({n: kilobytes(n) for n in SIZES})
    printed = capsys.readouterr().out
    assert "bad.png cannot be read as a picture" in printed
    assert "1 of 5 pictures cannot be read" in printed
    picture("a").save(folder / "bad.png")
    rows = score_files(config(folder, output_dir=tmp_path / "out"))
    assert values(rows)["bad"] == pytest.approx(kilobytes("a")), "a picture that was repaired is scored"


def test_an_interrupted_run_resumes(folder, tmp_path, monkeypatch):
    scored = []
    real = module._score

    def stops(rewards, batch, images):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.extend(item.name for item in batch)
        return real(rewards, batch, images)

    monkeypatch.setattr(module, "_score", stops)
    settings = config(folder, batch_size=1, output_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        score_files(settings)
    with (tmp_path / "out/scores.jsonl").open("a") as file:
        file.write('{"image": "cut sh')
    scored.append("of the first run")
    rows = score_files(settings)
    assert len(scored) == 5, "each picture was scored once"
    assert values(rows) == pytest.approx({name: kilobytes(name) for name in SIZES})
    with pytest.raises(ValueError, match=r"holds results of other settings; changed: rewards .*another output_dir"):
        score_files(config(folder, output_dir=tmp_path / "out", rewards=("jpeg_compressibility",)))


def test_score_images_takes_anything_of_any_size(folder):
    mixed = [picture("a"), folder / "b.png", np.array(picture("c")), str(folder / "d.png")]
    found = score_images(mixed, "a prompt", ["jpeg_incompressibility", get_reward("jpeg_compressibility")])
    wanted = torch.tensor([kilobytes(name) for name in SIZES])
    torch.testing.assert_close(found["jpeg_incompressibility"], wanted)
    torch.testing.assert_close(found["jpeg_compressibility"], -wanted)
    torch.testing.assert_close(
        score_images(mixed[0], "", "jpeg_incompressibility")["jpeg_incompressibility"], wanted[:1]
    )
    assert score_images([], [], "jpeg_incompressibility")["jpeg_incompressibility"].shape == (0,)
    with pytest.raises(FileNotFoundError, match="no picture at"):
        score_images(["missing.png"], "", "jpeg_incompressibility")


def test_score_images_returns_extra_values_of_a_reward(folder):
    pair = FunctionReward("pair", lambda i, p, m: (i.mean((1, 2, 3)), {"doubt": i[:, 0].mean((1, 2)), "map": i}))
    mixed = [folder / f"{name}.png" for name in SIZES]
    found = score_images(mixed, "x", {"one": pair, "two": pair, "size": "jpeg_incompressibility"})
    assert list(found) == ["one", "two", "size", "one/doubt", "two/doubt"]
    torch.testing.assert_close(found["one/doubt"], torch.stack([as_images(path)[0, 0].mean() for path in mixed]))
    with pytest.raises(ValueError, match=r"share a name: \['pair', 'pair'\]; pass a mapping"):
        score_images(mixed, "x", [pair, pair])
    for prompts, metadata in ((["x"], None), ("x", [{}]), (["x"] * 5, None)):
        with pytest.raises(ValueError, match=r"4 images, \d prompts, \d entries of metadata: pass one each"):
            score_images(mixed, prompts, pair, metadata)


def test_a_reward_that_ranks_is_no_score_of_a_picture(folder):
    class Ranks:
        name, differentiable, needs_groups, range = "ranks", False, True, (0.0, 1.0)

        def __call__(self, images, prompts, metadata, groups):
            raise AssertionError("it would see parts of a group")

    with pytest.raises(ValueError, match="ranks rank images within a group"):
        score_images(folder / "a.png", "x", Ranks())


def test_a_reward_that_cannot_load_is_an_error_and_scores_later(folder, tmp_path, capsys):
    options = f"{{pickscore: {{options: {{path: {tmp_path}/later, tokenizer: {tmp_path}/later}}}}}}"
    command = ["score", str(folder), "--rewards", "pickscore", "--prompt", "a", "--reward_options", options]
    command += ["--output_dir", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "reward 'pickscore': " in error
    assert "there is no file or folder " in error
    tiny_checkpoints.clip(tmp_path / "later")
    assert main(command) == 0
    assert "| pickscore | 4 |" in capsys.readouterr().out


def test_a_picture_without_a_score_is_scored_again(folder, tmp_path, capsys):
    """By a reward that failed on all of them: an error, and nothing of it counts as done."""
    (tmp_path / "moody.py").write_text(
        "from pathlib import Path\n"
        "def moody(images, prompts, metadata):\n"
        f"    if not Path({str(tmp_path / 'well')!r}).exists():\n        raise RuntimeError('not today')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    spec = f"{tmp_path}/moody.py:moody"
    command = ["score", str(folder), "--rewards", spec, "--prompt", "a", "--allow_reward_code"]
    command += ["--output_dir", str(tmp_path / "out")]
    with pytest.warns(RewardWarning, match="not today"):
        assert main(command) == 2
    assert "failed on all 4 images" in capsys.readouterr().err
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 5, "what was found out is written"
    (tmp_path / "well").touch()
    assert main(command) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["rewards"][spec]["count"] == 4


def test_rows_without_a_text_or_a_picture_are_named(folder, tmp_path):
    (folder / "list.jsonl").write_text(
        '{"image": "a.png", "prompt": null, "text": "t"}\n{"image": "b.png", "prompt": null}\n'
    )
    with pytest.raises(ValueError, match=r"1 of 2 images have no prompt \(.*b\.png"):
        score_files(config(folder / "list.jsonl", prompt=None, output_dir=tmp_path / "out"))
    (folder / "list.jsonl").write_text('{"image": null, "prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1: no picture"):
        score_files(config(folder / "list.jsonl", prompt=None, output_dir=tmp_path / "out"))
    rows = {"jpg_0": [(folder / "a.png").read_bytes(), None], "caption": ["a", "b"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "holes.parquet")
    found = score_files(config(tmp_path / "holes.parquet", prompt=None, output_dir=tmp_path / "holes"))
    assert found[0].get("error") is None
    assert "holes.parquet, row 1, jpg_0 cannot be read as a picture: no image" in found[1]["error"]


def test_a_folder_is_searched_for_pictures_alone(folder, tmp_path):
    for name in ("report.pdf", "data.h5", "notes.txt"):
        (folder / name).write_bytes(b"%PDF")
    assert len(score_files(config(folder, output_dir=tmp_path / "out"))) == 4


def test_a_module_beside_the_run_is_found(folder, tmp_path, monkeypatch):
    """The installed command's path starts elsewhere."""
    (tmp_path / "beside_the_run.py").write_text(
        "def f(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    command = ["score", str(folder), "--prompt", "x", "--rewards", "beside_the_run:f", "--output_dir", "out"]
    assert main(command) == 2, "code needs consent"
    assert main([*command, "--allow_reward_code"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name pictures: diffalign score FOLDER"),
        (["nowhere"], "nothing at nowhere: check the path"),
        (["FOLDER", "--prompt", "x", "--rewards", "pickscor"], "did you mean 'pickscore'"),
        (["FOLDER"], "4 of 4 images have no prompt"),
        (["FOLDER", "--prompts", "TWO"], "2 prompts for more than 2 images"),
        (["FOLDER/a.png", "--prompts", "TWO"], "2 prompts are more than images"),
        (["EMPTY", "--prompt", ""], "holds no picture"),
        (["FOLDER", "--prompt", "x", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["FOLDER", "--prompt", "x", "--calibrations", "nowhere/base.json"], "there is no folder nowhere"),
        (["FOLDER", "--prompt", "x", "--rewards", ","], "rewards: no reward is named in"),
        (["FOLDER", "--prompt", "x", "--rewards", "shapes,"], "rewards: no name after a comma in"),
        (["--serve", "70000"], "serve must be at least 0 and at most 65535, got 70000: 0 takes a free port"),
        (["--serve", "0", "--token_env", "NOT_SET"], "set the environment variable NOT_SET"),
        (["FOLDER", "--prompt", "x", "--output_dir", "TWO"], "two.txt cannot be created (File exists)"),
    ],
)
def test_user_errors_have_a_hint(arguments, message, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    places = {"FOLDER": str(folder), "EMPTY": str(tmp_path / "empty"), "TWO": str(tmp_path / "two.txt")}
    for name, place in places.items():
        arguments = [text.replace(name, place) for text in arguments]
    rewards = [] if "--rewards" in arguments else ["--rewards", "jpeg_compressibility"]
    place = [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path / "out")]
    assert main(["score", *arguments, *rewards, *place]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_rewards_are_served(folder):
    """The real command, in a process of its own."""
    command = [sys.executable, "-c", "from diffalign.cli import main; main()", "score", "--serve", "0"]
    command += ["--rewards", "jpeg_incompressibility"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert "rewards jpeg_incompressibility at http://127.0.0.1:" in line
        remote = RemoteReward("far", HTTPClient(line.split()[-1]), "jpeg_incompressibility")
        image = torch.from_numpy(np.array(picture("a"))).permute(2, 0, 1)[None] / 255
        assert remote(image, ["x"], [{}]).item() == pytest.approx(kilobytes("a"))
        assert urllib3.request("GET", line.split()[-1]).json() == {"rewards": ["jpeg_incompressibility"]}
    finally:
        server.terminate()
        server.wait(10)


def test_the_list_is_printed(capsys):
    assert main(["score", "--list"]) == 0
    assert "| `pickscore` | human preference | [-100, 100] | yes |" in capsys.readouterr().out


def test_what_the_base_scores_calibrates_a_combination(folder, tmp_path):
    name, path = "jpeg_incompressibility", tmp_path / "base.json"
    score_files(config(folder, output_dir=tmp_path / "out", calibrations=path))
    options = {"rewards": {name: 1.0}, "scale": "standardised", "calibrations": str(path)}
    joined = get_reward("combined", **options)
    values = [joined(as_images(folder / f"{n}.png"), [""], [{}]).item() for n in SIZES]
    assert np.mean(values) == pytest.approx(0, abs=1e-5)
    assert np.std(values) == pytest.approx(1, abs=1e-5)


def test_a_picture_is_scored_for_each_metadata_that_it_comes_with(tmp_path):
    """Also where a table changes between two runs into one folder."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = "def number(images, prompts, metadata):\n    return [float(m['n']) for m in metadata]\n"
    (tmp_path / "reward.py").write_text(code)
    table = tmp_path / "table.jsonl"
    options = {"rewards": (f"{tmp_path}/reward.py:number",), "allow_reward_code": True, "output_dir": tmp_path / "out"}
    for numbers in ([1, 2], [3, 2]):
        table.write_text("".join(json.dumps({"image": "a.png", "prompt": "p", "n": n}) + "\n" for n in numbers))
        rows = score_files(ScoreConfig(images=(str(table),), **options))
        assert [list(row["rewards"].values()) for row in rows] == [[float(n)] for n in numbers]


@pytest.mark.parametrize("in_a_table", [False, True])
def test_another_picture_of_the_same_name_is_scored_again(tmp_path, in_a_table):
    source = tmp_path / ("table.parquet" if in_a_table else "a.png")
    found = []
    for level in (0, 255):
        picture = Image.new("RGB", (8, 8), (level, level, level))
        picture.save(tmp_path / "a.png")
        if in_a_table:
            row = {"image": (tmp_path / "a.png").read_bytes(), "prompt": "a"}
            Dataset.from_list([row]).to_parquet(source)
        prompt = [] if in_a_table else ["--prompt", "a"]
        assert (
            main(["score", str(source), "--rewards", "brightness", *prompt, "--output_dir", str(tmp_path / "o")]) == 0
        )
        found.append(json.loads((tmp_path / "o/summary.json").read_text()))
    assert found[0] != found[1]
    assert "1.0" in json.dumps(found[1])
