"""Files of a judge: a model of its family in transformers' layout, with what it was trained on beside it.

config.json, model.safetensors      the judge of the mean rater; without its ideal point in PAL's model A
tokenizer.json, preprocessor_config.json ...
judge.json                          format, names of raters, backbone and figures
raters.safetensors                  prototypes and weights of raters, if there are several
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from diffalign.atomic import replacing, write_text
from diffalign.config.sections import JUDGE_FILES
from diffalign.files import read_text, some
from diffalign.rewards.support.judge_network import MAX_LOGIT_SCALE, JudgeNetwork, layout_of
from diffalign.rewards.support.judge_raters import NETWORKS, PrototypeMaps, network_class
from diffalign.rewards.support.weights import Weights, check_report, weights_file

ABOUT, RATERS, MODEL = "judge.json", "raters.safetensors", "model.safetensors"
MEAN = "mean"  # name of the rater with the mean of the weights
LARGEST = 16 << 20  # bytes of ABOUT


@dataclass(frozen=True)
class About:
    """What ``judge.json`` says.

    Attributes:
        backbone: Model that was trained.
        raters: Names of raters, in the order of the weights; empty for one judge of all.
        rater_model: How raters share the judge, a key of ``NETWORKS``; empty for one judge of all.
        tie_model: How the training modelled ties.
        tie: Its parameter.
        figures: Figures on held-out pairs.
    """

    backbone: str = ""
    raters: tuple[str, ...] = ()
    tie_model: str = "soft"
    tie: float = 0.0
    figures: Mapping[str, Any] | None = None
    rater_model: str = ""


def load_backbone(path: str, revision: str | None = None) -> PreTrainedModel:
    """Load a CLIP or SigLIP model in float32. ValueError: another kind of model, or weights that do not fit."""
    layout = layout_of(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False), path)
    model, report = layout.model.from_pretrained(path, revision=revision, output_loading_info=True)
    check_report(report, path, layout.model.__name__)
    found: PreTrainedModel = model.float()
    return found


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def merged_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a backbone, float32, under its family's names, with adapters of peft in its weights."""
    adapted = any(".base_layer." in name for name, _ in backbone.named_parameters())
    merged = copy.deepcopy(backbone) if adapted else backbone
    for module in merged.modules() if adapted else ():
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()  # type: ignore[operator]
    return {
        name.replace(".base_layer.", "."): tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in merged.state_dict().items()
        if ".lora_" not in name and not name.endswith("position_ids")
    }


@torch.no_grad()
def save_judge(network: JudgeNetwork, tokenizer: Any, folder: Path, about: About) -> list[Path]:
    """Write a judge; ``judge.json`` last. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    layout, tensors = network.layout, merged_state(network.backbone)
    tensors |= {f"{layout.text_head}.{name}": _plain(value) for name, value in network.plain_head().items()}
    tensors["logit_scale"] = tensors["logit_scale"].clamp(max=MAX_LOGIT_SCALE)
    with replacing(folder / MODEL) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    config = copy.deepcopy(network.backbone.config)
    config.dtype, config.architectures = torch.float32, [layout.model.__name__]
    config.save_pretrained(folder)

    tokenizer.save_pretrained(folder)
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    sizes = {"size": square} if layout.square else {"size": {"shortest_edge": side}, "crop_size": square}
    layout.processor(**sizes).save_pretrained(folder)

    (folder / RATERS).unlink(missing_ok=True)
    if network.raters:
        with replacing(folder / RATERS) as staged:
            save_file({name: _plain(value) for name, value in network.rater_state().items()}, staged)
    about = replace(about, rater_model=network.name)
    table = {"format": network.format, **{name: value for name, value in vars(about).items() if value is not None}}
    write_text(folder / ABOUT, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    return [folder / name for name in JUDGE_FILES if (folder / name).is_file()]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


def check_judge(path: str) -> None:
    """Raise ValueError for a folder that holds no judge, and for a path that can be no hub id."""
    folder = Path(path)
    if (folder / ABOUT).is_file():
        return
    train = "name the output_dir of a finished `diffalign train reward`; weights of another reward are its options.path"
    if folder.is_dir():
        unfinished = any(folder.glob("checkpoint-*"))
        hint = (
            "its training has not finished, so resume it with --resume_from_checkpoint latest" if unfinished else train
        )
        raise ValueError(f"path: {path} holds no judge (there is no {ABOUT} in it): {hint}")
    if (
        folder.exists()
        or folder.is_absolute()
        or path.startswith(".")
        or path.count("/") != 1
        or folder.parent.is_dir()
    ):
        raise ValueError(f"path: there is no folder {path[:300]}: {train}, or a hub id")


def read_about(weights: Weights) -> About:
    """Read ``judge.json``. ValueError: it is not one."""
    path = weights_file(weights, ABOUT)
    try:
        table = json.loads(read_text(path, LARGEST))
        raters = tuple(str(name) for name in table.get("raters", ()))
        model = str(table.get("rater_model", PrototypeMaps.name if raters else ""))  # files of format 1 name none
        if model not in ("", *NETWORKS) or table["format"] != network_class(model).format:
            raise ValueError(f"format {table['format']} of model {model!r} is not one that this version reads")
        tie_model, tie = table.get("tie_model", "soft"), float(table.get("tie", 0))
        return About(table.get("backbone", ""), raters, tie_model, tie, rater_model=model)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} describes no judge ({str(error)[:200]}): train it again, or copy it again") from error


def check_rater(about: About, rater: str | None, path: str) -> int:
    """Return the row of a rater, -1 for the mean. ValueError: the judge does not know the rater."""
    if rater is None or (rater == MEAN and rater not in about.raters):
        return -1
    if rater in about.raters:
        return about.raters.index(rater)
    known = f"it knows {some(about.raters, 8)}" if about.raters else "it was trained as one judge of all raters"
    raise ValueError(f"rater {rater[:80]!r}: {path} has no such rater; {known}: leave rater out for the mean of all")


@torch.no_grad()
def load_judge(weights: Weights, rater: str | None = None) -> tuple[JudgeNetwork, Any]:
    """Load network and tokenizer of a rater's judge; None for the mean rater. ValueError: it cannot be."""
    about = read_about(weights)
    row = check_rater(about, rater, weights.path)
    backbone = load_backbone(weights.path, weights.revision)
    if about.rater_model:
        state = load_file(weights_file(weights, RATERS))
        network = NETWORKS[about.rater_model].of_rater(backbone, state, row)
    else:
        network = JudgeNetwork(backbone)
    return network, load_tokenizer(weights.path, weights.revision)
