"""The buffer's bookkeeping and its disk form."""

import dataclasses
import json
import os

import datasets
import pytest
import torch

from diffalign.diffusion.plan import Plan, PlanConfig, Row, make_plan
from diffalign.rollout.buffer import COLUMNS, RolloutBuffer, bytes_needed, stored_steps
from diffalign.structures import Prompt

SDE, ODE = Row("flow_sde", 0.7, True), Row("ode", 0.0, False)
SHAPE = (2, 3, 3)
PROMPTS = [Prompt("a red circle", {"tag": "colors"}), Prompt("two squares")]


def filled(plan, means=False):
    group, sample = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    buffer = RolloutBuffer.allocate(plan, group, sample, PROMPTS, SHAPE, means=means)
    generator = torch.Generator().manual_seed(0)
    buffer.x = torch.randn(buffer.x.shape, generator=generator)
    buffer.log_prob = torch.where(buffer.trained, torch.randn(len(buffer.step), generator=generator), torch.nan)
    return buffer


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((SDE, SDE, ODE, ODE), (0, 1, 2, 4)),
        ((ODE, SDE, ODE), (1, 2, 3)),
        ((SDE, ODE, SDE, ODE), (0, 1, 2, 3, 4)),
        ((ODE, ODE, SDE), (2, 3)),
    ],
)
def test_only_ends_of_trained_steps_and_final_latents_are_stored(rows, expected):
    assert stored_steps(Plan(rows)) == expected


def test_a_leaf_whose_parent_is_not_stored_is_not_trained():
    plan = Plan((ODE, SDE))
    buffer = RolloutBuffer.allocate(plan, torch.tensor([0]), torch.tensor([0]), PROMPTS, SHAPE, steps=(2,))
    assert not buffer.trained.any()
    assert len(buffer.transitions()) == 0


def test_every_trained_node_has_its_true_parent():
    plan = Plan((ODE, SDE, SDE, ODE, ODE))
    buffer = filled(plan)
    for row in buffer.trained.nonzero().flatten().tolist():
        parent = buffer.parent[row]
        assert buffer.step[parent] == buffer.step[row] - 1
        assert buffer.group[parent] == buffer.group[row]
        assert buffer.sample[parent] == buffer.sample[row]
    assert buffer.trained.sum() == 4 * len(plan.trained_steps)
    assert set(buffer.step[buffer.trained].tolist()) == {2, 3}


def test_samples_that_move_take_along_all_that_is_known_of_them():
    buffer = filled(Plan((SDE, ODE, SDE, ODE)), means=True)
    buffer.mean = torch.randn(buffer.mean.shape)
    buffer.set_advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    buffer.set_rewards({"shapes": torch.arange(4.0)})
    moved = buffer.moved(torch.tensor([3, 0, 2]), lambda column: column[[2, 0]])  # samples 2 and 3
    for place, sample in enumerate((2, 3)):
        here, there = (b.nodes(torch.tensor([n]), 4) for b, n in ((moved, place), (buffer, sample)))
        for step in (3, 1):
            new, old = (b.nodes(torch.tensor([n]), step) for b, n in ((moved, place), (buffer, sample)))
            for column in ("group", "sample", "x", "log_prob", "advantage", "step", "trained"):
                assert torch.equal(getattr(moved, column)[new], getattr(buffer, column)[old]), column
            assert torch.equal(moved.x[moved.parent[new]], buffer.x[buffer.parent[old]])
            assert torch.equal(moved.mean[moved.trained_rank(new)], buffer.mean[buffer.trained_rank(old)])
        assert torch.equal(moved.x[here], buffer.x[there])
    assert moved.leaves.tolist() == [4, 9]
    assert not moved.rewards


def test_nodes_finds_samples_at_a_step():
    buffer = filled(Plan((SDE, SDE, ODE)))
    rows = buffer.nodes(torch.tensor([3, 1]), 1)
    assert buffer.step[rows].tolist() == [1, 1]
    assert list(zip(buffer.group[rows].tolist(), buffer.sample[rows].tolist(), strict=True)) == [(1, 1), (0, 1)]
    with pytest.raises(ValueError, match=r"step 7 is not stored; stored: \[0, 1, 2, 3\]"):
        buffer.nodes(slice(None), 7)


def test_rewards_stay_at_leaves_and_advantages_reach_every_node():
    buffer = filled(Plan((SDE, ODE)))
    buffer.set_rewards({"shapes": torch.tensor([0.1, 0.2, 0.3, 0.4])})
    assert torch.equal(buffer.rewards["shapes"][buffer.leaves], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert buffer.rewards["shapes"].isnan().sum() == len(buffer.step) - 4
    buffer.set_advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    for rank in range(4):
        own = (buffer.group == rank // 2) & (buffer.sample == rank % 2)
        assert buffer.advantage[own].unique().tolist() == [rank + 1]


@pytest.mark.parametrize("means", [False, True])
def test_the_bytes_are_known_before(means):
    plan = make_plan(PlanConfig(preset="flow_grpo_fast", num_steps=8), 0, 0)
    buffer = filled(plan, means)
    held = buffer.x.nbytes + (buffer.mean.nbytes if means else 0)
    assert bytes_needed(plan, 4, SHAPE, torch.float32, means=means) == held


def test_trained_rank_counts_trained_nodes():
    buffer = filled(Plan((ODE, SDE, ODE, SDE, ODE)), means=True)
    rows = buffer.trained.nonzero().flatten()
    assert torch.equal(buffer.trained_rank(rows), torch.arange(len(buffer.mean)))


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b'[{"text": "a", "evil": 1}]', b"7", b"[7]", None])
def test_prompts_that_are_none_are_named(content, tmp_path):
    filled(Plan((SDE, ODE))).save(tmp_path, torch.rand(4, 3, 8, 8), model="assets/shapes-sd3", seed=7)
    path = tmp_path / "prompts.json"
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.json holds no prompts of rollouts"):
        RolloutBuffer.load(tmp_path)


def test_the_disk_form_comes_back_and_reads_as_a_data_set(tmp_path):
    buffer = filled(Plan((SDE, ODE)))
    buffer.set_rewards({"shapes": torch.tensor([0.25, 0.5, torch.nan, 1.0])})
    buffer.save(tmp_path, torch.rand(4, 3, 8, 8), model="assets/shapes-sd3", seed=7)
    again = RolloutBuffer.load(tmp_path)
    for name in ("group", "sample", "parent", "step", "trained", "x"):
        assert torch.equal(getattr(again, name), getattr(buffer, name)), name
    assert torch.equal(again.log_prob.nan_to_num(9), buffer.log_prob.nan_to_num(9))
    assert torch.equal(again.rewards["shapes"].nan_to_num(9), buffer.rewards["shapes"].nan_to_num(9))
    assert again.prompts == PROMPTS
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 4
    row = next(row for row in table if (row["group"], row["sample"]) == (1, 1))
    assert row["prompt"] == "two squares"
    assert row["rewards"]["shapes"] == 1.0
    assert (row["model"], row["seed"], row["image"].size) == ("assets/shapes-sd3", 7, (8, 8))


def test_parts_of_two_processes_load_as_one_buffer(tmp_path):
    whole = filled(Plan((SDE, ODE)), means=True)
    whole.set_rewards({"shapes": torch.tensor([0.25, 0.5, 0.75, 1.0])})
    whole.mean.normal_(generator=torch.Generator().manual_seed(1))
    half, lines, saved = len(whole.step) // 2, [], {"model": "m", "seed": 7}
    for share in (1, 0):
        rows = slice(share * half, (share + 1) * half)
        part = dataclasses.replace(
            whole,
            **{column: getattr(whole, column)[rows] for column in (*COLUMNS, "path", "depth", "leaf")},
            mean=whole.mean.chunk(2)[share],
            rewards={"shapes": whole.rewards["shapes"][rows]},
        )
        part.parent = torch.where(part.parent < 0, -1, part.parent - rows.start)

        def gather(own):
            lines[:0] = own
            return lines

        part.save(tmp_path, torch.rand(2, 3, 8, 8), share=share, gather=gather, **saved)
    again = RolloutBuffer.load(tmp_path)
    for name in (*COLUMNS, "path", "depth", "leaf", "mean"):
        assert torch.equal(getattr(again, name).nan_to_num(9), getattr(whole, name).nan_to_num(9)), name
    assert torch.equal(again.rewards["shapes"][again.leaves], torch.tensor([0.25, 0.5, 0.75, 1.0]))
    listed = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [(line["group"], line["sample"]) for line in listed] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all((tmp_path / line["file_name"]).is_file() for line in listed)
