import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffalign.report import curves
from diffalign.report.curves import Known, limits, plot_curves, score_axis
from diffalign.report.metrics import BETTER, LEARNS, QUESTIONS, Axis, describe
from diffalign.runtime.tracking import MetricsLog

ROWS = [{"step": s, "loss": 1 / s, "reward/mean": s, "note": "x", "ok": True} for s in range(1, 5)]
ROWS.append({"step": 4, "eval/accuracy": 0.5, "zeta": 1})


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, to look inside them."""
    made = []

    class Spy(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(curves, "Figure", Spy)
    return made


def names(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def panel(figure, name):
    return figure.axes[names(figure).index(name)]


def test_those_that_decide_stand_in_groups_and_all_in_another_picture(tmp_path, figures):
    drawn = plot_curves(ROWS, tmp_path / "curves.png")
    assert drawn == ["eval/accuracy", "reward/mean", "loss"]
    deciding, every = figures
    assert names(deciding) == drawn
    assert [text.get_text() for text in deciding.texts][:2] == [QUESTIONS[BETTER], QUESTIONS[LEARNS]]
    assert names(every) == ["eval/accuracy", "reward/mean", "loss", "zeta"]
    assert panel(deciding, "reward/mean").lines[0].get_xydata().tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    for name in ("curves.png", "curves_all.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 900


def test_at_most_eight_decide_and_constant_ones_are_a_line_of_text(tmp_path, figures):
    changing = ["eval/accuracy", "eval/diversity", "eval/a", "eval/b", "reward/mean", "reward/std", "zero_std_groups",
                "kl", "clip_share", "grad_norm", "lr", "time/update"]  # fmt: skip
    rows = [
        {"step": s, "eval/shapes": s, "unscored": 0.0, **{n: s + i for i, n in enumerate(changing)}} for s in (1, 2)
    ]
    drawn = plot_curves(rows, tmp_path / "curves.png")
    assert drawn == ["eval/accuracy", "eval/diversity", "eval/a", "reward/mean", "reward/std", "kl", "clip_share",
                     "grad_norm"]  # fmt: skip
    assert "constant: unscored 0" in figures[0].texts[-1].get_text()
    assert "eval/shapes" in names(figures[1])  # equal to the accuracy, so only there
    meanings = [text.get_text().replace("\n", " ") for text in panel(figures[0], "kl").texts]
    assert meanings == [describe("kl").meaning]
    assert panel(figures[0], "eval/accuracy").get_title(loc="right") == "1 → 2"


@pytest.mark.parametrize(
    ("values", "axis", "expected"),
    [
        ([0.202, 0.188], Axis(0), (0, 0.2121)),  # no collapse
        ([0.34, 0.52], Axis(0, 1), (0, 1)),
        ([0.02, 0.01], Axis(0, 0.1), (0, 0.1)),
        ([21.0, 21.1], Axis(span=4.0), (18.85, 23.25)),
        ([21.0, 21.1], Axis(), (19.8895, 22.2105)),
        ([0.0, 0.0], Axis(0), (0, 1.05)),
        ([-0.2, 0.3], Axis(0), (-0.225, 0.325)),
        ([1.5], Axis(0, 1), (0, 1.575)),
    ],
)
def test_axes_show_the_natural_range(values, axis, expected):
    assert limits(np.array(values), axis) == pytest.approx(expected)


def test_axes_of_a_run(tmp_path, figures):
    rows = [{"step": s, "eval/accuracy": 21 + s / 10, "reward/mean": 5 + s / 10, "reward/std": 1.0} for s in range(3)]
    plot_curves(rows, tmp_path / "a.png", Known(axes={"eval/accuracy": score_axis(torch.tensor([20.0, 24.0]))}))
    ends = {name: panel(figures[0], name).get_ylim() for name in ("eval/accuracy", "reward/mean")}
    assert {name: high - low for name, (low, high) in ends.items()} == {
        "eval/accuracy": pytest.approx(2.2 * 1.1, rel=0.1), "reward/mean": pytest.approx(2.2, rel=0.1)}  # fmt: skip
    assert score_axis(torch.tensor([0.0, math.nan, 0.5])) == Axis(0, 1)
    assert score_axis(torch.tensor([math.nan])) == Axis()


def test_a_repeated_step_counts_once_and_a_bad_value_is_a_gap(tmp_path, figures):
    rows = [{"step": 3, "kl": 9.0}, {"step": 1, "kl": math.inf}, {"step": 2, "kl": None}, {"step": 3, "kl": 0.5}]
    plot_curves(rows, tmp_path / "a.svg")
    np.testing.assert_array_equal(figures[0].axes[0].lines[0].get_xydata(), [[1, np.nan], [3, 0.5]])


def test_a_long_curve_is_smoothed_around_its_raw_values(tmp_path, figures):
    rows = [{"step": s, "lr": float(s % 2)} for s in range(100)]
    rows[50]["lr"] = math.nan
    plot_curves(rows, tmp_path / "a.png")
    raw, smooth = (line.get_ydata() for line in figures[0].axes[0].lines)
    assert smooth[20] == pytest.approx(6 / 11)  # six odd steps from 15 to 25
    assert np.isnan(raw[50])
    assert np.isnan(smooth[50])
    assert np.isfinite(np.delete(smooth, 50)).all()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "note": "x"}], [{"step": 1, "kl": None}]])
def test_nothing_to_draw_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="no metric to plot"):
        plot_curves(rows, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_gap_of_the_log_is_not_bridged(tmp_path, figures):
    """``metrics.jsonl`` writes NaN as null and infinity as text."""
    rows = [{"step": s, "kl": v} for s, v in enumerate([1.0, None, 3.0, "inf", 5.0])]
    plot_curves(rows, tmp_path / "a.png")
    drawn = figures[0].axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, [1, np.nan, 3, np.nan, 5])
    assert plot_curves([{"step": 1, "kl": None, "loss": 1.0}], tmp_path / "b.png") == ["loss"]


def test_what_has_no_panel_is_named(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
    plot_curves([{"step": 1, **{f"m{i:02d}": i for i in range(38)}}], tmp_path / "a.png")
    assert len(figures[0].axes) == 8
    assert len(figures[1].axes) == 36
    assert figures[1].texts[-1].get_text() == "not plotted: m36, m37"


def test_every_metric_of_a_run_is_known(run_folder):
    logged = {name for row in MetricsLog.read(run_folder / "metrics.jsonl") for name in row if name != "step"}
    assert {"reward/mean", "eval/accuracy", "grad_norm", "eval/accuracy/counting"} <= logged
    assert [name for name in logged if describe(name) is None] == []
    assert {"curves.png", "curves_all.png"} <= {file.name for file in run_folder.iterdir()}
