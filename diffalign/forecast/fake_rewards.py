"""Rewards of a rehearsal: their own code on networks of published size, without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BatchEncoding,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
)

from diffalign.forecast.counter import Counter, Seen
from diffalign.forecast.fake_model import TOKENS, BlankTokenizer, make_fake
from diffalign.models.offload import tensors_of
from diffalign.models.published_configs import published_reward_folder
from diffalign.rewards import aesthetic, clip, f_clipscore, hps, ict_hp, image_reward, judge, mps, vqascore
from diffalign.rewards.base import IMAGES, RECIPE, Metadata, Reward, names, needs_groups, registered
from diffalign.rewards.support import qwen_vl
from diffalign.rewards.support.judge_files import read_about
from diffalign.rewards.support.judge_network import layout_of
from diffalign.rewards.support.judge_raters import network_class
from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards.support.weights import PRECISIONS, Weights, frozen, loading_with, quiet, split

JUDGING = "reward"  # the part of a phase in which rewards score
GIB = 2**30
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


class Unpublished(ValueError):
    """A reward whose network has no configuration in the package."""


class WordTokenizer(BlankTokenizer):
    """A tokenizer of unknown vocabulary that has a length."""

    def __len__(self) -> int:
        return 32_100  # of FlanT5, whose head is cut to it


def reward_config(spec: str, file: str = "config.json") -> dict[str, Any]:
    """Read a configuration of a local folder, or of a published model."""
    name = split(spec)[0]
    folder = Path(name) if Path(name).exists() else published_reward_folder(name)
    if folder is None or not (folder / file).is_file():
        raise Unpublished(f"the package has no configuration of {name}")
    found: dict[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
    return found


def _tokenizer(spec: str) -> Any:
    local = Path(split(spec)[0]).exists()
    return AutoTokenizer.from_pretrained(spec, trust_remote_code=False) if local else WordTokenizer()


def _clip_model(spec: str) -> CLIPModel:
    return CLIPModel(CLIPConfig.from_dict(reward_config(spec)))


def _clip(weights: Weights, tokenizer: str) -> tuple[Any, ...]:
    return frozen(_clip_model(weights.path), weights), _tokenizer(tokenizer)


def _f_clipscore(weights: Weights) -> tuple[Any, ...]:
    model = CLIPModel._from_config(CLIPConfig.from_dict(reward_config(weights.path)), attn_implementation="eager")
    return frozen(model, weights), _tokenizer(weights.path)


def _hps(weights: Weights, file: str, architecture: str) -> tuple[Any, ...]:
    import open_clip

    if (Path(weights.path) / "open_clip_config.json").is_file():
        architecture = f"local-dir:{weights.path}"
    with quiet():
        model = open_clip.create_model(architecture, load_weights=False, device="meta")
    return frozen(model, weights), open_clip.get_tokenizer(architecture)


def _aesthetic(weights: Weights, file: str, clip: str) -> tuple[Any, ...]:
    model = _clip_model(clip)
    return frozen(model, weights), frozen(aesthetic.Head(model.config.projection_dim), weights)


def _ict(weights: Weights, clip: str) -> tuple[Any, ...]:
    return frozen(_clip_model(clip), weights), _tokenizer(clip)


def _hp(weights: Weights, clip: str) -> tuple[Any, ...]:
    return _aesthetic(weights, "", clip)


def _image_reward(weights: Weights, tokenizer: str) -> tuple[Any, ...]:
    vision = BlipVisionConfig(**reward_config(weights.path, "vision_config.json"))
    text = image_reward.text_config(reward_config(weights.path, image_reward.TEXT_CONFIG), vision.hidden_size)
    return frozen(image_reward.Network(vision, text), weights), _tokenizer(tokenizer)


def _vqascore(weights: Weights, tokenizer: str, tower: str | None) -> tuple[Any, ...]:
    config = vqascore.ClipT5Config.from_dict(reward_config(weights.path))
    inside = Path(weights.path) / config.mm_vision_tower
    vision = reward_config(tower or str(inside if inside.is_dir() else config.mm_vision_tower))
    vision = vision.get("vision_config", vision)
    model = vqascore.ClipT5(config, CLIPConfig.from_dict({"vision_config": vision}).vision_config)
    words = _tokenizer(tokenizer)
    vqascore._cut_head(model, len(words))
    return frozen(model, weights), words


def _mps(weights: Weights, clip: str) -> tuple[Any, ...]:
    return frozen(mps.Network(CLIPConfig.from_dict(reward_config(clip))), weights), _tokenizer(clip)


class ChatTokenizer(BlankTokenizer):
    """A tokenizer of Qwen's chats: an image token per patch, and as many of text as a question has at most."""

    def __init__(self, image_token: int) -> None:
        self.image_token = image_token

    def __call__(self, text: str | Sequence[str], *_: Any, **options: Any) -> BatchEncoding:
        """Return token ids and masks, (B, L)."""
        texts = [text] if isinstance(text, str) else text
        rows = [[self.image_token] * one.count(qwen_vl.IMAGE) + [0] * TOKENS for one in texts]
        ids = torch.tensor(rows)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def get_added_vocab(self) -> dict[str, int]:
        """Return no tokens."""
        return {}

    def apply_chat_template(self, messages: Sequence[Any], tokenize: bool = False, **_: Any) -> str:
        """Return an image."""
        return qwen_vl.IMAGE


def _qwen(weights: Weights) -> tuple[Any, ...]:
    found = reward_config(weights.path)
    config = AutoConfig.for_model(found.pop("model_type"), **found)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    patches = qwen_vl.Patches(
        qwen_vl.MIN_TOKENS * side**2,
        qwen_vl.MAX_TOKENS * side**2,
        config.vision_config.patch_size,
        config.vision_config.spatial_merge_size,
        config.vision_config.temporal_patch_size,
        CLIP_MEAN,
        CLIP_STD,
    )
    return frozen(model, weights), ChatTokenizer(config.image_token_id), patches


def _judge(weights: Weights, rater: str | None) -> tuple[Any, ...]:
    found = reward_config(weights.path)
    config = AutoConfig.for_model(found.pop("model_type"), **found)
    backbone = layout_of(config, weights.path).model(config)
    network = network_class(read_about(weights).rater_model).single(backbone)
    return frozen(network, weights), _tokenizer(weights.path)


# Loader of a reward's weights -> the like of what it returns, without weights.
BUILDERS: Mapping[Callable[..., Any], Callable[..., tuple[Any, ...]]] = {
    clip._load: _clip,
    f_clipscore._load: _f_clipscore,
    hps._load: _hps,
    aesthetic._load: _aesthetic,
    ict_hp._load_ict: _ict,
    ict_hp._load_hp: _hp,
    image_reward._load: _image_reward,
    vqascore._load: _vqascore,
    mps._load: _mps,
    judge._load: _judge,
    qwen_vl.load: _qwen,
    qwen_vl.load_with_own_limits: _qwen,
}


@dataclass
class RehearsedReward:
    """A reward that computes as in a run, on fake tensors; what cannot counts with its weights alone.

    Without gradients its scores are drawn, and images of a shape are scored once.

    Attributes:
        name: Of the reward.
        reward: The reward.
        counter: Counts memory and operations.
        overlaps: Whether it scores while the next images are sampled.
        trained: Whether the run trains on it; networks of the others leave the device after each evaluation.
        size: Bytes of its networks' weights.
        problem: Why it is not rehearsed; empty if it is.
    """

    name: str
    reward: Reward
    counter: Counter
    overlaps: bool = False
    trained: bool = True
    size: int = 0
    problem: str = ""
    differentiable: bool = True
    range: tuple[float, float] = (-100.0, 100.0)
    _made: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    _known: dict[Any, Seen] = field(default_factory=dict)
    _resident: bool = False
    _beside: int = 0

    @property
    def needs_groups(self) -> bool:
        """Whether it scores whole groups."""
        return needs_groups(self.reward)

    @property
    def wants(self) -> str:
        """Whether it scores images or latents."""
        return str(getattr(self.reward, "wants", IMAGES))

    @property
    def offload(self) -> bool:
        """Whether networks leave the device after each use without gradients."""
        return not self.trained or bool(getattr(getattr(self.reward, "weights", None), "offload", False))

    def prepare(self, size: tuple[int, int]) -> None:
        """Load the networks, as an earlier iteration has done; afterwards it is known whether they can be rehearsed."""
        with self.counter.fake:
            image = torch.empty(1, 3, *size)
        with torch.no_grad():
            self._rehearsed(image, ["a prompt"], [{}])
        if not self.offload:
            self._load()

    @property
    def note(self) -> str | None:
        """A line about what is not rehearsed; None if everything is, or if there is no network."""
        if not self.problem:
            return None
        counted = f"{self.size / GIB:.2f} GiB of weights are counted, " if self.size else ""
        return f"reward {self.name}: {counted}what it computes is not rehearsed: {self.problem}"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Any = None) -> Tensor:
        """Score images (B, 3, H, W), or latents (B, C, ...)."""
        recorded = torch.is_grad_enabled() and images.requires_grad
        self._load()
        self.counter.calls[self.counter.phase, JUDGING] += len(images)
        try:
            if recorded:
                return self._recorded(images, prompts, metadata)
            self._scored(images, prompts, metadata)
            return torch.rand(len(images))
        finally:
            if self.offload and not recorded:
                self._unload()

    def release(self) -> None:
        """Forget what is computed beside sampling, at its end."""
        self.counter.add(-self._beside)
        self._beside = 0

    def _load(self) -> None:
        if not self._resident:
            self.counter.add(self.size)
            self._resident = True

    def _unload(self) -> None:
        self.counter.add(-self.size)
        self._resident = False

    def _recorded(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        with self.counter.within(JUDGING):
            found = self._rehearsed(images, prompts, metadata)
        return images.flatten(1).mean(1) if found is None or not found.requires_grad else found

    def _scored(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> None:
        counter, key = self.counter, (tuple(images.shape), images.dtype, len(set(prompts)))
        with counter.within(JUDGING):
            if key not in self._known:
                with counter.watched() as seen:
                    self._rehearsed(images, prompts, metadata)
                self._known[key] = seen
            else:
                seen = self._known[key]
                counter.touch(seen.extra)
                counter.flops[counter.phase, JUDGING] += seen.flops
                counter.traffic[counter.phase, JUDGING] += seen.traffic
        if self.overlaps and seen.extra > self._beside:  # the next images are sampled meanwhile
            counter.add(seen.extra - self._beside)
            self._beside = seen.extra

    def _rehearsed(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor | None:
        """Run the reward; None if it cannot be run, which ``problem`` explains."""
        if self.problem or not has_network(self.reward):
            return None
        if getattr(self.reward, RECIPE, None) is None:
            self._give_up("it is not among the registered rewards")
            return None
        try:
            with loading_with(self._networks):
                found = self.reward(images, prompts, metadata)
        except Unpublished as error:
            self._give_up(str(error))
            return None
        except Exception as error:  # of a reward's code, on tensors without values
            self._give_up(f"it does not run on fake tensors ({type(error).__name__}: {str(error)[:200]})")
            return None
        return found[0] if isinstance(found, tuple) else found

    def _give_up(self, why: str) -> None:
        self.problem, self.size = why, max(self.size, network_bytes(self.reward))

    def _networks(self, loader: Callable[..., Any], *arguments: Any) -> Any:
        """Build what a loader returns, on fake tensors."""
        key = loader, arguments
        if key not in self._made:
            if loader not in BUILDERS:
                raise Unpublished("the package has no configuration of its network")
            with _disable_current_modes(), torch.device("meta"):
                made = BUILDERS[loader](*arguments)
            networks = [part for part in made if isinstance(part, nn.Module)]
            with _disable_current_modes():
                for network in networks:
                    make_fake(network, self.counter.fake)
                    vars(network)["to"] = partial(_stay, network)  # moves are counted here, see ``_load``
            self.counter.leave_out(tensors_of(networks))
            self.size += sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(networks))
            self._made[key] = made
        return self._made[key]


def _stay(network: nn.Module, *_: Any) -> nn.Module:
    return network


def network_bytes(reward: Reward) -> int:
    """Return the bytes of a reward's weights: of a folder's files, else from the card of the registered reward."""
    name, _ = getattr(reward, RECIPE, ("", {}))
    weights = getattr(reward, "weights", None)
    if isinstance(weights, Weights) and weights.path and Path(weights.path).is_dir():  # a file may be a head alone
        return sum(file.stat().st_size for file in Path(weights.path).rglob("*") if file.suffix in WEIGHTS)
    if not name or name not in names() or registered(name).facts.served:
        return 0
    dtype = weights.dtype if isinstance(weights, Weights) else PRECISIONS["no"]
    return int(registered(name).facts.millions * 1e6) * dtype.itemsize


def has_network(reward: Reward) -> bool:
    """Return whether a registered reward has weights; other code may have."""
    name, _ = getattr(reward, RECIPE, ("", {}))
    if not name or name not in names():
        return True
    card = registered(name).facts
    held = bool(card.millions) or isinstance(getattr(reward, "weights", None), Weights)
    return held and not card.served
