"""Small judges in the layouts of the published ones, and small files of prompts in the authors' formats."""

import csv
import json
from dataclasses import dataclass

import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from diffalign.commands.bench import command
from diffalign.data.prompt_sets import CLASSES
from diffalign.data.prompt_source import STYLES
from diffalign.rewards.geneval import RENAMED
from tests.conftest import ROOT
from tests.rewards import tiny_checkpoints

JUDGES = ROOT / "assets/judges"
GRAPH = {"1": "Is there a circle?", "2": "Is the circle red?", "3": "Is there a square?"}


def coco_detector(folder):
    """A detector of random weights with COCO's classes, under their own names."""
    torch.manual_seed(3)
    coco = {ours: theirs for theirs, ours in RENAMED.items() if theirs in ("mouse", "remote", "keyboard")}
    labels = {number: coco.get(name, name) for number, name in enumerate(CLASSES)}
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=8,
        id2label=labels, label2id={name: number for number, name in labels.items()},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge_options(tmp_path_factory):
    """Judge of a benchmark -> the options that make it of small weights."""
    make = tmp_path_factory.mktemp
    clip = str(tiny_checkpoints.clip(make("clip")))
    qwen = str(tiny_checkpoints.qwen("qwen2_5_vl", make("qwen2_5")))
    qwen3 = str(tiny_checkpoints.qwen("qwen3_vl", make("qwen3")))
    image_reward = str(tiny_checkpoints.image_reward(make("image-reward")))
    detector = str(coco_detector(make("detector")))
    hps = {"path": str(JUDGES / "hps")}
    panel = {
        "pickscore": {"path": str(JUDGES / "pickscore"), "tokenizer": str(JUDGES / "pickscore")},
        "clipscore": {"path": clip},
        "hpsv2.1": hps,
        "aesthetic": {"path": str(JUDGES / "aesthetic/aesthetic-model.pth"), "clip": str(JUDGES / "pickscore")},
        "image_reward": {"path": image_reward, "tokenizer": image_reward},
    }
    vqascore = {
        "vqascore": {"path": str(JUDGES / "vqascore"), "tokenizer": str(JUDGES / "vqascore"), "precision": "no"}
    }
    return {
        "geneval": {"geneval": {"path": detector, "clip": clip}},
        "geneval2": {"vqa": {"path": qwen3, "precision": "no"}},
        "dpg_bench": {"vqa": {"path": qwen, "precision": "no"}},
        "oneig": {"vqa": {"path": qwen, "precision": "no"}},
        "wise": {"vqa": {"path": qwen3, "precision": "no"}},
        "t2i_compbench": {
            "vqa": {"path": qwen, "precision": "no"},
            "detector": {"path": detector},
            "clip": {"path": clip},
        },
        "genai_bench": vqascore,
        "genai_rank": vqascore,
        "hpdv2": {"hpsv2.1": hps},
        "drawbench": panel,
        "pickapic": panel,
    }


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Benchmark -> small prompts in the authors' own format, as --prompts takes them."""
    root = tmp_path_factory.mktemp("sources")
    lines = [
        {"prompt": "a photo of a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]},
        {"prompt": "a photo of two dogs", "tag": "counting", "include": [{"class": "dog", "count": 2}],
         "exclude": [{"class": "dog", "count": 3}]},
    ]  # fmt: skip
    found = {"geneval": write_lines(root / "geneval.jsonl", lines)}
    atoms = [["How many cats are in the image?", "two"], ["Are the cats black?", "Yes"]]
    lines = [{"prompt": f"two black cats {i}", "atom_count": 3 + i, "vqa_list": atoms, "skills": ["count", "attribute"]}
             for i in range(2)]  # fmt: skip
    found["geneval2"] = write_lines(root / "geneval2_data.jsonl", lines)
    found["dpg_bench"] = dpg_csv(root / "dpg_bench.csv")
    found["oneig"] = oneig_folder(root / "oneig")
    found["wise"] = wise_folder(root / "wise")
    found["t2i_compbench"] = compbench_folder(root / "compbench")
    skills = {"basic": [1, 2], "counting": [2], "advanced": [2]}
    for name, file in (("genai_bench", "genai_image.json"), ("genai_rank", "human_rating.json")):
        items = {f"{n:05d}": {"id": f"{n:05d}", "prompt": f"{n} red circles", "models": {}} for n in (1, 2)}
        found[name] = write_json(root / name, {file: items, "genai_skills.json": skills})
    found["hpdv2"] = write_json(root / "hpdv2", {f"{style}.json": [f"{style} of a circle"] for style in STYLES})
    plain = root / "plain.txt"
    plain.write_text("a red circle\na blue square\n")
    return {name: str(path) for name, path in (found | {"drawbench": plain, "pickapic": plain}).items()}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_json(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def dpg_csv(path):
    names = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
             "tuple", "question_natural_language"]  # fmt: skip
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(names)
        for item in ("COCOval_1", "localized_2"):
            for number, above, kind in (("1", "0", "entity - whole (circle)"), ("2", "1", "attribute - color (red)"),
                                        ("3", "0", "entity - whole (square)")):  # fmt: skip
                rows.writerow([item, f"{item}: a red circle", "", number, above, "", "", kind, GRAPH[number]])
    return path


def oneig_folder(root):
    graphs = {
        "000": {"question": GRAPH, "dependency": {"1": [0], "2": [1], "3": [0]}},
        "001": {"question": json.dumps(GRAPH), "dependency": json.dumps({"1": [0], "2": [1], "3": [2]})},
    }
    write_json(root, {})
    (root / "scripts/alignment/Q_D").mkdir(parents=True)
    rows = ["category,id,prompt_en"]
    for name, category in (("anime", "Anime_Stylization"), ("human", "Portrait"), ("object", "General_Object")):
        (root / f"scripts/alignment/Q_D/{name}.json").write_text(json.dumps(graphs))
        rows += [f"{category},{key},{name} {key}" for key in graphs]
    (root / "OneIG-Bench.csv").write_text("\n".join(rows) + "\n")
    return root


def wise_folder(root):
    def rows(*numbers):
        return [{"prompt_id": n, "Prompt": f"prompt {n}", "Explanation": "a red circle.", "Category": "c",
                 "Subcategory": "s"} for n in numbers]  # fmt: skip

    return write_json(
        root,
        {
            "cultural_common_sense.json": rows(1, 400),
            "spatio-temporal_reasoning.json": rows(401, 567, 568, 700),
            "natural_science.json": rows(701, 801, 901, 1000),
        },
    )


def compbench_folder(root):
    texts = {
        "color": "a green bench and a blue bowl",
        "shape": "a round cookie and a square container",
        "texture": "a fluffy rug and a wooden table",
        "spatial": "a dog on the right of a cell phone",
        "3d_spatial": "a dog behind a car",
        "numeracy": "three cats, two men and a bus",
        "non_spatial": "A chef is holding a knife.",
        "complex": "The black cat was next to the white car.",
    }
    root.mkdir()
    for name, text in texts.items():
        (root / f"{name}_val.txt").write_text(text + "\n")
    (root / "complex_val_spatial.txt").write_text(texts["complex"] + "\n")
    return root


@dataclass(frozen=True)
class Bench:
    """Runs a benchmark at small size through the command line, on the embedded pipeline that is loaded already."""

    options: dict
    sources: dict

    def argv(self, name, model, out, *more):
        judges = {judge: {"options": own} for judge, own in self.options[name].items()}
        given = {"--prompts": self.sources[name], "--judges": json.dumps(judges), "--output_dir": str(out)}
        sampling = {"--num_steps": "1", "--guidance_scale": "3", "--max_sequence_length": "16"}
        options = [part for pair in (given | sampling).items() for part in pair]
        return ["bench", name, model, *options, *more]


@pytest.fixture
def bench(judge_options, sources, frozen, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *args, **options: frozen)
    return Bench(judge_options, sources)
