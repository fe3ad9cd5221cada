"""Protocols against the authors' constants, and aggregations against tables that were worked out by hand."""

import math
from pathlib import Path

import pytest

from diffalign import benchmarks
from diffalign.benchmarks import detection
from diffalign.benchmarks.bootstrap import interval
from diffalign.benchmarks.detection import counted, placed, spatial
from diffalign.benchmarks.names import benchmark_names
from diffalign.benchmarks.protocol import Judged, find_benchmark
from diffalign.benchmarks.published import published
from diffalign.benchmarks.questions import graph_score
from diffalign.benchmarks.t2i_compbench import counts, noun, phrases, prepared
from diffalign.rewards.geneval import COUNTING_THRESHOLD, MAX_OBJECTS, POSITION_MARGIN, THRESHOLD, Found
from diffalign.structures import Prompt

# name -> prompts, images per prompt, judges: section by section of the protocols
CONSTANTS = {
    "geneval": (553, 4, {"geneval": "geneval"}),
    "geneval2": (800, 1, {"vqa": "vqascore_qwen3"}),
    "dpg_bench": (1065, 4, {"vqa": "vqascore_qwen2.5"}),
    "t2i_compbench": (2400, 10, {"vqa": "vqascore_qwen2.5", "clip": "clipscore",
                                 "detector": "diffalign.benchmarks.detection:CompositionDetector"}),
    "oneig": (695, 4, {"vqa": "vqascore_qwen2.5"}),
    "wise": (1000, 1, {"vqa": "vqascore_qwen3"}),
    "hpdv2": (3200, 1, {"hpsv2.1": "hpsv2.1"}),
    "genai_bench": (1600, 1, {"vqascore": "vqascore"}),
    "genai_rank": (800, 9, {"vqascore": "vqascore"}),
    "drawbench": (200, 1, dict.fromkeys(("pickscore", "clipscore", "hpsv2.1", "aesthetic", "image_reward"))),
    "pickapic": (500, 1, dict.fromkeys(("pickscore", "clipscore", "hpsv2.1", "aesthetic", "image_reward"))),
}  # fmt: skip
# name -> a published figure that the table must hold
PUBLISHED = {
    "geneval": ("SD3.5-M (CFG 4.5)", "overall", 0.63), "dpg_bench": ("Qwen-Image", "overall", 88.32),
    "t2i_compbench": ("SD3-M", "complex", 47.93), "oneig": ("SDXL", "alignment", 0.688),
    "wise": ("FLUX.1-dev", "overall", 0.416), "hpdv2": ("SD 1.4", "overall", 25.35),
    "genai_bench": ("DALL-E 3", "all", 0.78), "drawbench": ("SD3.5-M (no CFG)", "hpsv2.1", 0.204),
    "pickapic": ("SDXL + SPO (validation_unique)", "hpsv2.1", 0.318),
}  # fmt: skip


def judged(*rows):
    """Rows of (index, sample, metadata, answers)."""
    return [Judged(Prompt(f"p{index}", data), index, sample, answers) for index, sample, data, answers in rows]


def figures(name, *rows):
    return find_benchmark(name).summarise(judged(*rows))


def test_protocols_are_the_published_ones():
    assert list(CONSTANTS) == sorted(CONSTANTS, key=list(CONSTANTS).index)
    assert set(CONSTANTS) == set(benchmark_names())
    for name, (size, images, judges) in CONSTANTS.items():
        protocol = find_benchmark(name).protocol
        assert (protocol.size, protocol.images_per_prompt) == (size, images), name
        assert {key: judge.reward for key, judge in protocol.judges.items()} == {
            key: reward or key for key, reward in judges.items()
        }
    assert (THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, POSITION_MARGIN) == (0.3, 0.9, 16, 0.1)
    assert (detection.IOU, detection.DISTANCE, detection.LEAST) == (0.1, 150, 0.5)
    assert find_benchmark("dpg_bench").protocol.grid == find_benchmark("oneig").protocol.grid == (2, 2)
    assert len(find_benchmark("geneval").load(None)) == 553


def test_the_published_table_names_its_sources_and_known_figures():
    for name, (title, figure, value) in PUBLISHED.items():
        rows = published(name)
        assert {row.title: row for row in rows}[title].figures[figure] == value
        assert all(row.source and 2022 < row.year < 2027 for row in rows)


def test_geneval_averages_tasks_and_counts_images():
    rows = [(0, s, {"tag": "colors"}, {"geneval": [v]}) for s, v in enumerate((1, 1, 0, 0))]
    rows += [(1, s, {"tag": "colors"}, {"geneval": [v]}) for s, v in enumerate((0, 0, 0, 0))]
    rows += [(2, s, {"tag": "counting"}, {"geneval": [v]}) for s, v in enumerate((1, 1, 1, math.nan))]
    found = figures("geneval", *rows)
    assert found == {
        "overall": 0.625,
        "colors": 0.25,
        "counting": 1.0,
        "prompts with a correct image": pytest.approx(2 / 3),
    }


def test_geneval2_has_arithmetic_and_geometric_means():
    rows = [(0, 0, {"atom_count": 3, "skills": ["count", "object"]}, {"vqa": [0.25, 1.0]}),
            (1, 0, {"atom_count": 10, "skills": ["object", "object"]}, {"vqa": [0.0, 1.0]})]  # fmt: skip
    found = figures("geneval2", *rows)
    assert found == {"GM": 0.25, "AM": 0.5625, "GM, 3 atoms": 0.5, "GM, 10 atoms": 0.0, "AM, count": 0.25,
                     "AM, object": pytest.approx(2 / 3)}  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "parents", "dpg", "oneig"),
    [
        ([1, 1, 1], [[0], [1], [2]], 1.0, 1.0),
        ([0, 1, 1], [[0], [1], [2]], 0.0, 1 / 3),  # 2 falls with 1, and 3 with 2 only where 2 was set to 0
        ([1, 1, 0], [[3], [1], [0]], 0.0, 1 / 3),  # 1 falls with 3 that comes later
        ([1, 0, 1, 1], [[0], [1], [2, 1], [0]], 0.5, 0.5),
    ],
)
def test_a_question_falls_with_its_parents(answers, parents, dpg, oneig):
    assert graph_score(answers, parents, in_order=True) == pytest.approx(dpg)
    assert graph_score(answers, parents, in_order=False) == pytest.approx(oneig)


def test_dpg_averages_prompts_in_percent_and_categories_of_the_last_image():
    data = {"parents": [[0], [1]], "categories": ["entity - whole", "attribute - color"]}
    rows = [(0, 0, data, {"vqa": [0.4, 0.9]}), (0, 1, data, {"vqa": [0.6, 0.5]}), (1, 0, data, {"vqa": [0.9, 0.1]})]
    assert figures("dpg_bench", *rows) == {"overall": 50.0, "entity": 100.0, "attribute": 50.0}


def test_oneig_averages_prompts_of_all_classes():
    rows = [(0, 0, {"tag": "anime", "parents": [[0], [1]]}, {"vqa": [0.2, 0.9]}),
            (1, 0, {"tag": "object", "parents": [[0]]}, {"vqa": [0.9]})]  # fmt: skip
    assert figures("oneig", *rows) == {"alignment": 0.5, "anime": 0.0, "object": 1.0}


def test_wise_weights_culture_with_two_fifths():
    tags = ("culture", "time", "space", "biology", "physics", "chemistry")
    answers = dict(zip(tags, (0.9, 0.1, 0.6, 0.4, 0.5, 0.1), strict=True))
    found = figures("wise", *[(i, 0, {"tag": tag}, {"vqa": [answers[tag]]}) for i, tag in enumerate(tags)])
    assert found["overall"] == pytest.approx(0.40 + 2 * 0.12)


def test_hpdv2_averages_chunks_of_80_and_styles():
    rows = [(i, 0, {"tag": "anime"}, {"hpsv2.1": [0.2 if i < 80 else 0.4]}) for i in range(82)]
    rows += [(100, 0, {"tag": "photo"}, {"hpsv2.1": [0.1]})]
    found = figures("hpdv2", *rows)
    assert found == pytest.approx(
        {"overall": 20.0, "anime": 30.0, "photo": 10.0, "anime, std of chunks": 10.0, "photo, std of chunks": 0.0}
    )


def test_genai_bench_and_rank_average_skills():
    skills = ({"skills": ["basic"]}, {"skills": ["advanced", "counting"]}, {"skills": []})
    rows = [(i, 0, data, {"vqascore": [v]}) for i, (data, v) in enumerate(zip(skills, (0.8, 0.4, 0.9), strict=True))]
    assert figures("genai_bench", *rows) == pytest.approx({"all": 0.6, "basic": 0.8, "advanced": 0.4, "counting": 0.4})
    nine = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    rows = [(0, s, skills[0], {"vqascore": [v]}) for s, v in enumerate(nine)]
    found = figures("genai_rank", *reversed(rows))
    assert (found["best of 9, all"], found["best of 3, all"], found["mean of 9, all"]) == pytest.approx((0.9, 0.6, 0.5))


def test_the_panel_has_means_and_medians():
    rows = [(i, 0, {}, {"pickscore": [v]}) for i, v in enumerate((20.0, 21.0, math.nan, 25.0, 26.0))]
    assert figures("drawbench", *rows) == {"pickscore": 23.0}
    assert figures("pickapic", *rows) == {"pickscore": 23.0, "pickscore, median": 23.0}


def test_t2i_compbench_scores_by_category():
    rows = [
        (0, 0, {"tag": "color"}, {"vqa": [0.5, 0.5], "detector": [], "clip": []}),
        (1, 0, {"tag": "spatial"}, {"vqa": [], "detector": [0.7], "clip": []}),
        (2, 0, {"tag": "non_spatial"}, {"vqa": [], "detector": [], "clip": [0.31]}),
        (3, 0, {"tag": "complex", "kind": "spatial"}, {"vqa": [0.8], "detector": [0.6], "clip": [0.3]}),
        (4, 0, {"tag": "complex", "kind": "action"}, {"vqa": [0.8], "detector": [0.6], "clip": [0.3]}),
        (5, 0, {"tag": "complex", "kind": ""}, {"vqa": [0.8], "detector": [0.6], "clip": [0.3]}),
    ]
    complex_mean = 100 * (0.7 + 0.55 + 1.7 / 3) / 3
    expected = {"color": 25.0, "spatial": 70.0, "non_spatial": 31.0, "complex": complex_mean}
    assert figures("t2i_compbench", *rows) == pytest.approx(expected)


def box(left, top, right, bottom, score=0.8):
    return Found((left, top, right, bottom), None, score)


def transcribed(locality, one, two, iou_threshold=0.1, distance_threshold=150):
    """The published rule, in its order of branches."""
    x = (two[0] + two[2]) / 2 - (one[0] + one[2]) / 2
    y = (two[1] + two[3]) / 2 - (one[1] + one[3]) / 2
    width = max(0, min(one[2], two[2]) - max(one[0], two[0]))
    inter = width * max(0, min(one[3], two[3]) - max(one[1], two[1]))
    iou = inter / ((one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1]) - inter)
    if locality in ("next to", "on side of", "near"):
        near = abs(x) < distance_threshold or abs(y) < distance_threshold
        return 1 if near else distance_threshold / max(abs(x), abs(y))
    right_way = {"on the right of": x < 0, "on the left of": x > 0, "on the bottom of": y < 0, "on the top of": y > 0}
    sideways = "right" in locality or "left" in locality
    if not right_way.get(locality) or not (abs(x) > abs(y) if sideways else abs(y) > abs(x)):
        return 0
    return 1 if iou < iou_threshold else iou_threshold / iou


def test_places_follow_the_published_rule():
    corners = [(0, 0, 40, 40), (30, 5, 90, 60), (300, 10, 360, 50), (20, 200, 60, 260), (400, 400, 420, 470)]
    for relation in ("next to", "near", "on the right of", "on the left of", "on the bottom of", "on the top of", ""):
        for a in corners:
            for b in corners:
                assert placed(relation, a, b) == pytest.approx(transcribed(relation, a, b)), (relation, a, b)


def test_spatial_and_numeracy_scores():
    objects = {"dog": [box(300, 0, 340, 40), box(301, 0, 340, 40)], "cell phone": [box(0, 0, 40, 40, 0.6)]}
    assert spatial(objects, ("dog", "phone"), "on the right of") == pytest.approx(0.25 * 1.4 + 0.5)
    assert spatial(objects, ("dog", "phone"), "on the left of") == 0.0  # .35 is below .5
    assert spatial(objects, ("dog", "cow"), "on the left of") == 0.0
    assert counted(objects, {"dog": 1, "phone": 2}) == 0.75  # the boxes of the dog are one
    assert counted(objects, {"dog": 2, "cow": 1}) == 0.25


def test_prompts_of_t2i_compbench_are_split():
    assert phrases("a green bench and a blue bowl") == ["a green bench", "a blue bowl"]
    assert noun("a cell phone on the right") == "phone"
    assert counts("three cats, two men and a bus") == {"cat": 3, "person": 2, "bus": 1}
    found = prepared(Prompt("A girl on top of a couch.", {"tag": "spatial"})).metadata
    assert (found["objects"], found["relation"]) == (["person", "couch"], "on the top of")


def test_the_interval_covers_the_figure_and_is_none_where_there_is_no_number():
    benchmark = find_benchmark("geneval")
    rows = [(i, 0, {"tag": f"t{i % 2}"}, {"geneval": [float(i % 3 == 0)]}) for i in range(40)]
    low, high = interval(benchmark, judged(*rows))
    assert low < benchmark.summarise(judged(*rows))["overall"] < high
    assert interval(benchmark, judged((0, 0, {"tag": "t"}, {"geneval": [math.nan]}))) is None


def test_the_readme_lists_every_benchmark():
    text = (Path(benchmarks.__file__).parent / "README.md").read_text()
    for name in benchmark_names():
        protocol = find_benchmark(name).protocol
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {protocol.title} | {protocol.size} x {protocol.images_per_prompt} |" in row
