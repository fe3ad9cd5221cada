"""Where pairs come from, each by the command line."""

import json
import shutil

import pytest
import torch

from diffalign import LoraConfig, load_model
from diffalign.cli import main
from diffalign.commands.label import command
from diffalign.commands.label.kinds import kind_of
from tests.commands.label.world import BLUE, RED, picture
from tests.conftest import PIPELINE

GREEN = picture((30, 200, 30))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


def rows(path, *lines):
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


def three(folder, **more):
    """Three pairs whose images are files."""
    for i in range(3):
        for side, content in enumerate((RED, BLUE)):
            write(folder / f"{i}-{side}.png", content)
    return [{"prompt": f"p{i}", "image_0": f"{i}-0.png", "image_1": f"{i}-1.png", **more} for i in range(3)]


def jsonl(folder):
    return rows(folder / "pairs.jsonl", *three(folder))


def csv(folder):
    lines = [f"{row['prompt']},{row['image_0']},{row['image_1']}" for row in three(folder)]
    return write(folder / "pairs.csv", "\n".join(["prompt,image_0,image_1", *lines]) + "\n")


def parquet(folder, **more):
    import datasets

    table = {"caption": ["p0", "p1", "p2"], "jpg_0": [RED] * 3, "jpg_1": [BLUE] * 3, **more}
    path = folder / "pairs.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table).to_parquet(path)
    return path


def labelled_parquet(folder):
    return parquet(folder, label_0=[1.0, 0.0, None], model_0=["a"] * 3, model_1=["b"] * 3)


def saved_dataset(folder):
    import datasets

    datasets.Dataset.from_dict({"caption": ["p0", "p1", "p2"], "jpg_0": [RED] * 3, "jpg_1": [BLUE] * 3}).save_to_disk(
        folder / "saved"
    )
    return folder / "saved"


def sides(folder):
    for i in range(3):
        write(folder / f"two/chosen/{i}.png", RED)
        write(folder / f"two/rejected/{i}.png", BLUE)
        write(folder / f"two/chosen/{i}.txt", f"p{i}")
    return folder / "two"


def rollouts(folder):
    lines = []
    for i in range(3):
        for side, content in enumerate((RED, BLUE)):
            write(folder / f"buffer/images/{i}-{side}.png", content)
            lines.append({"file_name": f"images/{i}-{side}.png", "prompt": f"p{i}", "group": i, "sample": side,
                          "rewards": {"r": 1 - side}})  # fmt: skip
    rows(folder / "buffer/metadata.jsonl", *lines)
    write(folder / "buffer/nodes.safetensors", b"")
    return folder / "buffer"


SOURCES = [jsonl, csv, parquet, labelled_parquet, saved_dataset, sides, rollouts]


@pytest.fixture
def label(tmp_path, monkeypatch):
    """Run the command without a server; returns the pairs and the exit code."""
    seen = []
    monkeypatch.setattr(command, "serve", lambda config, sitting, token: seen.append(sitting))

    def run(*argv):
        seen.clear()
        code = main(["label", *map(str, argv), "--output_dir", str(tmp_path / "out")])
        return (seen[0].pairs if seen else None), code

    return run


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_pairs_of_every_kind_of_data(make, tmp_path, label):
    source = make(tmp_path / "data")
    assert kind_of(str(source)) == "pairs"
    pairs, code = label(source)
    assert code == 0
    assert [pair.prompt.text for pair in pairs] == ["p0", "p1", "p2"]
    assert [[image.read() for image in pair.images] for pair in pairs] == [[RED, BLUE]] * 3
    assert all(pair.key.startswith(source.name + "#") for pair in pairs)
    has_models = make is labelled_parquet
    assert {pair.models for pair in pairs} == {("a", "b") if has_models else ("", "")}
    if has_models:
        assert [pair.label for pair in pairs] == [1, 0, None]
    assert len(label(source, "--limit", 2)[0]) == 2


@pytest.mark.parametrize("make", [jsonl, parquet, sides], ids=lambda make: make.__name__)
def test_rewards_score_the_pairs_and_order_them(make, tmp_path, label):
    source = make(tmp_path / "data")
    pairs, code = label(source, "--rewards", "brightness,jpeg_compressibility", "--order", "disagreement")
    assert code == 0
    assert set(pairs[0].scores) == {"brightness", "jpeg_compressibility"}
    assert pairs[0].gap("brightness") == pytest.approx(pairs[2].gap("brightness"))
    assert pairs[0].gap("brightness") > 0.1
    assert (tmp_path / "out/scores").is_dir()
    assert not (tmp_path / "data/.labels").exists()


def test_the_rewards_of_a_buffer_are_scores_and_several_decide_nothing(tmp_path, label):
    folder = rollouts(tmp_path / "data")
    pairs, _ = label(folder)
    assert pairs[0].scores == {"r": (1, 0)}
    assert pairs[0].label == 1
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["rewards"] |= {"other": line["sample"] if line["group"] == 1 else 1 - line["sample"]}
    rows(folder / "metadata.jsonl", *lines, {**lines[0], "sample": 2}, {**lines[1], "sample": 3})
    pairs, code = label(folder, "--order", "disagreement")
    assert code == 0
    assert [pair.prompt.text for pair in pairs] == ["p0", "p0", "p1", "p2"]
    assert [pair.label for pair in pairs] == [None] * 4
    assert pairs[2].scores == {"r": (1, 0), "other": (0, 1)}
    assert len(label(folder, "--data.rollouts.rule", "all")[0]) == 6 + 1 + 1
    assert len(label(folder, "--data.rollouts.rewards", "r")[0]) == 3
    assert set(label(folder, "--rewards", "brightness")[0][0].scores) == {"r", "other", "brightness"}


def test_folders_of_images_are_models(tmp_path, label):
    for name, content in (("sd", RED), ("flux", BLUE), ("third", GREEN)):
        for i in range(2):
            write(tmp_path / f"{name}/{i}.png", content)
    write(tmp_path / "sd/9.jpg", RED)
    rows(tmp_path / "flux/metadata.jsonl", *({"file_name": f"{i}.png", "prompt": f"p{i}"} for i in range(2)))
    write(tmp_path / "sd/9.txt", "alone")
    shutil.copy(tmp_path / "flux/metadata.jsonl", tmp_path / "third")
    pairs, code = label(tmp_path / "sd", f"mine={tmp_path / 'flux'}", tmp_path / "third", "--order", "ranking")
    assert code == 0
    found = [(pair.models, pair.prompt.text, pair.images[0].read(), pair.images[1].read()) for pair in pairs]
    assert found == [
        (models, f"p{i}", *contents)
        for models, contents in ((("sd", "mine"), (RED, BLUE)), (("sd", "third"), (RED, GREEN)),
                                 (("mine", "third"), (BLUE, GREEN)))
        for i in range(2)
    ]  # fmt: skip
    pairs, code = label(tmp_path / "sd", tmp_path / "third", "--rewards", "brightness", "--order", "disagreement")
    assert (code, len(pairs[0].scores)) == (0, 1)


def test_prompts_of_folders_from_a_file(tmp_path, label, capsys):
    for name in ("sd", "flux"):
        for i in range(2):
            write(tmp_path / f"{name}/{i}.png", RED)
    assert label(tmp_path / "sd", tmp_path / "flux") == (None, 2)
    assert "--prompts FILE" in capsys.readouterr().err
    prompts = write(tmp_path / "prompts.txt", "one\ntwo\n")
    pairs, _ = label(tmp_path / "sd", tmp_path / "flux", "--prompts", prompts)
    assert [pair.prompt.text for pair in pairs] == ["one", "two"]
    write(prompts, "one\ntwo\nthree\n")
    assert label(tmp_path / "sd", tmp_path / "flux", "--prompts", prompts) == (None, 2)
    assert "3 prompts for 2 file names" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A LoRA that changes what is drawn."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = load_model(PIPELINE, max_sequence_length=16)
    model.train(LoraConfig(rank=2))
    with torch.no_grad():
        for number, weight in enumerate(model.weights.trainable):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def drawing(eval_prompts):
    """Options of small images."""
    return ("--model", PIPELINE, "--max_sequence_length", 16, "--prompts", eval_prompts, "--limit", 2, "--num_steps", 2)


def test_models_are_drawn_from_the_same_noise_and_paired(tmp_path, label, drawing, tuned):
    pairs, code = label("base", tuned, *drawing, "--rewards", "brightness", "--order", "ranking")
    assert code == 0
    assert [pair.models for pair in pairs] == [("base", "tiny")] * 2
    assert all(pair.images[0].read() != pair.images[1].read() for pair in pairs)
    assert all(list(pair.scores) == ["brightness"] for pair in pairs)
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(drawn) == 4
    again, _ = label(tuned, *drawing, "--rewards", "brightness")  # a single model is compared with the base
    assert [pair.key for pair in again] == [pair.key for pair in pairs]
    assert drawn == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}  # nothing is drawn twice


def test_one_model_is_compared_with_itself(label, drawing, capsys):
    pairs, code = label("base", *drawing)
    assert code == 0
    assert [pair.models for pair in pairs] == [("base", "base")] * 2
    assert all(pair.images[0].read() != pair.images[1].read() for pair in pairs)
    assert label("base", *drawing, "--images_per_prompt", 1)[1] == 2
    assert "--images_per_prompt 2" in capsys.readouterr().err


def test_what_a_source_is(tmp_path, tuned):
    assert [kind_of(text) for text in ("base", str(tuned), f"a={tuned}", f"{tuned}@0.5")] == ["model"] * 4
    assert kind_of(str(tuned / "pytorch_lora_weights.safetensors")) == "model"
    write(tmp_path / "a=b/1.png", RED)
    assert kind_of(str(tmp_path / "a=b")) == "pictures"
    assert kind_of(f"n={tmp_path / 'a=b'}") == "pictures"
    assert kind_of("owner/data") == kind_of("nowhere.parquet") == "pairs"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name models or pairs"),
        (["nowhere"], "nothing at 'nowhere': name base, a run folder"),
        (["a=nowhere"], "nowhere: no such file or folder"),
        (["x" * 5000], "nothing at 'xxx"),
        (["{pairs}", "{pairs}"], "named twice"),
        (["{pairs}", "--order", "ranking"], "two or more models"),
        (["{pairs}", "--order", "disagreement"], "needs rewards"),
        (["{pairs}", "--num_steps", "3"], "num_steps: no source reads it"),
        (["{pairs}", "--prompts", "{pairs}"], "prompts: no source reads it"),
        (["base", "--data.max_bad_share", "1"], "data: no source reads it"),
        (["{pairs}", "--data.ties", "soft"], "data.ties: label shows every pair as it is"),
        (["{pairs}", "--data.labels", "ai"], "data.labels: label shows"),
        (["{pairs}", "--reward_options", "{{a: 1}}"], "reward_options: no reward is named"),
        (["{pairs}", "--raters_per_pair", "0"], "raters_per_pair"),
        (["{pairs}", "--token_env", "NOT_SET"], "NOT_SET"),
        (["{pairs}", "--data.format", "hpdv3"], "format hpdv3 needs the column path1"),
        (["{folder}/one"], "a second folder"),
        (["{folder}/one", "{folder}/other"], "no file name in common"),
        (["{folder}/one", "x/one={folder}/one", "--data.max_bad_share", "1"], "no prompt"),
    ],
)
def test_mistakes_end_in_a_sentence(argv, message, tmp_path, label, capsys):
    pairs = jsonl(tmp_path / "data")
    write(tmp_path / "one/a.png", RED)
    write(tmp_path / "other/b.png", RED)
    _, code = label(*(text.format(pairs=pairs, folder=tmp_path) for text in argv))
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert len(error) < 2000
    assert "Traceback" not in error


def test_moved_data_keeps_its_answers(tmp_path, label):
    source = jsonl(tmp_path / "data")
    keys = [pair.key for pair in label(source)[0]]
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    assert [pair.key for pair in label(tmp_path / "elsewhere/pairs.jsonl")[0]] == keys


def test_a_folder_has_one_server(tmp_path, label, capsys, monkeypatch):
    source = jsonl(tmp_path / "data")
    codes = []
    monkeypatch.setattr(command, "serve", lambda *args: codes.append(label_again(source, tmp_path)))
    assert main(["label", str(source), "--output_dir", str(tmp_path / "out")]) == 0
    assert codes == [2]
    assert "diffalign: " in capsys.readouterr().err


def label_again(source, folder):
    return main(["label", str(source), "--output_dir", str(folder / "out")])


def test_results_are_written_and_only_written_on_request(tmp_path, monkeypatch, capsys):
    source = jsonl(tmp_path / "data")

    def answer_all(config, sitting, token):
        for rater, picks in (("Ada", ("left", "equal", "bad")), ("Bob", ("left", "right", "skip"))):
            for pick in picks:
                sitting.answer(rater, sitting.upcoming(rater)[0].token, pick, 1.5)

    monkeypatch.setattr(command, "serve", answer_all)
    argv = ["label", str(source), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "preferences.parquet: 5 rows, 2 ties; train on them" in printed
    assert "--data.ties soft" in printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["raters"].keys() == {"Ada", "Bob"}
    assert (tmp_path / "out/results.md").read_text() in printed + "\n"

    monkeypatch.setattr(command, "serve", lambda *args: pytest.fail("no page was asked for"))
    before = (tmp_path / "out/preferences.parquet").read_bytes()
    (tmp_path / "out/preferences.parquet").unlink()
    assert main([*argv, "--export_only", "true", "--both_bad", "drop"]) == 0
    assert "4 rows, 1 ties" in capsys.readouterr().out
    assert (tmp_path / "out/preferences.parquet").read_bytes() != before
