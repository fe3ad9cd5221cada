"""R32 to R35: no file runs code, no configuration reaches beyond its run folder, no secret is written down."""

import ast
import dataclasses
import http.server
import json
import pickle
import socket
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffalign import FlowGRPOTrainer, load_model
from diffalign.config import load_yaml
from diffalign.models.tensor_cache import TensorCache
from diffalign.rewards import get_reward
from diffalign.rewards.support import weights
from diffalign.rewards.support.weights import Weights, state_dict
from diffalign.runtime import checkpoint, manifest
from diffalign.runtime.provenance import check_origin, commit
from tests.conftest import PIPELINE, ROOT
from tests.reliability.null import run
from tests.reliability.trainers import TRAINERS, short

SOURCES = sorted([*(ROOT / "diffalign").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


class Canary:
    """Unpickled, it leaves a trace."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def planted(tmp_path):
    mark = tmp_path / "the-canary-ran"
    return pickle.dumps(Canary(mark)), mark


def test_r32_the_canary_sings_when_it_is_unpickled(tmp_path):
    content, mark = planted(tmp_path)
    pickle.loads(content)
    assert mark.exists()


@pytest.mark.parametrize("file", ["weights", "optimizer", "ema", "state.json"])
def test_r32_no_part_of_a_checkpoint_is_unpickled(tmp_path, file, record_property):
    content, mark = planted(tmp_path)
    run(tmp_path / "run", max_train_steps=4)
    folder = tmp_path / "run/checkpoint-4"
    name = file if "." in file else f"{file}.safetensors"
    (folder / name).write_bytes(content)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(manifest.manifest_text(folder, 4))  # as whoever planted it would
    assert not checkpoint.verify(folder)
    with pytest.raises(Exception, match=r".") as caught:
        run(tmp_path / "run", max_train_steps=4)
    assert not isinstance(caught.value, AssertionError)
    record_property("canaries", 1)
    record_property("executed", int(mark.exists()))
    assert not mark.exists()


def canary_lora(content, folder):
    (folder / "pytorch_lora_weights.safetensors").write_bytes(content)
    load_model(PIPELINE).pipeline.load_lora_weights(folder)


def canary_bin_lora(content, folder):
    (folder / "pytorch_lora_weights.bin").write_bytes(content)
    load_model(PIPELINE).pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.bin")


def canary_judge(content, folder):
    (folder / "head.pth").write_bytes(content)
    state_dict(Weights(str(folder)), "head.pth")


def canary_cache(content, folder):
    cache = TensorCache(folder)
    cache.put("a", {"x": torch.zeros(2)})
    cache.path("a").write_bytes(content)
    assert cache.get("a") is None
    raise ValueError("it counts as missing")


def canary_reply(content, folder):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        reward = get_reward("remote", url=f"http://127.0.0.1:{server.server_port}", reward="brightness", retries=0)
        with pytest.warns(UserWarning, match="answered no JSON"):
            found = reward(torch.rand(1, 3, 8, 8), ["a"], [{}])
        assert found.isnan().all()
        raise ValueError("it has no score")
    finally:
        server.shutdown()
        server.server_close()


PATHS = [canary_lora, canary_bin_lora, canary_judge, canary_cache, canary_reply]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_r32_nothing_else_that_is_loaded_is_unpickled(tmp_path, path, record_property):
    content, mark = planted(tmp_path)
    folder = tmp_path / "planted"
    folder.mkdir()
    with pytest.raises(Exception, match=r"."):
        path(content, folder)
    record_property("canaries", 1)
    record_property("executed", int(mark.exists()))
    assert not mark.exists()


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node


ALLOWED = {("published_keys.py", "exec")}  # a script of ours that runs definitions of published code, in no package


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_r33_the_sources_hold_nothing_that_runs_what_it_reads(path):
    tree = ast.parse(path.read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not modules & {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for name, options, _ in calls(tree):
        if (path.name, name) in ALLOWED:
            continue
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), name
        assert name != "torch.load" or options.get("weights_only") == "True"
        assert options.get("shell") != "True"
        assert options.get("trust_remote_code") != "True"


def test_r33_yaml_makes_no_objects(tmp_path):
    from diffalign.config import load_yaml

    (tmp_path / "a.yaml").write_text("output_dir: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="is not a YAML file"):
        load_yaml(tmp_path / "a.yaml")


def test_r34_code_that_a_configuration_names_runs_only_when_it_was_allowed(tmp_path):
    (tmp_path / "mine.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    for rewards in ({f"{tmp_path}/mine.py:judge": 1.0},):
        with pytest.raises(ValueError, match="set allow_reward_code if you trust it"):
            FlowGRPOTrainer(args=short("flow_grpo", tmp_path / "run", rewards=rewards))
    assert not (tmp_path / "ran").exists()


COMMITS = {"main": "a" * 40, "new": "b" * 40}


def fetched(hub, kind, name, source, now):
    """A repository as the hub's client stores it, with two commits of equal content; main is at ``now``."""
    folder = hub / f"{kind}s--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "snapshots").mkdir(exist_ok=True)
    for place in (folder / "snapshots" / name for name in COMMITS.values()):
        if not place.exists():
            place.symlink_to(source, target_is_directory=True)
    (folder / "refs/main").write_text(COMMITS[now])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "_LOADED", {})
    return tmp_path / "hub"


@pytest.mark.parametrize("given", [None, COMMITS["main"]])
def test_r34_a_run_says_which_commit_of_a_model_it_trained_and_goes_on_with_no_other(hub, tmp_path, given):
    fetched(hub, "model", "owner/shapes", PIPELINE, "main")
    args = short("flow_grpo", tmp_path / "run", model="owner/shapes", revision=given, max_train_steps=2)
    FlowGRPOTrainer(args=args).train()
    assert load_yaml(tmp_path / "run/config.yaml")["revision"] == COMMITS["main"]
    with safe_open(tmp_path / "run/pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["diffalign.base_revision"] == COMMITS["main"]
    origin = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())["origin"]
    assert origin["commits"] == {"owner/shapes": COMMITS["main"]}
    card = (tmp_path / "run/README.md").read_text()
    assert f'from_pretrained("owner/shapes", revision="{COMMITS["main"]}")' in card
    fetched(hub, "model", "owner/shapes", PIPELINE, "new")
    again = dataclasses.replace(args, resume_from_checkpoint="latest")
    if given:
        FlowGRPOTrainer(args=again).train()  # it has had its steps
    else:
        with pytest.raises(ValueError, match=f"revision: '{COMMITS['main']}' then, '{COMMITS['new']}' now"):
            FlowGRPOTrainer(args=again).train()


def test_r34_a_judge_or_data_that_moved_on_the_hub_are_refused_by_name(hub, tmp_path):
    for kind, name in (("model", "owner/judge"), ("dataset", "owner/pairs")):
        fetched(hub, kind, name, tmp_path, "main")
    trainer = FlowGRPOTrainer(args=short("flow_grpo", tmp_path / "run"))
    weights.load_once(lambda weights, head: weights, Weights("owner/judge"), "head.pth")
    assert trainer.outputs.commits == {"owner/judge": COMMITS["main"]}
    then = trainer.loop.outputs.origin()
    fetched(hub, "model", "owner/judge", tmp_path, "new")
    with pytest.raises(ValueError, match=f"owner/judge has changed on the hub .*{COMMITS['main']}.*{COMMITS['new']}"):
        check_origin(then, trainer.loop.outputs.origin(), trainer.args)
    assert commit("owner/pairs", None, "dataset") == commit("owner/pairs", COMMITS["main"], "dataset")
    assert commit("owner/pairs") is commit("owner/pairs", "branch", "dataset") is commit(str(tmp_path)) is None
    older = {name: value for name, value in then.items() if name != "commits"}
    older["config"] = {name: value for name, value in then["config"].items() if name != "revision"}
    check_origin(older, trainer.loop.outputs.origin(), trainer.args)


@pytest.mark.parametrize("name", TRAINERS)
def test_r34_a_run_needs_no_network(name, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    TRAINERS[name].make(short(name, tmp_path / "run", max_train_steps=2)).train()
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()


def test_r35_nothing_leaves_the_run_folder_and_no_secret_enters_it(tmp_path, monkeypatch):
    secret = "hf_" + "s3cr3t" * 5
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work/deep").mkdir(parents=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("../../escape\n/etc/passwd\na\x00b\nCON\n" + "x" * 300)
    known = set(tmp_path.rglob("*"))
    args = short("flow_grpo", Path("work/deep/../x"), max_train_steps=2, train_prompts=prompts, eval_prompts=prompts,
                 eval_rewards=("brightness",), save_rollouts=True)  # fmt: skip
    FlowGRPOTrainer(args=args).train()
    made = [path for path in set(tmp_path.rglob("*")) - known if path.is_file()]
    assert made
    assert all((tmp_path / "work/x") in path.parents for path in made)
    assert not [path for path in made if secret.encode() in path.read_bytes()]


def test_r35_a_group_of_tensors_cannot_name_a_file_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="names a file"):
        checkpoint.save(tmp_path, 1, {"../x": {}}, {}, keep=None)
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
