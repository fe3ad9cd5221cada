"""The notebook of assets/ runs, prints each line once, and shows bars, tables and pictures."""

import json
import re

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "assets/notebooks/quickstart.ipynb"


def source(cell):
    return "".join(cell["source"])


def test_it_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell["cell_type"] for cell in cells].count("code") >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run of two steps, in an empty folder."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = re.sub(r"STEPS = \d+", "STEPS = 2", cell.source).replace("limit=60", "limit=6")
        cell.source = cell.source.replace('"limit": 24', '"limit": 3')
    where = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    return nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()


def outputs(executed, kind):
    """Return the outputs of each cell that have a MIME type, as mappings, or the text of a stream."""
    found = []
    for cell in executed.cells:
        own = [{output.get("name"): output.get("text"), **output.get("data", {})} for output in cell.get("outputs", [])]
        found.append([output for output in own if kind in output])
    return found


@pytest.mark.slow
def test_it_shows_bars_tables_and_pictures(executed):
    bars = [bar["text/plain"] for own in outputs(executed, "application/vnd.jupyter.widget-view+json") for bar in own]
    own = [bar.split(":")[0] for bar in bars if "Loading" not in bar]  # of diffusers and transformers
    assert own == ["train", *("base", "notebook") * 2]
    table, page = (own["text/html"] for shown in outputs(executed, "text/html") for own in shown)
    assert "eval/accuracy" in table
    assert "data:image/png;base64," in table
    assert "compare.html" in page
    assert sum(map(len, outputs(executed, "image/png"))) == 2


@pytest.mark.slow
def test_it_prints_nothing_twice_and_no_bar_as_text(executed):
    printed = []
    for stream in ("stdout", "stderr"):
        for own in outputs(executed, stream):
            lines = [line for line in "".join(found[stream] for found in own).splitlines() if line.strip()]
            assert [line for line in lines if lines.count(line) > 1] == []
            printed += lines
    assert any(line.startswith("achieved") for line in printed)
    assert [line for line in printed if "%|" in line or "Warning" in line] == []
