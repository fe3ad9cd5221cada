"""The two commands, as a user calls them, on a run of two steps."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import pad
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffalign.cli import main
from diffalign.commands import gallery
from diffalign.commands.evaluate_config import EvaluationConfig, resolve
from diffalign.commands.gallery import Gallery, SamplingSettings
from diffalign.evaluation.checkpoints import BASE, CheckpointSpec
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.report.html import write_page
from diffalign.rewards import get_reward
from diffalign.rewards.support.embedding import ImageEmbedder
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.runtime.tracking import MetricsLog
from diffalign.structures import Guidance, Prompt
from tests.conftest import PIPELINE


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    assert main(["eval", str(run_folder), f"none={run_folder}@0", "--output_dir", str(out)]) == 0
    return out


def test_settings_come_from_the_run_and_figures_equal_its_own(evaluated, run_folder):
    found = json.loads((evaluated / "results.json").read_text())
    assert found["settings"]["num_steps"] == 4
    assert list(found["models"]) == ["base", "tiny", "none"]
    base, *_, tuned = [r for r in MetricsLog.read(run_folder / "metrics.jsonl") if "eval/accuracy" in r]
    for name, row in (("base", base), ("tiny", tuned)):
        assert found["models"][name]["rewards"]["shapes"]["mean"] == pytest.approx(row["eval/shapes"], abs=1e-6)
        assert found["models"][name]["diversity"]["pixels"] == pytest.approx(row["eval/diversity"], abs=2e-3)  # 8 bits
    assert base["eval/diversity"] != tuned["eval/diversity"]


def test_scale_0_is_the_base_and_wins_half(evaluated):
    none = json.loads((evaluated / "results.json").read_text())["models"]["none"]
    assert none["wins"]["shapes"]["rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    for file in (evaluated / "images/base/images").iterdir():
        assert file.read_bytes() == (evaluated / "images/none/images" / file.name).read_bytes()
    assert (evaluated / "results.png").is_file()
    assert "| shapes: wins over base |" in (evaluated / "results.md").read_text()


def mean_reward(folder):
    return json.loads((folder / "results.json").read_text())["models"]["tiny"]["rewards"]


def test_an_interrupted_evaluation_resumes(evaluated, run_folder, monkeypatch, capsys):
    rows = evaluated / "images/tiny/scores-0.jsonl"
    before, text = mean_reward(evaluated), rows.read_text()
    lines = text.splitlines(keepends=True)
    rows.write_text("".join(lines[:7]) + lines[7][:20])  # the eighth line was being written
    drawn = []
    monkeypatch.setattr(gallery, "score", lambda r, images, p, own=gallery.score: drawn.extend(p) or own(r, images, p))
    assert main(["eval", str(run_folder), f"none={run_folder}@0", "--output_dir", str(evaluated)]) == 0
    assert len(drawn) == 12 - 7
    assert mean_reward(evaluated) == before
    assert sorted(rows.read_text().splitlines()) == sorted(text.splitlines())


def test_a_folder_refuses_images_of_other_settings_or_weights(evaluated, run_folder, capsys):
    argv = ["eval", str(run_folder), "--output_dir", str(evaluated)]
    assert main([*argv, "--guidance_scale", "3"]) == 2
    assert "guidance_scale (1.0, now 3.0)" in capsys.readouterr().err
    assert main([*argv, "--max_sequence_length", "32"]) == 2
    assert "max_sequence_length (16, now 32)" in capsys.readouterr().err
    assert main(["eval", f"tiny={run_folder / 'checkpoint-1'}", "--output_dir", str(evaluated)]) == 2
    assert "results of other settings" in capsys.readouterr().err


def test_a_comparison_over_checkpoints(run_folder, tmp_path):
    argv = ["compare", str(run_folder), "--checkpoints", "--limit", "3", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    data = page_data(tmp_path / "compare.html")
    assert data["models"] == ["base", "tiny 1", "tiny 2", "tiny final"]
    assert [row["task"] for row in data["rows"]] == ["single_object", "counting", "color_attr"]
    last = [(row["images"][2], row["scores"][2]) for row in data["rows"]]
    assert last == [(row["images"][3], row["scores"][3]) for row in data["rows"]]  # the last checkpoint is the result
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width > 4 * 128


def test_a_sweep_over_scales(run_folder, tmp_path):
    argv = ["compare", str(run_folder), "--scales", "[0, 1]", "--limit", "1", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    (row,) = page_data(tmp_path / "compare.html")["rows"]
    assert row["images"][0] == row["images"][1] != row["images"][2]


def page_data(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # nothing from outside
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


@pytest.mark.slow
def test_a_page_of_100_prompts_and_4_models_stays_below_10_megabytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(512, 512, 3, generator=generator) * 255).byte().numpy()  # the worst to compress
    Image.fromarray(noise).save(tmp_path / "noise.png")
    prompts = [Prompt(f"</script><b>{i}</b>", {"tag": "a"}) for i in range(100)]
    judged = gallery.ScoredImages(
        torch.arange(100), {"r": torch.full((100,), torch.nan)}, [tmp_path / "noise.png"] * 100
    )
    write_page(tmp_path / "page.html", "t", prompts, dict.fromkeys("abcd", judged))
    assert (tmp_path / "page.html").stat().st_size < 10_000_000
    data = page_data(tmp_path / "page.html")
    assert data["rows"][7]["prompt"] == "</script><b>7</b>"
    assert data["rows"][7]["scores"] == [[None]] * 4


def test_processes_share_the_prompts(frozen, tmp_path, train_prompts):
    """Two processes, one after the other, draw what one process draws."""
    sampling = SamplingSettings(str(PIPELINE), 16, None, 2, "pipeline", 2.0, 2, 0)
    rewards = {"shapes": get_reward("shapes")}
    alone = Gallery(tmp_path / "one", sampling, train_prompts, rewards)
    alone.draw(frozen, BASE, 5, lambda n: None)
    shared = [Gallery(tmp_path / "two", sampling, train_prompts, rewards, process=i, processes=2) for i in range(2)]
    shared[1].draw(frozen, BASE, 5, lambda n: None)
    with pytest.raises(ValueError, match="lacks 6 images"):
        shared[0].load(BASE)
    shared[0].draw(frozen, BASE, 5, lambda n: None)
    one, two = alone.load(BASE), shared[0].load(BASE)
    assert torch.equal(one.prompt, two.prompt)
    assert torch.equal(one.scores["shapes"], two.scores["shapes"])
    assert torch.allclose(one.images(), two.images(), atol=1 / 255 + 1e-6)


def test_a_prompt_is_encoded_once_for_all_models_and_commands(frozen, run_folder, tmp_path, train_prompts, monkeypatch):
    encoded, encode = [], type(frozen).encode
    monkeypatch.setattr(type(frozen), "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    sampling, rewards = (
        SamplingSettings(str(PIPELINE), 16, None, 1, "pipeline", 1.0, 1, 0),
        {"shapes": get_reward("shapes")},
    )
    for folder, specs in (("one", [BASE, CheckpointSpec("tuned", run_folder)]), ("two", [BASE])):
        drawn = Gallery(tmp_path / folder, sampling, train_prompts[:2], rewards, cache=tmp_path / "cache")
        for spec in specs:
            drawn.draw(frozen, spec, 1, lambda n: None)
    assert encoded == [p.text for p in train_prompts[:2]]


def test_offload_and_cache_dir_default_to_those_of_the_run(eval_prompts, tmp_path):
    lines = [f"model: {PIPELINE}", f"eval_prompts: {eval_prompts}", "rewards: {shapes: 1.0}"]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "offload: [vae, rewards]", "cache_dir: kept"]))
    found = resolve(EvaluationConfig(models=(str(tmp_path),), allow_reward_code=True), tmp_path, 1)
    assert (found.offload, found.cache_dir, found.prompts) == (("vae",), Path("kept"), eval_prompts)
    own = resolve(EvaluationConfig(models=(str(tmp_path),), prompts=eval_prompts, offload=()), tmp_path, 1)
    assert (own.offload, own.cache_dir) == ((), None), "what lies outside of a run needs consent"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_makes_the_first_steps_of_what_is_tuned(frozen, run_folder, tmp_path, train_prompts, kind):
    if kind == "full":
        other = copy.deepcopy(frozen.raw_denoiser)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 1.1
        other.save_pretrained(tmp_path / "weights" / frozen.denoiser_name)
    spec = CheckpointSpec("tuned", run_folder if kind == "lora" else tmp_path / "weights")

    def drawn(spec, share):
        sampling = SamplingSettings(str(PIPELINE), 16, None, 2, "pipeline", 1.0, 1, 0, base_share=share)
        found = Gallery(tmp_path / f"{share}", sampling, train_prompts[:2], {"shapes": get_reward("shapes")})
        found.draw(frozen, spec, 2, lambda n: None)
        return found.load(spec).images()

    base, none, half, every = drawn(BASE, 0.9), *(drawn(spec, share) for share in (0.0, 0.5, 0.9))
    assert torch.equal(every, base)  # 0.9 of two steps are both
    assert not torch.equal(half, base)
    assert not torch.equal(half, none)
    assert not hasattr(frozen, "weights")


@pytest.fixture
def negative_run(model, tmp_path):
    """A run folder whose negative prompt has moved far, and the model that it was trained on."""
    folder = tmp_path / "reneg"
    negative = model.train_negative()
    with torch.no_grad():
        for parameter in negative.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save(folder)
    (folder / "prompts.txt").write_text("a red circle\ntwo squares\n")
    config = {"model": str(PIPELINE), "max_sequence_length": 16, "eval_prompts": str(folder / "prompts.txt")}
    config |= {"rewards": {"jpeg_compressibility": 1.0}, "guidance_scale": 3.0, "eval_num_steps": 2}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder, model


def test_evaluation_guides_away_from_the_trained_negative_prompt(negative_run, tmp_path):
    folder, model = negative_run
    assert main(["eval", str(folder), "--images_per_prompt", "1", "--output_dir", str(tmp_path / "eval")]) == 0
    prompt = torch.arange(2)
    noise_keys = NoiseKeys(KeyedRNG(0), "evaluation", 0, prompt, torch.zeros_like(prompt))
    conditioning = PromptEmbeddingCache(model)(["a red circle", "two squares"])
    for name, against in (("base", model.unconditional()), ("reneg", model.negative.conditioning(model.negative()))):
        plan = SamplingPlan(ode_plan(2), model.levels(2), Guidance(3.0, against))
        ((_, expected),) = generate(model, plan, conditioning, prompt, noise_keys, 2)
        for i, image in enumerate(expected):
            with Image.open(tmp_path / f"eval/images/{name}/images/{i:05d}-0.png") as picture:
                assert (pil_to_tensor(picture) / 255 - image).abs().max() < 1 / 255 + 1e-4


@pytest.mark.parametrize(
    ("guidance", "scale", "tokens", "message"),
    [
        (1.0, 1.0, 0, "give the guidance_scale that it was trained with"),
        (3.0, 0.5, 0, "is no LoRA, and has no scale: leave out @0.5"),
        (3.0, 1.0, 8, "give the model and the max_sequence_length that it was trained with"),
    ],
)
def test_a_negative_prompt_without_effect_is_refused(frozen, tmp_path, guidance, scale, tokens, message):
    named = frozen.negative_arguments(frozen.unconditional())
    named["negative_prompt_embeds"] = pad(named["negative_prompt_embeds"], (0, 0, 0, tokens))
    save_file(named, tmp_path / "negative_prompt.safetensors")
    sampling = SamplingSettings(str(PIPELINE), 16, None, 2, "pipeline", guidance, 1, 0)
    found = Gallery(tmp_path / "images", sampling, [Prompt("a circle")], {})
    with pytest.raises(ValueError, match=message):
        found.draw(frozen, CheckpointSpec("tuned", tmp_path, scale), 2, lambda n: None)
    assert frozen.negative is None


def test_the_share_of_the_base_and_the_steps_come_from_the_run(tmp_path):
    run = "model: m\neval_prompts: p.jsonl\nrewards: {shapes: 1.0}\nbase_share: 0.25\nrecipe: {num_steps: 8}\n"
    (tmp_path / "config.yaml").write_text(run)
    (tmp_path / "eval_prompts.jsonl").touch()
    sampling = resolve(EvaluationConfig(models=(str(tmp_path),)), tmp_path, 1).sampling()
    assert (sampling.num_steps, sampling.base_share, sampling.base_steps) == (8, 0.25, 2)
    own = EvaluationConfig(models=(str(tmp_path),), base_share=0.0)
    assert resolve(own, tmp_path, 1).sampling().base_steps == 0
    with pytest.raises(ValueError, match="base_share must be at least 0 and less than 1"):
        resolve(EvaluationConfig(models=(str(tmp_path),), base_share=1.0), tmp_path, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval"], "model is missing"),
        (["eval", "--model", str(PIPELINE)], "prompts is missing"),
        (["eval", "nowhere"], "nowhere: no such"),
        (["compare", "--no_such", "1"], "unknown key 'no_such'"),
    ],
)
def test_missing_settings_are_named(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_images_are_embedded_by_a_model_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=32, patch_size=16, projection_dim=8)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    images = torch.rand(3, 3, 64, 64)
    found = ImageEmbedder(tmp_path)(images)
    assert found.shape[0] == 3
    assert torch.allclose(ImageEmbedder(tmp_path)(images[1:2]), found[1:2], atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_models_are_compared_at_a_height_and_a_width(run_folder, tmp_path):
    """The grid has wide cells; a second call finds the images of the first."""
    out = tmp_path / "out"
    command = ["compare", str(run_folder), "--output_dir", str(out), "--limit", "2", "--num_steps", "2"]
    assert main([*command, "--resolution", "48,80"]) in (0, None)
    images = sorted((out / "images").rglob("*.png"))
    assert {Image.open(file).size for file in images} == {(80, 48)}
    times = [file.stat().st_mtime_ns for file in images]
    assert main([*command, "--resolution", "[48, 80]"]) in (0, None)
    assert [file.stat().st_mtime_ns for file in images] == times
    with Image.open(out / "compare.png") as grid:
        assert grid.size[1] < 400


def test_an_evaluation_at_several_sizes_is_that_at_each_of_them(run_folder, tmp_path, capsys):
    """Each size has its folder, the same figures as alone, and its section in the tables of all."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    common = [str(run_folder), "--limit", "2", "--num_steps", "2", "--images_per_prompt", "1"]
    assert main(["eval", *common, "--output_dir", str(out), "--sizes", "[48, [48, 80]]"]) in (0, None)
    assert main(["eval", *common, "--output_dir", str(alone), "--resolution", "[48, 80]"]) in (0, None)

    found = json.loads((out / "results.json").read_text())["sizes"]
    assert list(found) == ["48x48", "48x80"]
    assert found["48x80"]["models"] == json.loads((alone / "results.json").read_text())["models"]
    assert found["48x48"]["settings"]["resolution"] == 48
    sections = (out / "results.md").read_text().split("## ")[1:]
    assert [section.split("\n")[0] for section in sections] == list(found)

    assert main(["compare", *common, "--output_dir", str(out), "--sizes", "[48, [48, 80]]"]) in (0, None)
    assert all((out / size / "compare.html").is_file() for size in found)
    assert {Image.open(file).size for file in (out / "48x80" / "images").rglob("*.png")} == {(80, 48)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "[48, 48]"], "sizes: 48x48 is given more than once"),
        (["--sizes", "[48, [48, 48]]"], "sizes: 48x48 is given more than once"),
        (["--sizes", "[48]", "--resolution", "64"], "resolution: sizes are given as well"),
        (["--sizes", "[0]"], "sizes"),
        (["--sizes", "[[48, 80, 3]]"], "sizes"),
        (["--sizes", "wide"], "sizes"),
        (["--sizes", "[48, 50]"], "resolution 50 x 50: sides of this model's images are multiples of 16"),
    ],
)
def test_sizes_that_cannot_be_are_refused(run_folder, tmp_path, argv, message, capsys):
    out = tmp_path / "out"
    assert main(["eval", str(run_folder), "--output_dir", str(out), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
