"""Small networks in the layouts of the published ones, once per session, and every registered reward made of them."""

import pytest
import torch

from diffalign.rewards.aesthetic import Head
from diffalign.rewards.support import weights
from tests.rewards import tiny_checkpoints, tiny_judges


@pytest.fixture(autouse=True)
def nothing_loaded():
    weights._LOADED.clear()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return tiny_checkpoints.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def aesthetic_file(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("aesthetic") / "aesthetic-model.pth"
    torch.save(Head(16).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def hps_folder(tmp_path_factory):
    return tiny_checkpoints.hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="session")
def clip_t5_folder(tmp_path_factory):
    return tiny_checkpoints.clip_t5(tmp_path_factory.mktemp("clip-t5"))


@pytest.fixture(scope="session")
def qwen_folders(tmp_path_factory):
    kinds = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    return {kind: tiny_checkpoints.qwen(kind, tmp_path_factory.mktemp(kind)) for kind in kinds}


@pytest.fixture(scope="session")
def hpsv3_parts(qwen_folders, tmp_path_factory):
    """(folder, network with words' head, tokenizer, head)."""
    return tiny_checkpoints.hpsv3(qwen_folders["qwen2_vl"], tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="session")
def image_reward_folder(tmp_path_factory):
    return tiny_checkpoints.image_reward(tmp_path_factory.mktemp("image-reward"))


@pytest.fixture(scope="session")
def ict_hp_folders(clip_folder, tmp_path_factory):
    return tiny_checkpoints.ict_hp(clip_folder, tmp_path_factory.mktemp("ict-hp"))


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    return tiny_checkpoints.detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="session")
def dina_folder(tmp_path_factory):
    return tiny_judges.dina(tmp_path_factory.mktemp("dina"))


@pytest.fixture(scope="session")
def deqa_folder(tmp_path_factory):
    return tiny_judges.deqa(tmp_path_factory.mktemp("deqa"))


@pytest.fixture(scope="session")
def mps_folder(tmp_path_factory):
    return tiny_judges.mps(tmp_path_factory.mktemp("mps"))


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    return tiny_judges.aesthetic_v25(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def evalmuse_folder(tmp_path_factory):
    return tiny_judges.evalmuse(tmp_path_factory.mktemp("evalmuse"))


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory, clip_folder):
    return tiny_judges.own_judge(tmp_path_factory.mktemp("judge") / "mine", clip_folder)


@pytest.fixture(scope="session")
def small(
    clip_folder, aesthetic_file, hps_folder, clip_t5_folder, qwen_folders, hpsv3_parts, image_reward_folder,
    ict_hp_folders, detector_folder, dina_folder, deqa_folder, mps_folder, siglip_folder, evalmuse_folder,
    judge_folder,
):  # fmt: skip
    """Registered name -> the options that make it of small weights; a reward without weights needs none."""
    clip = {"path": str(clip_folder), "tokenizer": str(clip_folder)}
    t5 = {"path": str(clip_t5_folder), "tokenizer": str(clip_t5_folder)}
    base = {"clip": str(clip_folder)}
    return {
        "pickscore": clip,
        "clipscore": clip,
        "judge": {"path": str(judge_folder)},
        "aesthetic": {"path": str(aesthetic_file), **base},
        "hpsv2": {"path": str(hps_folder)},
        "hpsv2.1": {"path": str(hps_folder)},
        "hpsv3": {"path": str(hpsv3_parts[0]), "base": str(qwen_folders["qwen2_vl"])},
        "vqascore": t5,
        "vqascore_xl": t5,
        "vqascore_qwen2.5": {"path": str(qwen_folders["qwen2_5_vl"])},
        **{key: {"path": str(qwen_folders["qwen3_vl"])} for key in ("soft_tifa", "soft_tifa_gm", "prompt_echo")},
        **{key: {"path": str(qwen_folders["qwen2_vl"])} for key in ("q_eval_alignment", "q_eval_quality")},
        "vqascore_qwen3": {"path": str(qwen_folders["qwen3_vl"])},
        "image_reward": {"path": str(image_reward_folder), "tokenizer": str(image_reward_folder)},
        "ict": {"ict": ict_hp_folders["ict"], **base},
        "hp": {"hp": ict_hp_folders["hp"], **base},
        "ict_hp": {**ict_hp_folders, **base},
        "f_clipscore": {"path": str(clip_folder)},
        "deqa": {"path": str(deqa_folder)},
        "evalmuse": {"path": str(evalmuse_folder), "tokenizer": str(image_reward_folder)},
        "mps": {"path": str(mps_folder / "MPS_overall_checkpoint.pth"), "clip": str(mps_folder)},
        "aesthetic_v2.5": {"path": str(siglip_folder / "head.pth"), "encoder": str(siglip_folder)},
        "dina_lrm": {"path": str(dina_folder), "base": str(tiny_checkpoints.PIPELINE)},
        "geneval": {"path": str(detector_folder), **base},
        "geneval_graded": {"path": str(detector_folder), **base},
    }
