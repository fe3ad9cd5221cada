"""What every registered reward promises, plug-ins too: the small networks of ``small`` stand in for the large ones."""

import contextlib
import json
import math
import tempfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffalign.commands.score import reward_table
from diffalign.rewards import base, get_reward
from diffalign.rewards.base import FunctionReward, names, needs_groups, registered
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.support.http_client import decode_images
from diffalign.rollout.scoring import RewardWarning, score
from diffalign.structures import Prompt

PROMPTS = ['a red circle and the word "sign"', "two squares", 'a red circle and the word "sign"', "Wörter 🎈"]
# Levels of 8 bits, of which nothing is lost on the way to PIL, and no pixel at 0 or 1.
IMAGES = torch.randint(50, 206, (4, 3, 45, 61), generator=torch.Generator().manual_seed(0)).float() / 255
SHAPES = {"include": [{"class": "circle", "count": 1, "color": "red"}], "tag": "colors", "text": "sign"}
SHAPES |= {"vqa_list": [["How many circles are in the image?", "one"], ["Is the circle red?", "Yes"]]}
SOURCE = Path(tempfile.mkdtemp()) / "source.png"
Image.effect_noise((45, 61), 40).convert("RGB").save(SOURCE)
EDIT = {"image": str(SOURCE), "edit": {"kind": "add", "class": "circle", "color": "red"}}
METADATA = [SHAPES | EDIT for _ in PROMPTS]
GROUPS = torch.tensor([0, 1, 0, 1])
# Networks that compute norms or attention in float32 whatever their weights are need wider steps.
STEPS = {"vqascore": (1e-3, 1e-2), "vqascore_xl": (1e-3, 1e-2), "f_clipscore": (1e-3, 1e-3)}
STEPS |= dict.fromkeys(("hpsv3", "vqascore_qwen2.5", "vqascore_qwen3", "soft_tifa", "soft_tifa_gm"), (1e-2, 1e-2))
STEPS |= dict.fromkeys(("prompt_echo", "q_eval_alignment", "q_eval_quality", "deqa"), (1e-2, 1e-2))


class Judge(BaseHTTPRequestHandler):
    """A vision-language model that likes light images."""

    protocol_version = "HTTP/1.1"  # keeps connections

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *pictures, words = body["messages"][0]["content"]
        images = decode_images([p["image_url"]["url"].partition(",")[2] for p in pictures])  # PNG or JPEG
        light = [image.float().mean().item() / 255 for image in images]
        axes = [f"{axis} score: {light[0]}" for axis in ("Semantic alignment", "Aesthetic", "Plausibility")]
        stars = [f"{axis} Score (1-5): {1 + 4 * light[0]}" for axis in ("Alignment", "Coherence", "Style")]
        said = {"JSON": json.dumps({"score": 10 * light[0]}), "yes": "yes" if light[0] > 0.5 else "no"}
        said |= {"Plausibility": "\n".join([*axes, f"Overall impression score: {light[0]}"])}
        said |= {"Coherence": "\n".join(stars), "the": "yes" if light[0] > 0.5 else "no"}
        if len(light) == 2:
            best, share = 1 + (light[1] > light[0]), light[0] / sum(light)
            said = {"digit": str(best), "<answer>": f"<answer>Image {best} is better</answer>"}
            pair = f"Score:\n Image 1: {share}\n Image 2: {1 - share}"
            said |= {"Coherence": "\n".join(f"{axis} {pair}" for axis in ("Alignment", "Coherence", "Style"))}
        edit = json.dumps({"score": [25 * light[-1]] * 2})
        said = {"edited": edit, "naturalness": edit, **said}
        text = next(answer for word, answer in said.items() if word in words["text"])
        reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def options(small):
    """Options of every registered reward, with servers for those that ask one."""
    served = RewardServer({"brightness": get_reward("brightness")}, port=0)
    with running(served) as far, running(ThreadingHTTPServer(("127.0.0.1", 0), Judge)) as judge:
        url = {"url": judge}
        vlm = {**url, "model": "light", "logprobs": False}
        yield {
            **small,
            "remote": {"url": far, "reward": "brightness", "batch_size": 3},
            **dict.fromkeys(("vlm_rating", "vlm_checklist", "vlm_pairwise"), vlm),
            **dict.fromkeys(("image_doctor", *(f"unified_reward{kind}" for kind in ("", "_pairs", "_think"))), url),
            "vision_reward": {**url, "alignment": None},
            "editscore": {**url, "model": "light"},
            "combined": {"rewards": {"brightness": 1.0, "sharpness": {"weight": 2.0}}, "rule": "soft_and"},
        }


def make(name, options):
    entry = registered(name)
    if name not in options and entry.facts.weights:
        assert not entry.factory.__module__.startswith("diffalign."), f"give {name!r} small weights in 'small'"
        pytest.skip("a plug-in whose weights are not here")
    return get_reward(name, **options.get(name, {}))


def call(reward, images, prompts=PROMPTS, metadata=METADATA, groups=GROUPS):
    """Its scores, and no others."""
    result = reward(images, prompts, metadata, *([groups] if needs_groups(reward) else []))
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", names())
def test_the_contract(name, options):
    reward, scale = make(name, options), registered(name).facts.scale
    assert reward.name == name
    before = IMAGES.clone()
    values = call(reward, IMAGES)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * scale}
    if "bf16" in repr(getattr(reward, "weights", "")):  # rounding of the network itself, which batches change
        reward = replace(reward, weights=replace(reward.weights, precision="no"))
        values = call(reward, IMAGES)
    assert torch.equal(IMAGES, before), "images are left as they are"
    assert values.shape == (4,)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert not values.requires_grad, "no graph is kept where none is asked for"
    assert (values >= reward.range[0]).all()
    assert (values <= reward.range[1]).all()
    order = torch.tensor([2, 0, 3, 1])
    swapped = call(reward, IMAGES[order], [PROMPTS[i] for i in order], [METADATA[i] for i in order], GROUPS[order])
    torch.testing.assert_close(swapped, values[order], **tolerance)
    parts = [[0, 2], [1, 3]] if needs_groups(reward) else [[0], [1], [2], [3]]
    for rows in parts:
        alone = call(reward, IMAGES[rows], [PROMPTS[i] for i in rows], [METADATA[i] for i in rows], GROUPS[rows])
        torch.testing.assert_close(alone, values[rows], **tolerance)
    assert call(reward, IMAGES[:0], [], [], GROUPS[:0]).shape == (0,)


def check_gradient(reward, steps=(1e-5, 1e-5)):
    """In float64, on the smooth path, which is the default where a gradient is asked.

    Along the steepest direction an error shows in full, but what is missing from the gradient is missing from it too;
    that shows along one that has nothing to do with it, by about the norm of the part.
    """
    for field in ("weights", "ict", "hp"):
        if getattr(reward, field, None) is not None:
            reward = replace(reward, **{field: replace(getattr(reward, field), precision="fp64")})
    images = IMAGES[:1].double().requires_grad_()
    arguments = (PROMPTS[:1], METADATA[:1])
    (gradient,) = torch.autograd.grad(call(reward, images, *arguments).sum(), images)
    assert gradient.isfinite().all()
    smooth = replace(reward, quantize=False) if hasattr(reward, "quantize") else reward

    @torch.no_grad()
    def slope(direction, step):
        up, down = (call(smooth, images + s * step * direction, *arguments).double() for s in (1, -1))
        return ((up - down).sum() / (2 * step)).item()

    signs = torch.randint(0, 2, (1, 3, 8, 8), generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    steepest, fixed = gradient / gradient.abs().max(), F.interpolate(signs, images.shape[2:])
    for direction, step, allowed in ((steepest, steps[0], 0), (fixed, steps[1], 5e-3 * gradient.norm().item())):
        expected = (4 * slope(direction, step / 2) - slope(direction, step)) / 3
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-3, abs=allowed)


@pytest.mark.parametrize("name", names())
def test_the_gradient_agrees_with_finite_differences_or_there_is_none(name, options):
    reward = make(name, options)
    if reward.differentiable:
        check_gradient(reward, STEPS.get(name, (1e-5, 1e-5)))
    else:
        assert not call(reward, IMAGES.clone().requires_grad_()).requires_grad


def red_alone(images):
    return torch.cat([images[:, :1], images[:, 1:].detach()], 1)


def right_half(images):
    middle = images.shape[-1] // 2
    return torch.cat([images[..., :middle].detach(), images[..., middle:]], -1)


@pytest.mark.parametrize("seen", [red_alone, right_half])
def test_a_gradient_of_part_of_the_image_is_noticed(seen):
    check_gradient(FunctionReward("whole", lambda i, p, m: i.square().mean((1, 2, 3)), differentiable=True))
    with pytest.raises(AssertionError):
        check_gradient(FunctionReward("part", lambda i, p, m: seen(i).square().mean((1, 2, 3)), differentiable=True))


def test_a_plug_in_without_a_card_is_held_to_the_contract(monkeypatch, tmp_path):
    (tmp_path / "glowing.py").write_text(
        "from diffalign.rewards import FunctionReward\n"
        "def glow(name):\n    return FunctionReward(name, lambda i, p, m: i.mean((1, 2, 3)), True, (0.0, 1.0))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = EntryPoints([EntryPoint("glow", "glowing:glow", base.PLUGINS)])
    monkeypatch.setattr(base, "entry_points", lambda group: points.select(group=group))
    monkeypatch.setattr(base, "REWARDS", dict(base.REWARDS))
    assert "glow" in names()
    test_the_contract("glow", {})
    test_the_gradient_agrees_with_finite_differences_or_there_is_none("glow", {})
    assert "| `glow` | what its author says | [0, 1] | yes |" in reward_table()


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "hpsv2.1", "image_reward", "ict_hp", "sharpness"])
def test_an_image_8000_pixels_wide_has_a_score(name, options):
    images = torch.rand(2, 3, 64, 8000, generator=torch.Generator().manual_seed(0))
    found = score([make(name, options)], images, [Prompt(text) for text in PROMPTS[:2]])
    assert found[name].isfinite().all()


def test_the_smooth_and_the_rounded_scores_are_close(options):
    images = torch.rand(4, 3, 45, 61, generator=torch.Generator().manual_seed(1))
    for name in ("pickscore", "hpsv2.1", "aesthetic", "vqascore", "image_reward"):
        reward = make(name, options)
        rounded, smooth = (call(replace(reward, quantize=q), images) for q in (True, False))
        assert 0 < (rounded - smooth).abs().max() < 0.3 * max(1.0, rounded.abs().max().item()), name


@pytest.mark.parametrize(
    "name", ["pickscore", "clipscore", "hpsv2.1", "aesthetic", "image_reward", "vqascore", "ict_hp"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (700, 30)])
def test_odd_sizes_have_a_score(name, size, options):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    assert call(make(name, options), images, PROMPTS[:1], METADATA[:1]).isfinite().all()


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "image_reward", "vqascore", "f_clipscore"])
@pytest.mark.parametrize("prompt", ["", "word " * 2000, "🎈" * 300, "\n\t", "a\u0000b"], ids=range(5))
def test_odd_prompts_have_a_score(name, prompt, options):
    longest = 1000 if name == "vqascore" else 10_000  # T5 reads all of it, and attention grows with the square
    assert call(make(name, options), IMAGES[:1], [prompt[:longest]], [{}]).isfinite().all()


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "image_reward", "vqascore", "ocr", "geneval"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 8, 8), r"images have shape \(1, 1, 8, 8\): pass \(B, 3, H, W\), see .*as_images"),
        (torch.zeros(1, 4, 8, 8), r"images have shape \(1, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"images have shape \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "images are torch.uint8: pass floats"),
        (torch.zeros(1, 3, 0, 8), "images of 8 x 0 pixels"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(name, images, message, options):
    with pytest.raises(ValueError, match=message):
        call(make(name, options), images, PROMPTS[:1], METADATA[:1])


def test_an_image_of_nan_has_no_score(options):
    images = IMAGES.clone()
    images[1, :, 3] = math.nan
    prompts = [Prompt(text, data) for text, data in zip(PROMPTS, METADATA, strict=True)]
    for name in ("pickscore", "vqascore", "jpeg_compressibility", "shapes", "remote"):
        with pytest.warns(RewardWarning, match="is not finite"):
            values = score([make(name, options)], images, prompts)[name]
        assert values.isnan().tolist() == [False, True, False, False], name
