"""No file decides to run code, ask a server, send a secret or read elsewhere, through any command that reads it."""

import dataclasses
import json
import socket
import threading
from pathlib import Path

import pytest
import yaml

from diffalign.cli import main
from diffalign.commands.evaluate_config import EvaluationConfig, resolve
from diffalign.commands.relabel import RelabelConfig
from diffalign.commands.score import ScoreConfig
from diffalign.config import from_dict, load_yaml, parse
from diffalign.models.load import pipeline_class
from diffalign.rewards.base import PLUGINS, get_reward, names
from diffalign.rewards.support.embedding import ImageEmbedder
from diffalign.trainers.registry import algorithm_names, config_class
from tests.conftest import PIPELINE, PROMPTS

SECRET = "s3cr3t-of-another-service"
EVIL = """from pathlib import Path
Path({mark!r}).touch()


def judge(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with an evil module in it, and a secret in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "canary")))
    (tmp_path / "pictures").mkdir()
    return tmp_path


class Listener:
    """A server that counts who connects."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.seen = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            self.seen.append(client.recv(1 << 16))
            client.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"


@pytest.fixture(scope="module")
def listener():
    server = Listener()
    yield server
    server.socket.close()


def popen(place, url):
    return {"x": {"reward": "subprocess:Popen", "options": {"args": f"touch {place}/canary", "shell": True}}}


def system(place, url):
    return {"os:system": 1.0}


def module_here(place, url):
    return {"x": {"reward": "evil:judge"}}


def module_as_name(place, url):
    return {"evil:judge": 1.0}


def file_here(place, url):
    return {"x": {"reward": f"{place}/evil.py:judge"}}


def inside_combined(place, url):
    return {"combined": {"options": {"rewards": {"evil:judge": 1.0}}}}


def deep_inside(place, url):
    inner = {"reward": "combined", "options": {"rewards": {"y": {"reward": "evil.py:judge"}}}}
    return {"combined": {"options": {"rewards": {"x": inner}}}}


def remote(place, url):
    return {"x": {"reward": "remote", "options": {"url": url, "reward": "brightness", "retries": 0}}}


def remote_inside(place, url):
    return {"combined": {"options": {"rewards": remote(place, url)}}}


def judge(place, url):
    return {"vlm_rating": {"options": {"url": url, "model": "m", "retries": 0}}}


def secret(place, url):
    entry = remote(place, url)["x"]
    return {"x": {**entry, "options": {**entry["options"], "token_env": "AWS_SECRET_ACCESS_KEY"}}}


def numbered(place, url):
    return {1: secret(place, url)["x"]}


def endless(place, url):
    return {"x": {"reward": "shapes", "options": {"a": [[["x"] * 30] * 30] * 30}}}


ATTACKS = [popen, system, module_here, module_as_name, file_here, inside_combined, deep_inside, remote, remote_inside]
ATTACKS += [judge, secret, numbered, endless]


def training(place, rewards, **more):
    base = {"model": str(PIPELINE), "output_dir": str(place / "out"), "rewards": rewards, "max_train_steps": 1}
    return {**base, "train_prompts": str(PROMPTS / "shapes_train.jsonl"), **more}


def train(name, *options, **more):
    def command(place, rewards):
        write(place / "run.yaml", training(place, rewards, **more))
        return ["train", name, "--config", str(place / "run.yaml"), *options]

    return command


def held_out(place, rewards):
    write(place / "run.yaml", training(place, {"brightness": 1.0}, held_out=rewards))
    return ["train", "refl", "--config", str(place / "run.yaml")]


def eval_rewards(place, rewards):
    names = [entry.get("reward", name) if isinstance(entry, dict) else name for name, entry in rewards.items()]
    write(place / "run.yaml", training(place, rewards, eval_rewards=names))
    return ["train", "flow_grpo", "--config", str(place / "run.yaml")]


def resume(place, rewards):
    (place / "run/checkpoint-1").mkdir(parents=True)
    write(place / "run/config.yaml", training(place, rewards))
    options = ["--resume_from_checkpoint", str(place / "run/checkpoint-1")]
    return ["train", "flow_grpo", "--config", str(place / "run/config.yaml"), *options]


def judged(name, *positional):
    def command(place, rewards):
        table = {"rewards": list(rewards), "reward_options": rewards}
        more = {"model": str(PIPELINE), "prompts": str(PROMPTS / "shapes_validation.jsonl")} if name != "score" else {}
        more = {} if name == "relabel" else more
        write(place / "judged.yaml", {**table, **more})
        given = [str(place / one) for one in positional] if name == "score" else list(positional)
        return [name, *given, "--config", str(place / "judged.yaml")]

    return command


def of_run(name, within="run"):
    def command(place, rewards):
        (place / "run").mkdir()
        (place / "run/pytorch_lora_weights.safetensors").touch()
        (place / "run/eval_prompts.jsonl").write_text('{"prompt": "a red circle"}\n')
        write(place / "run/config.yaml", training(place, rewards))
        return [name, str(place / within)]

    return command


COMMANDS = {f"train {name}": train(name) for name in algorithm_names()}
COMMANDS |= {f"dry_run {name}": train(name, "--dry_run") for name in algorithm_names()}
COMMANDS |= {f"self_consent {name}": train(name, allow_reward_code=True) for name in algorithm_names()}
COMMANDS |= {"held_out": held_out, "eval_rewards": eval_rewards, "resume": resume}
COMMANDS |= {"score": judged("score", "pictures"), "relabel": judged("relabel", "pairs.parquet")}
COMMANDS |= {"eval": judged("eval"), "compare": judged("compare")}
COMMANDS |= {"eval run": of_run("eval"), "compare run": of_run("compare")}
COMMANDS |= {"compare file": of_run("compare", "run/pytorch_lora_weights.safetensors")}
COMMANDS |= {"check": judged("check", "pairs.parquet"), "doctor": judged("doctor")}


def write(path, values):
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_r34_a_file_runs_no_code_and_asks_no_server(attack, command, place, listener, capsys, record_property):
    seen = len(listener.seen)
    argv = COMMANDS[command](place, attack(place, listener.url))
    known = set(place.rglob("*"))
    assert main(argv) == 2
    said = "".join(capsys.readouterr())
    record_property("attacks", 1)
    record_property("attacks_refused", int(not (place / "canary").exists() and len(listener.seen) == seen))
    assert not (place / "canary").exists()
    assert len(listener.seen) == seen
    assert set(place.rglob("*")) == known, "a refused command leaves no trace"
    assert SECRET not in said
    assert len(said) < 2000


def test_the_message_says_what_to_type(place, listener, capsys):
    for attack, wanted in ((module_here, "type --allow_reward_code"), (remote, "type --allow_reward_code"),
                           (secret, "DIFFALIGN_TOKEN_127_0_0_1")):  # fmt: skip
        assert main(train("flow_grpo")(place, attack(place, listener.url))) == 2
        assert wanted in capsys.readouterr().err
    assert main(train("flow_grpo", allow_reward_code=True)(place, {"shapes": 1.0})) == 2
    assert "allow_reward_code: a file cannot set this" in capsys.readouterr().err


def test_the_canary_sings_where_consent_was_typed(place):
    write(place / "a.yaml", training(place, {"evil:judge": 1.0}))
    args = parse(config_class("flow_grpo"), ["--config", str(place / "a.yaml"), "--allow_reward_code"])
    assert args.allow_reward_code
    assert not (place / "canary").exists()
    get_reward("evil.py:judge", allow_code=args.allow_reward_code)
    assert (place / "canary").exists()


@pytest.mark.parametrize("typed", [["--allow_reward_code", "false"], ["--allow_reward_code=false"]])
def test_consent_that_was_typed_away_is_none(typed, place, capsys):
    assert main([*train("flow_grpo", allow_reward_code=True)(place, {"evil:judge": 1.0}), *typed]) == 2
    assert not (place / "canary").exists()


def test_what_is_typed_needs_no_consent_but_code(place, listener):
    server = ["--rewards", "remote", "--reward_options", json.dumps({"remote": remote(place, listener.url)["x"]})]
    found = parse(EvaluationConfig, ["--rewards", "[remote]", *server[2:]])
    assert found.reward_options["remote"].options["url"] == listener.url
    write(place / "a.yaml", training(place, remote(place, listener.url)))
    typed = ["--config", str(place / "a.yaml"), "--rewards.x", json.dumps(remote(place, listener.url)["x"])]
    assert parse(config_class("flow_grpo"), typed).rewards["x"].options["url"] == listener.url
    assert main(["score", "pictures", "--prompt", "x", "--rewards", "evil:judge"]) == 2
    assert not (place / "canary").exists()


def test_python_that_hands_a_file_on_is_no_consent(place):
    write(place / "a.yaml", training(place, {"evil:judge": 1.0}, allow_reward_code=True))
    values = load_yaml(place / "a.yaml")
    for kind in algorithm_names():
        with pytest.raises(ValueError, match="a file cannot"):
            from_dict(config_class(kind), values)
    assert not (place / "canary").exists()


@pytest.mark.parametrize(
    "spec",
    ["subprocess:Popen", "os:system", "builtins:exec", "shutil:rmtree", "code:interact", "torch:load", "evil:run"],
)
def test_consent_is_for_rewards_alone(spec, place):
    (place / "evil.py").write_text(
        "from pathlib import Path\nclass run:\n    def __init__(self, args):\n        Path(args).touch()\n"
    )
    with pytest.raises(ValueError, match=r"holds no reward|is not a reward|cannot be loaded"):
        get_reward(spec, allow_code=True, args=str(place / "canary"))
    assert not (place / "canary").exists()


@pytest.mark.parametrize("on_path", ["", ".", "{0}", None])
def test_a_folder_is_no_plug_in(on_path, place, monkeypatch):
    if on_path is not None:  # as ``python -m`` and a PYTHONPATH with an empty part have it
        monkeypatch.syspath_prepend(on_path.format(place))
    (place / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(place / 'canary')!r}).touch()\ndef judge(name): pass\n"
    )
    (place / "evil-1.dist-info").mkdir()
    (place / "evil-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (place / "evil-1.dist-info/entry_points.txt").write_text(f"[{PLUGINS}]\nnice = evil:judge\n")
    assert main(["score", "pictures", "--prompt", "x", "--rewards", "nice"]) == 2
    assert not (place / "canary").exists()
    assert "nice" not in names()


# What a run folder may name ------------------------------------------------------------------------------------------


def foreign(place, **values):
    """A run folder of somebody else."""
    (place / "run").mkdir(exist_ok=True)
    config = {"model": str(PIPELINE), "rewards": {"shapes": 1.0}, **values}
    write(place / "run/config.yaml", config)
    return EvaluationConfig(models=(str(place / "run"),))


@pytest.fixture
def prompts_inside(place):
    (place / "run").mkdir()
    (place / "run/eval_prompts.jsonl").write_text('{"prompt": "a red circle"}\n')


OUTSIDE = [
    "{0}/diary.txt",
    "diary.txt",
    "run/../diary.txt",
    "run/link.txt",
    "~/diary.txt",
    "/dev/zero",
    "/proc/self/environ",
]


@pytest.mark.parametrize("command", ["eval", "compare"])
@pytest.mark.parametrize("path", OUTSIDE)
def test_a_run_does_not_name_prompts_elsewhere(path, command, place, capsys):
    (place / "diary.txt").write_text("dear diary\n")
    foreign(place, eval_prompts=path.format(place))
    (place / "run/link.txt").symlink_to(place / "diary.txt")
    assert main([command, str(place / "run")]) == 2
    said = capsys.readouterr().err
    assert "eval_prompts" in said
    assert "--prompts" in said
    assert "dear diary" not in said


def test_a_copy_of_prompts_that_leads_elsewhere_is_not_read(place):
    (place / "diary.jsonl").write_text('{"prompt": "dear diary"}\n')
    config = foreign(place)
    (place / "run/eval_prompts.jsonl").symlink_to(place / "diary.jsonl")
    with pytest.raises(ValueError, match="prompts is missing"):
        resolve(config, place, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"path": "{0}/weights"}, {"path": "stranger/weights"}, {"path": "stranger"}, {"tokenizer": "../x"},
        {"path": "run/link"}, {"calibrations": "{0}/base.json"}, {"deep": [{"clip": "stranger/clip@main"}]},
    ],
)  # fmt: skip
def test_a_run_does_not_name_weights_elsewhere(options, place, prompts_inside):
    (place / "weights").mkdir()
    (place / "base.json").touch()
    text = json.dumps(options).replace("{0}", str(place))
    config = foreign(place, rewards={"pickscore": {"options": json.loads(text)}})
    (place / "run/link").symlink_to(place / "weights")
    with pytest.raises(ValueError, match=r"rewards\.pickscore\.options\..* is not a file inside the run"):
        resolve(config, place, 1)


def test_what_lies_inside_a_run_and_what_is_registered_may_be_used(place, prompts_inside):
    (place / "run/judge").mkdir()
    options = {"path": "run/judge", "precision": "bf16", "offload": True}
    config = foreign(place, rewards={"pickscore": {"options": options}}, cache_dir="run/kept")
    (place / "run/kept").mkdir()
    found = resolve(config, place, 1)
    assert found.prompts == place / "run/eval_prompts.jsonl"
    assert found.reward_options["pickscore"].options == options
    assert found.cache_dir == Path("run/kept")


def test_a_run_writes_no_embeddings_elsewhere(place, prompts_inside):
    assert resolve(foreign(place, cache_dir=str(place / "elsewhere")), place, 1).cache_dir is None


def test_the_base_that_a_run_names_is_shown(place, prompts_inside, capsys):
    resolve(foreign(place, model="owner/model\x1b[31m"), place, 1)
    said = capsys.readouterr().err
    assert "base model owner/model" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "values", [{"num_steps": "x"}, {"model": 3}, {"resolution": [1]}, {"eval_rewards": 3}, {"offload": 5}]
)
def test_values_of_a_run_are_checked_like_those_of_a_file(values, place, prompts_inside):
    values = {"plan": values} if "num_steps" in values else values
    with pytest.raises(ValueError, match=r"config\.yaml"):
        resolve(foreign(place, **values), place, 1)


# Models ---------------------------------------------------------------------------------------------------------------

INDEXES = {
    "library": {"_class_name": "StableDiffusion3Pipeline", "vae": ["evil", "X"]},
    "dotted": {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers.evil", "X"]},
    "file": {"_class_name": "StableDiffusion3Pipeline", "vae": ["../evil", "X"]},
    "custom": {"_class_name": ["evil.py", "X"]},
    "none": {},
}


@pytest.mark.parametrize("command", ["train", "dry_run", "eval", "compare"])
@pytest.mark.parametrize("index", INDEXES)
def test_a_model_names_no_module_to_import(index, command, place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(place))
    (place / "model").mkdir()
    (place / "model/model_index.json").write_text(json.dumps(INDEXES[index]))
    (place / "model/evil.py").write_text((place / "evil.py").read_text())
    with pytest.raises(ValueError, match=r"are trusted|not supported"):
        pipeline_class(place / "model")
    argv = {name: train("flow_grpo")(place, {"brightness": 1.0}) for name in ("train", "dry_run")}
    argv["dry_run"] = [*argv["dry_run"], "--dry_run"]
    shown = ["--prompts", str(PROMPTS / "shapes_validation.jsonl"), "--limit", "1", "--rewards", "[brightness]"]
    argv |= {name: [name, *shown] for name in ("eval", "compare")}
    assert main([*argv[command], "--model", str(place / "model")]) == 2
    assert not (place / "canary").exists()


def test_an_embedder_with_code_of_its_own_is_refused_without_a_question(place, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    (place / "model").mkdir()
    code = {"AutoConfig": "evil.X", "AutoModel": "evil.X", "AutoImageProcessor": "evil.X"}
    for name in ("config.json", "preprocessor_config.json"):
        (place / "model" / name).write_text(json.dumps({"auto_map": code, "model_type": "evil"}))
    (place / "model/evil.py").write_text((place / "evil.py").read_text())
    with pytest.raises(Exception, match=r"custom code|trust_remote_code|[Uu]nrecognized"):
        ImageEmbedder(place / "model")
    assert not (place / "canary").exists()


@pytest.mark.parametrize("question", ["{prompt.__class__}", "{prompt:>9999999999}", "{0}", "{prompt!r}", "{", "{x}"])
@pytest.mark.parametrize("name", ["vlm_rating", "vlm_pairwise", "vqascore"])
def test_a_question_is_no_program(name, question):
    options = {"url": "http://127.0.0.1:9", "model": "m"} if name.startswith("vlm") else {}
    question = question if options else "{}" + question
    with pytest.raises(ValueError, match="question"):
        get_reward(name, question=question, **options)


def test_trackers_are_a_list_of_names(place, capsys):
    argv = train("flow_grpo", report_to="evil")(place, {"brightness": 1.0})
    assert main(argv) == 2
    assert not (place / "canary").exists()


def test_every_option_that_configures_rewards_is_guarded():
    """A new configuration with rewards must say so, or a file could slip code through it."""
    for cls in (*map(config_class, algorithm_names()), EvaluationConfig, ScoreConfig, RelabelConfig):
        for field in dataclasses.fields(cls):
            if field.name in ("rewards", "eval_rewards", "held_out", "reward_options"):
                assert field.metadata["guard"], f"{cls.__name__}.{field.name}"
        typed = {field.name for field in dataclasses.fields(cls) if field.metadata.get("typed_only")}
        assert "allow_reward_code" in typed
