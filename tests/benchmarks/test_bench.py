"""Every benchmark at small size: from the authors' files to figures, through a kill, and with a broken image."""

import json

import pytest

from diffalign.benchmarks.names import benchmark_names
from diffalign.benchmarks.protocol import find_benchmark
from diffalign.cli import main
from diffalign.commands.bench import judging
from diffalign.data.validation import DataWarning
from tests.conftest import PIPELINE

SMALL = {"t2i_compbench": ["--images_per_prompt", "1"], "genai_rank": ["--limit", "1"], "oneig": ["--limit", "2"]}
PAIRWISE = "{geneval: {reward: vlm_pairwise, options: {url: 'http://localhost:1', model: m}}}"
GUIDED, PLAIN = "shapes-sd3, guidance 3", "shapes-sd3, no guidance"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def break_first(folder):
    """Cut an image off in the middle, and forget what was answered about it."""
    (file,) = folder.rglob("guidance-3/*/images/00000-0.png")
    file.write_bytes(file.read_bytes()[:60])
    for rows in (file.parents[1] / "answers").iterdir():
        lines = rows.read_text().splitlines(True)
        rows.write_text("".join(line for line in lines if not line.startswith('{"prompt": 0, "sample": 0')))
    return file


def assert_same(found, expected):
    """Figures are equal up to the rounding of judges in bfloat16, which depends on the sizes of batches."""
    assert found["figures"] == pytest.approx(expected["figures"], rel=0.02)
    for key in ("images", "broken", "failed"):
        assert found[key] == expected[key]


def check_whole(name, folder, titles):
    """The report of a first run has every column, figure and file."""
    found, protocol = results(folder), find_benchmark(name).protocol
    columns = found["columns"]
    assert list(columns) == titles
    assert all(protocol.headline in column["figures"] for column in columns.values())
    assert all(not column["failed"] and not column["broken"] for column in columns.values())
    assert protocol.comparable in (folder / "results.md").read_text()
    assert (folder / "results.png").stat().st_size > 5000
    return found


# What is common to all is tried on one with three judges and on one whose judge is asked several questions.
CYCLES = [pytest.param(name, marks=[] if name == "dpg_bench" else pytest.mark.slow) for name in benchmark_names()]


@pytest.mark.parametrize("name", [name for name in benchmark_names() if name != "dpg_bench"])
def test_a_benchmark_runs(name, bench, tmp_path):
    assert main(bench.argv(name, str(PIPELINE), tmp_path, *SMALL.get(name, []), "--guidance", "off")) == 0
    check_whole(name, tmp_path, [PLAIN])


@pytest.mark.parametrize("name", CYCLES)
def test_a_benchmark_resumes_and_survives_a_broken_image(name, bench, tmp_path, monkeypatch):
    argv = bench.argv(name, str(PIPELINE), tmp_path, *SMALL.get(name, []), "--official_layout", "true")
    assert main(argv) == 0
    columns = check_whole(name, tmp_path, [GUIDED, PLAIN])["columns"]
    assert list(tmp_path.rglob("official/**/*.*"))

    # Killed in the midst of a line of answers, and before another image was written; a third image is broken.
    (plain,) = tmp_path.rglob("guidance-1/shapes-sd3")
    rows = sorted(plain.glob("answers/*.jsonl"))[-1]
    lines = rows.read_text().splitlines(True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:20])
    last = sorted(plain.glob("images/*.png"))[-1]
    last.unlink()
    broken = break_first(tmp_path)
    asked = []
    monkeypatch.setattr(judging, "score", lambda r, i, p, own=judging.score: asked.append(len(p)) or own(r, i, p))
    with pytest.warns(DataWarning, match=f"{broken} cannot be read"):
        assert main(argv) == 0
    again = results(tmp_path)["columns"]
    assert_same(again[PLAIN], columns[PLAIN])
    assert last.is_file()
    assert len(asked) == 1
    assert again[GUIDED]["broken"] == [str(broken)]
    assert "images cannot be read and are left out" in (tmp_path / "results.md").read_text()

    broken.unlink()  # as the message says
    assert main(argv) == 0
    for title, column in results(tmp_path)["columns"].items():
        assert_same(column, columns[title])


def test_runs_stand_beside_their_base_and_a_dry_run_writes_nothing(run_folder, bench, tmp_path, capsys):
    argv = bench.argv("genai_bench", str(run_folder), tmp_path / "out", "--guidance", "off")
    assert main([*argv, "--dry_run", "true"]) == 0
    said = capsys.readouterr().out
    assert "2 prompts x 1 images = 2 images per column" in said
    assert "tiny, no guidance: 2 images, 1 steps, 2 denoiser evaluations" in said
    assert "judge vqascore (vqascore): 2 questions per column, 4 in all" in said
    assert not (tmp_path / "out").exists()
    assert main(argv) == 0
    found = results(tmp_path / "out")
    assert list(found["columns"]) == ["base, no guidance", "tiny, no guidance"]
    assert found["columns"]["tiny, no guidance"]["weights"] == str(run_folder)
    assert "the prompts number 2, the benchmark has 1600" in found["departures"]
    assert found["published"][0]["source"] == "arXiv 2406.13743"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["geneval2", str(PIPELINE)], "geneval2_data.jsonl of github.com/facebookresearch/GenEval2 is CC BY-NC"),
        (["genval", str(PIPELINE)], "did you mean geneval?"),
        (["geneval"], "name a model"),
        (["geneval", str(PIPELINE), str(PIPELINE)], "models share a name"),
        (["geneval", str(PIPELINE), "--judges", "{vqa: {reward: pickscore}}"], "asks no 'vqa'; it asks geneval"),
        (["dpg_bench", str(PIPELINE), "--prompts", "{plain}"], "has no id and no questions and no parents"),
        (["geneval", str(PIPELINE), "--judges", PAIRWISE], "ranks images within a group"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_is_sampled(argv, error, sources, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [part.format(plain=sources["drawbench"]) if part == "{plain}" else part for part in argv]
    assert main(["bench", *argv, "--allow_reward_code", "true"]) == 2
    assert error in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
