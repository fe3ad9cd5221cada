"""Sample from saved weights with plain diffusers in fresh processes, without this package.

One process per pipeline, so that families share no state. They are forked from a process that has only imported
diffusers, because the import takes longer than sampling.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TEXTS = ["a red circle", "a blue square"]
STEPS = 4

# argv: a JSON list of [pipeline, folder, name of the argument that carries the LoRA's scale, arguments of the call];
# each folder has noise.safetensors and gets the images that its weights draw from it.
SCRIPT = """
import json, os, sys
import diffusers, peft, torch
from importlib import import_module
from inspect import signature
from itertools import groupby
from pathlib import Path
from safetensors.torch import load_file, save_file

def load(path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if "unet" in pipe.components or type(pipe).__name__ == "PixArtSigmaPipeline":
        spacing = {"timestep_spacing": "leading"} if pipe.scheduler.config.get("timestep_spacing") == "linspace" else {}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **spacing)
    return pipe

def draw_all(path, jobs):
    pipe = load(path)
    for _, folder, scale, call in jobs:
        folder = Path(folder)
        noise = load_file(folder / "noise.safetensors")["noise"]
        if hasattr(pipe, "_pack_latents") and len(signature(pipe._pack_latents).parameters) > 1:
            noise = pipe._pack_latents(noise, *noise.shape)
        name = "unet" if "unet" in pipe.components else "transformer"

        def draw(**more):
            options = dict(latents=noise, num_inference_steps=STEPS, output_type="pt", **call, **more)
            return pipe(prompt=list(TEXTS), **options).images

        base = draw()
        if (folder / name).exists():
            own = getattr(pipe, name)
            setattr(pipe, name, type(own).from_pretrained(folder / name))
            image = draw()
            setattr(pipe, name, own)
        else:
            pipe.load_lora_weights(folder)
            loaded = {n for n, _ in getattr(pipe, name).named_parameters() if "lora_" in n}
            stored = load_file(folder / "pytorch_lora_weights.safetensors")
            assert len(loaded) == len(stored), (len(loaded), len(stored))
            image = draw()
            off = draw(**{scale: {"scale": 0.0}})
            print("scale 0 is the base:", torch.equal(off, base), flush=True)
            pipe.unload_lora_weights()
        save_file({"image": image.contiguous(), "base": base.contiguous()}, folder / "image.safetensors")

torch.set_num_threads(1)
jobs = json.loads(sys.argv[1])
for path in {job[0] for job in jobs}:
    index = json.loads((Path(path) / "model_index.json").read_text())
    getattr(diffusers, index["_class_name"])
    for part in index.values():
        if isinstance(part, list) and part[0]:
            getattr(import_module(part[0]), part[1])
for path, part in groupby(sorted(jobs), lambda job: job[0]):
    child = os.fork()
    if not child:
        draw_all(path, list(part))
        os._exit(0)  # interpreter shutdown takes four times as long as sampling
    assert os.waitpid(child, 0)[1] == 0, path
"""


def draw_fresh(jobs: list[list], loras: int) -> None:
    """Run ``SCRIPT``; assert that all ``loras`` load completely and equal the base at scale 0."""
    run = subprocess.run(
        [sys.executable, "-c", f"TEXTS, STEPS = {TEXTS!r}, {STEPS}\n{SCRIPT}", json.dumps(jobs)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("scale 0 is the base: True") == loras, run.stdout
    assert "led to unexpected keys" not in run.stderr
    assert "led to missing keys" not in run.stderr
