import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffalign.report import curves
from diffalign.report.curves import plot_curves

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


def test_numbers_get_a_panel_each_the_telling_ones_first(tmp_path, figures):
    drawn = plot_curves(ROWS, tmp_path / "curves.png")
    assert drawn == ["eval/accuracy", "reward/mean", "loss", "zeta"]
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == drawn
    assert figures[0].axes[1].lines[0].get_xydata().tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 900


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


def test_keys_choose_and_order_panels(tmp_path):
    assert plot_curves(ROWS, tmp_path / "a.png", keys=["loss", "absent", "reward/mean"]) == ["loss", "reward/mean"]


def test_panels_are_bounded(tmp_path):
    row = {"step": 1, **{f"m{i}": i for i in range(30)}}
    assert len(plot_curves([row], tmp_path / "a.png")) == 24


@pytest.mark.parametrize(("rows", "keys"), [([], None), ([{"step": 1, "note": "x"}], None), (ROWS, ["absent"])])
def test_nothing_to_draw_is_refused(tmp_path, rows, keys):
    with pytest.raises(ValueError, match="no metric to plot"):
        plot_curves(rows, tmp_path / "a.png", keys)
    assert not (tmp_path / "a.png").exists()


def test_a_gap_of_the_log_is_not_bridged(tmp_path, figures):
    """``metrics.jsonl`` writes NaN as null and infinity as text."""
    rows = [{"step": s, "kl": v} for s, v in enumerate([1.0, None, 3.0, "inf", 5.0])]
    plot_curves(rows, tmp_path / "a.png")
    drawn = figures[0].axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, [1, np.nan, 3, np.nan, 5])
    assert plot_curves([{"step": 1, "kl": None, "loss": 1.0}], tmp_path / "b.png") == ["loss"]


def test_titles_say_what_a_name_does_not(tmp_path, figures):
    rows = [{"step": s, "eval/accuracy": 0.5, "lr": 1.0} for s in range(60)]
    plot_curves(rows, tmp_path / "a.png", meanings={"eval/accuracy": "mean of shapes"})
    first, second = (axes.get_title(loc="right") for axes in figures[0].axes)
    assert first == "mean of shapes; line: mean of 7 points"
    assert second == "line: mean of 7 points"


def test_what_has_no_panel_is_named(tmp_path, figures):
    plot_curves([{"step": 1, **{f"m{i}": i for i in range(26)}}], tmp_path / "a.png")
    assert figures[0].get_supxlabel() == "not plotted: m24, m25"
