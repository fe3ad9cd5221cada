"""Make the embedded preference data: pairs of the pipeline's own images in Pick-a-Pic's columns.

    python scripts/build/shapes_preferences.py      # about 10 minutes on a core

For each training caption the pipeline draws ``GROUP`` images; the verifier's best and worst make a pair, in random
order, or a tie where all are equally good. Images are JPEG, as there. Writes ``assets/preferences/shapes.parquet``.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import uuid
from pathlib import Path

import torch
from datasets import Dataset, Features, Value
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.cli import use_all_cores
from diffalign.models import load_model
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.shapes import caption, judge_batch
from diffalign.structures import Guidance
from scripts import ROOT

PIPELINE = ROOT / "assets/shapes-sd3"
GROUP = 8
PROMPTS = 32  # at a time
STEPS = 8
QUALITY = 92

# Pick-a-Pic's columns, in its order.
FEATURES = Features(
    {
        "are_different": Value("bool"),
        "best_image_uid": Value("string"),
        "caption": Value("string"),
        "created_at": Value("timestamp[ns]"),
        "has_label": Value("bool"),
        "image_0_uid": Value("string"),
        "image_0_url": Value("string"),
        "image_1_uid": Value("string"),
        "image_1_url": Value("string"),
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "label_0": Value("float64"),
        "label_1": Value("float64"),
        "model_0": Value("string"),
        "model_1": Value("string"),
        "ranking_id": Value("int64"),
        "user_id": Value("int64"),
        "num_example_per_prompt": Value("int64"),
    }
)


def jpeg(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil_image(image.clamp(0, 1)).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def seen(content: bytes) -> torch.Tensor:
    """What a reader sees of a file: (3, H, W), [0, 1]. ScoredImages is what is shipped."""
    return pil_to_tensor(Image.open(io.BytesIO(content))).float() / 255


def row(number: int, text: str, files: tuple[bytes, bytes], label: float, rng: random.Random) -> dict[str, object]:
    names = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in files]
    best = "tie" if label == 0.5 else names[0 if label == 1 else 1]
    return {
        "are_different": files[0] != files[1],
        "best_image_uid": best,
        "caption": text,
        "created_at": None,
        "has_label": True,
        **{f"image_{side}_uid": names[side] for side in (0, 1)},
        **{f"image_{side}_url": "" for side in (0, 1)},
        **{f"jpg_{side}": files[side] for side in (0, 1)},
        "label_0": label,
        "label_1": 1 - label,
        **{f"model_{side}": PIPELINE.name for side in (0, 1)},
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": 1,
    }


def pick(scores: list[float], rng: random.Random) -> tuple[int, int, float]:
    """Pick the best and the worst image of a group, in random order, with the label of the first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    worst, best = order[0], order[-1]
    first, second = (best, worst) if rng.random() < 0.5 else (worst, best)
    return first, second, 0.5 + 0.5 * ((scores[first] > scores[second]) - (scores[first] < scores[second]))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "assets/preferences/shapes.parquet")
    args = parser.parse_args()
    use_all_cores()
    model, rng = load_model(PIPELINE, max_sequence_length=16), random.Random(args.seed)
    route = SamplingPlan(ode_plan(STEPS), model.levels(STEPS), Guidance())
    prompts = [caption(rng) for _ in range(args.pairs)]
    rows: list[dict[str, object]] = []
    for begin in tqdm(range(0, len(prompts), PROMPTS)):
        part = prompts[begin : begin + PROMPTS]
        own = torch.arange(len(part)).repeat_interleave(GROUP)
        addresses = NoiseKeys(KeyedRNG(args.seed), "preferences", begin, own, torch.arange(GROUP).repeat(len(part)))
        conditioning = model.encode([p.text for p in part])
        drawn = generate(model, route, conditioning, own, addresses, PROMPTS * GROUP)
        files = [jpeg(image) for _, images in drawn for image in images]
        pixels = torch.stack([seen(content) for content in files])
        verdicts = judge_batch(pixels, [part[i].metadata for i in own.tolist()])
        scores = [(verdict.score + verdict.strict) / 2 for verdict in verdicts]
        for place, prompt in enumerate(part):
            group = slice(place * GROUP, (place + 1) * GROUP)
            first, second, label = pick(scores[group], rng)
            chosen = files[group][first], files[group][second]
            rows.append(row(len(rows), prompt.text, chosen, label, rng))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(args.output)
    ties = sum(r["label_0"] == 0.5 for r in rows) / len(rows)
    print(f"{args.output}: {len(rows)} pairs, {ties:.1%} ties, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
