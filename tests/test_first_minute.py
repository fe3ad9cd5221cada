"""What goes wrong in the first minute ends in a sentence with something to try, in every command."""

import io
import logging
import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import requests
from huggingface_hub import errors

from diffalign.cli import COMMANDS, main
from diffalign.console import Once, OneLine, closing_pipes, one_line_logs, one_line_warnings, say
from diffalign.messages import explain, hub_sentence
from tests.config_classes import CLASSES
from tests.conftest import PIPELINE, PROMPTS

ROOT = Path(__file__).parents[1]
HUB = "owner/model-x"
PROMPT_FILE = str(PROMPTS / "shapes_train.jsonl")
# A command line of each command that names a repository of the hub.
NAMING = {
    "train flow_grpo": ["--model", HUB, "--train_prompts", PROMPT_FILE, "--rewards", "shapes"],
    "train refl": ["--model", HUB, "--train_prompts", PROMPT_FILE, "--rewards", "sharpness"],
    "train diffusion_dpo": ["--model", str(PIPELINE), "--train_data", HUB],
    "train flow_grpo, weights of a reward": [
        "--model", str(PIPELINE), "--train_prompts", PROMPT_FILE,
        "--rewards", f"{{look: {{reward: clipscore, options: {{path: {HUB}}}}}}}",
    ],
    "eval": ["--model", HUB, "--prompts", PROMPT_FILE, "--rewards", "shapes"],
    "compare": ["--model", HUB, "--prompts", PROMPT_FILE, "--rewards", "shapes"],
    "rank": ["--model", HUB, "--prompts", PROMPT_FILE, "--rewards", "shapes"],
    "bench geneval": [HUB],
    "bench geneval, weights of a judge": [
        str(PIPELINE), "--limit", "2", "--judges", f"{{geneval: {{options: {{path: {HUB}}}}}}}",
    ],
    "score": [
        PROMPT_FILE, "--rewards", "clipscore", "--reward_options", f"{{clipscore: {{options: {{path: {HUB}}}}}}}",
    ],
    "check": [HUB],
    "relabel": [HUB, "--rewards", "shapes"],
    "label": [HUB],
    "label, drawn": ["base", "--model", HUB, "--prompts", PROMPT_FILE],
}  # fmt: skip


def response(code):
    made = requests.Response()
    made.status_code, made.url = code, f"https://huggingface.co/{HUB}/resolve/main/model_index.json"
    return made


FORBIDDEN, MISSING, BAD = response(403), response(404), response(502)
ERRORS = {
    "gated": (
        errors.GatedRepoError("gated", response=FORBIDDEN),
        ["licence", f"huggingface.co/{HUB}", "hf auth login"],
    ),
    "missing": (
        errors.RepositoryNotFoundError("none", response=MISSING),
        ["is not on the hub", "spelling", "hf auth login"],
    ),
    "revision": (errors.RevisionNotFoundError("none", response=MISSING), ["no such revision"]),
    "no network": (
        requests.ConnectionError("Name or service not known"),
        ["hub cannot be reached", "hf download"],
    ),
    "slow network": (requests.ConnectTimeout("timed out"), ["hub cannot be reached", "hf download"]),
    "server": (errors.HfHubHTTPError("502 Bad Gateway", response=BAD), ["try again later"]),
}


def command_of(name):
    return name.split(",")[0].split()


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMING)
def test_offline_is_named_with_what_to_do(name, no_cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = [*command_of(name), *NAMING[name], "--output_dir", "out"] if name != "check" else ["check", HUB]
    argv = argv if name != "relabel" else ["relabel", *NAMING[name]]
    assert main(argv) == 2
    error = capsys.readouterr().err
    for part in (HUB, "not in the local cache", "HF_HUB_OFFLINE=1", "hf download"):
        assert part in error
    assert error.count("\n") <= 3
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("name", NAMING)
def test_the_hub_says_no(name, kind, no_cache, monkeypatch, capsys):
    error, parts = ERRORS[kind]

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE")
    for owner, function in ((huggingface_hub, "get_hf_file_metadata"), (huggingface_hub.HfApi, "repo_info"),
                            (huggingface_hub.HfApi, "auth_check")):  # fmt: skip
        monkeypatch.setattr(owner, function, refuse)
    argv = [*command_of(name), *NAMING[name]]
    assert main(argv) == 2
    said = capsys.readouterr().err
    for part in (HUB, *parts):
        assert part in said
    assert len(said) < 2000


@pytest.mark.parametrize("kind", ERRORS)
def test_what_a_library_made_of_it_later_is_the_same_sentence(kind, monkeypatch):
    """Loading may fail after the check; libraries wrap errors of the hub in their own."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    error, parts = ERRORS[kind]
    outer = OSError(f"Can't load the model for '{HUB}'. If you were trying ... \n" + "x" * 5000)
    outer.__cause__ = error
    found = explain(outer)
    assert found is not None
    for part in (HUB, *parts):
        assert part in found
    assert len(found) < 2000


def test_rewards_keep_their_name_in_front():
    error = ValueError("reward 'pickscore': weights cannot be loaded")
    error.__cause__ = ERRORS["gated"][0]
    assert explain(error).startswith("reward 'pickscore': 'owner/model-x' is gated")


def test_other_errors_are_not_taken_for_the_hubs():
    assert hub_sentence(ValueError("group_size 1")) is None
    assert explain(RuntimeError("ours to find")) is None
    assert explain(ValueError("x" * 5000)).startswith("xxx")
    assert len(explain(ValueError("x" * 5000))) < 2000
    assert explain(PermissionError(13, "Permission denied", "/root/x")) == (
        "/root/x: Permission denied; check the path and its permissions"
    )


@pytest.mark.parametrize("command", CLASSES)
def test_files_names_and_rewards_are_listed_together(command, tmp_path, monkeypatch, capsys):
    """Whatever of these a command can name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "promts.txt").write_text("a\n")
    fields = {"model": "./nomodel", "train_prompts": "prompts.txt", "eval_prompts": "nofile.jsonl", "rewards": "shaps",
              "prompts": "prompts.txt", "train_data": "no.parquet", "image_root": "nofolder"}  # fmt: skip
    known = CLASSES[command].__dataclass_fields__
    types = {name: str(field.type) for name, field in known.items()}
    given = {name: value for name, value in fields.items() if name in known and types[name] != "bool"}
    positional = ["nothing.parquet"] if command in ("eval", "compare", "score", "check", "relabel", "export") else []
    argv = [*command.split(), *positional, *(f"--{name}={value}" for name, value in given.items())]
    argv += ["--assets", "noassets"] if command == "doctor" else []
    assert main(argv) == 2
    error = capsys.readouterr().err
    for name, value in given.items():
        assert value in error, (name, error)
    assert all(name in error for name in positional)
    assert "did you mean promts.txt" in error or not {"prompts", "train_prompts"} & given.keys()
    assert "did you mean 'shapes'" in error or "rewards" not in given
    assert not list(tmp_path.glob("*/")), "nothing was written"


# Readers that leave


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([*command.split(), "--help"] for command in CLASSES),
                                  ["score", "--list"], ["check", PROMPT_FILE, "--prompts"]], ids=" ".join)  # fmt: skip
def test_a_reader_that_leaves_is_no_error(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 141
    assert capsys.readouterr().err == ""


def test_a_training_does_not_end_with_its_reader(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Closed())
    say("lost")
    with closing_pipes(active=False):
        pass


def test_head_of_a_pipe_shows_no_traceback():
    """The interpreter flushes again at its end."""
    program = f"{sys.executable} -m diffalign train flow_grpo --help | head -1"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# Noise of libraries


def test_a_warning_is_one_line_and_formatting_is_put_back():
    before = warnings.formatwarning
    with one_line_warnings():
        text = warnings.formatwarning("two\n  lines", UserWarning, "file.py", 3, "code")
        assert text == "warning: two lines\n"
    assert warnings.formatwarning is before


def test_commands_print_warnings_so(monkeypatch, capsys):
    def warns(argv):
        print(warnings.formatwarning("odd\nthing", UserWarning, "f.py", 1), end="", file=sys.stderr)

    monkeypatch.setitem(COMMANDS, "doctor", warns)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "warning: odd thing\n"


def test_loading_bars_are_off_and_records_of_libraries_are_single_lines(capsys):
    import diffusers
    import transformers

    one_line_logs()
    assert not diffusers.utils.logging.is_progress_bar_enabled()
    assert not transformers.utils.logging.is_progress_bar_enabled()
    for name in ("diffusers", "transformers"):
        handlers = logging.getLogger(name).handlers
        assert handlers
        assert all(isinstance(handler.formatter, OneLine) for handler in handlers)
        assert sum(isinstance(kept, Once) for handler in handlers for kept in handler.filters) == len(handlers)
    record = logging.LogRecord("diffusers.x", logging.WARNING, "f", 1, "a\n   b %s", ("c",), None)
    assert OneLine().format(record) == "warning: a b c"
    once = Once()
    assert [once.filter(record), once.filter(record)] == [True, False]


# The real client against a server that behaves as the hub does


class Hub(BaseHTTPRequestHandler):
    codes: ClassVar = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}

    def do_HEAD(self):
        name = self.path.strip("/").split("/")[1].split("?")[0]
        code, kind = self.codes.get(name, (404, "EntryNotFound"))  # the client asks for more than the repository
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("repository", "part"),
    [
        ("gated", "accept its licence"),
        ("missing", "is not on the hub"),
        ("private", "hf auth login"),
        ("away", "hub cannot be reached"),
    ],
)
def test_with_the_real_client(repository, part, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = 9 if repository == "away" else server.server_port
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    argv = [
        "train",
        "flow_grpo",
        "--model",
        f"owner/{repository}",
        "--train_prompts",
        PROMPT_FILE,
        "--rewards",
        "shapes",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", *argv], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    server.shutdown()
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert f"owner/{repository}" in done.stderr
    assert "Traceback" not in done.stderr
