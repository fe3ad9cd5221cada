"""A stream on several processes goes on where each of them was, whichever of them wrote the checkpoint."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset

from diffalign import DiffusionDPOTrainer
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.stream import stream_pairs
from diffalign.trainers.diffusion_dpo.batches import StreamSource
from tests.phases import collect


@dataclass
class Process:
    """What a source knows of a run, in a thread that stands for a process."""

    rank: int
    everyone: list
    barrier: threading.Barrier
    world: int = 2

    def gather(self, own):
        self.everyone[self.rank] = own
        self.barrier.wait(60)
        together = torch.cat(self.everyone)
        self.barrier.wait(60)
        return together


@pytest.fixture
def files(pairs, tmp_path):
    """Two files of six pairs; the second has a tie, so that its reader comes further in as many pairs."""
    table = Dataset.from_parquet(str(pairs))
    for number in (0, 1):
        rows = [dict(table[i]) for i in range(6 * number, 6 * number + 6)]
        if number:
            rows[0]["label_0"] = rows[0]["label_1"] = 0.5
        Dataset.from_list(rows).to_parquet(tmp_path / f"{number}.parquet")
    return [tmp_path / f"{number}.parquet" for number in (0, 1)]


class Keys:
    """Stands for the encoder."""

    share = range(2)

    def __call__(self, loaded, iteration):
        return [load()[0].key for load in loaded]


def take(files, first, last, cursors=None):
    """What two processes read in iterations ``first`` to ``last``, of two pairs each, and the places after them."""
    everyone, barrier = [None, None], threading.Barrier(2)

    def one(rank):
        process = Process(rank, everyone, barrier)
        data = stream_pairs(*files, settings=PreferenceDataConfig(scan=0), rank=rank, world=2)
        source = StreamSource(process, data, Keys())
        if cursors is not None:
            source.load_state_dict({"cursors": cursors})
        return [source.sample(i).ranked for i in range(first, last)], source.state_dict()["cursors"]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, (0, 1)))


def test_every_process_goes_on_at_its_own_place(files):
    whole = take(files, 0, 4)
    assert whole[0][1] == whole[1][1], "each process knows the places of all"
    started = take(files, 0, 2)
    kept = json.loads(json.dumps(started[0][1]))  # only the first process writes
    assert kept[0] != kept[1]
    rest = take(files, 2, 4, kept)
    for rank in (0, 1):
        assert started[rank][0] + rest[rank][0] == whole[rank][0]
        assert rest[rank][1] == whole[rank][1]


def test_a_place_of_other_processes_is_refused(files):
    kept = take(files, 0, 1)[0][1]
    with pytest.raises(ValueError, match=r"a stream that 3 process.* cannot go on in 2: .* as many processes"):
        take(files, 1, 2, [*kept, kept[0]])


@pytest.mark.parametrize(("setting", "again"), [({}, False), ({"random_crop": True}, True)], ids=str)
def test_a_sample_that_is_still_in_memory_is_not_read_again(dpo, setting, again):
    trainer = DiffusionDPOTrainer(args=dpo(num_pairs=12, **setting))
    data, read = trainer.algorithm.source.data, []
    load = data.load
    data.load = lambda place: read.append(place) or load(place)
    batch = collect(trainer, 0)
    first, order = batch.ranked, list(read)
    batch = collect(trainer, 1)
    assert sorted(order) == list(range(12))
    assert len(read) == (24 if again else 12)
    # The second epoch has the same pairs in another order.
    assert first.texts != batch.ranked.texts
    known = {latents.flatten()[0].item(): i for i, latents in enumerate(first.latents)}
    for latents, text in zip(batch.ranked.latents, batch.ranked.texts, strict=True):
        place = known[latents.flatten()[0].item()]
        assert torch.equal(latents, first.latents[place])
        assert text == first.texts[place]


def test_memory_keeps_no_more_than_its_share(dpo, monkeypatch):
    trainer = DiffusionDPOTrainer(args=dpo(num_pairs=12))
    batch = collect(trainer, 0)
    size = batch.ranked.latents[0].nbytes
    monkeypatch.setattr("diffalign.trainers.diffusion_dpo.latents.KEPT", 5 * size)
    small = DiffusionDPOTrainer(args=dpo(num_pairs=12, output_dir=trainer.args.output_dir / "small"))
    collect(small, 0)
    assert len(small.algorithm.source.encoder._rows) == 5
    assert torch.equal(collect(small, 1).ranked.latents, collect(trainer, 1).ranked.latents)
