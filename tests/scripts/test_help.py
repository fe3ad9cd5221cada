"""Every script prints its help from a clone in which nothing is installed."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import importlib.util, io, runpy, sys
from contextlib import redirect_stdout
from pathlib import Path

root, *scripts = sys.argv[1:]
# An editable installation is found through a finder or a .pth file: neither may help.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
clean = [path for path in sys.path if path and not (Path(path) / "diffalign").is_dir()]
sys.path[:] = clean
assert importlib.util.find_spec("diffalign") is None
for script in scripts:
    sys.argv, sys.path[:], printed = [script, "--help"], [str(Path(script).parent), *clean], io.StringIO()
    try:
        with redirect_stdout(printed):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, script
    assert "usage" in printed.getvalue().lower(), script
    # Modules stay loaded between scripts, so the path is what shows that each could have found them.
    if "from diffalign" in Path(script).read_text():
        assert root in sys.path, script
"""


@pytest.mark.slow
def test_every_script_prints_its_help_from_a_clone_without_an_installation(tmp_path):
    found = sorted(path for path in (ROOT / "scripts").rglob("*.py") if path.parent.name != "examples")
    scripts = [path for path in found if "__main__" in path.read_text()]
    assert len(scripts) > 20
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *map(str, scripts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
