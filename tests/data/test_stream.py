"""A stream holds what the table holds, in an order that is a function of addresses, and goes on anywhere."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.pairs import load_pairs
from diffalign.data.stream import Cursor, stream_pairs
from diffalign.data.validation import DataWarning
from tests.data.preference_files import encoded, jsonl, pick_a_pic, pick_row


def shuffled(count, *address):
    seed = int("9".join(map(str, (7, *address))))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def files(tmp_path):
    """Three files of 10, 7 and 4 rows; every fifth row is a tie."""
    sizes, start, found = (10, 7, 4), 0, []
    for name, size in zip("abc", sizes, strict=True):
        rows = [pick_row(number, 0.5 if number % 5 == 4 else number % 2) for number in range(start, start + size)]
        found.append(pick_a_pic(tmp_path / f"{name}.parquet", rows))
        start += size
    return found


def content(pair):
    return pair.prompt.text, pair.label, *(source.read() for source in pair.images)


def first(stream, count, cursor=None):
    return [(pair.prompt.text, after) for pair, after in islice(stream.pairs(cursor), count)]


@pytest.mark.parametrize("window", [1, 3, 256])
def test_an_epoch_of_the_stream_is_the_table_in_another_order(files, window):
    table = load_pairs(*files)
    stream = stream_pairs(*files, permutation=shuffled, window=window)
    pairs = [pair for pair, _ in islice(stream.pairs(), 2 * len(table))]
    wanted = Counter(content(table[i]) for i in range(len(table)))
    assert len(table) == 17
    for epoch in (pairs[:17], pairs[17:]):
        assert Counter(map(content, epoch)) == wanted
    assert [p.prompt.text for p in pairs[:17]] != [p.prompt.text for p in pairs[17:]], "each epoch has its own order"
    assert stream.quarantine.skipped == table.quarantine.skipped == {"ties": 4}
    assert stream.quarantine.rows == table.quarantine.rows == 21, "no row is counted twice"


def test_without_a_permutation_rows_come_as_they_are(files):
    table = load_pairs(*files)
    texts = [text for text, _ in first(stream_pairs(*files), 17)]
    assert texts == [table[i].prompt.text for i in range(17)]


def test_a_window_shuffles_the_rows_of_a_file_and_shards_are_permuted(files):
    stream = stream_pairs(*files, permutation=shuffled, window=4)
    shards = shuffled(3, 0).tolist()
    start, size = ((0, 10), (10, 7), (17, 4))[shards[0]]
    wanted = []
    for block, begin in enumerate(range(0, size, 4)):
        rows = range(start + begin, start + min(size, begin + 4))
        wanted += [rows[i] for i in shuffled(len(rows), 0, shards[0], block).tolist()]
    wanted = [f"caption {number}" for number in wanted if number % 5 != 4]
    assert [text for text, _ in first(stream, len(wanted))] == wanted


@pytest.mark.parametrize("window", [1, 3, 256])
def test_a_stream_resumes_at_any_pair(files, window):
    stream = stream_pairs(*files, permutation=shuffled, window=window)
    whole = first(stream, 40)
    again = stream_pairs(*files, permutation=shuffled, window=window)
    for done in (1, 2, 5, 8, 12, 16, 17, 18, 24):
        cursor = Cursor(**json.loads(json.dumps(whole[done - 1][1].state())))
        assert first(again, 40 - done, cursor) == whole[done:]


def test_a_stream_resumes_between_the_pairs_of_a_row(tmp_path):
    (tmp_path / "p").mkdir()
    for number in range(8):
        (tmp_path / f"p/{number}.jpg").write_bytes(encoded(number))
    rows = [
        {"prompt": f"{k}", "image_path": [f"p/{4 * k + i}.jpg" for i in range(4)], "rank": [0, 1, 2, 3]} for k in (0, 1)
    ]
    stream = stream_pairs(jsonl(tmp_path / "test.jsonl", rows), permutation=shuffled)
    whole = [(pair.key, after) for pair, after in islice(stream.pairs(), 20)]
    assert len({key for key, _ in whole[:12]}) == 12
    for done in range(1, 14):
        rest = [(pair.key, after) for pair, after in islice(stream.pairs(whole[done - 1][1]), 20 - done)]
        assert rest == whole[done:]


def test_going_on_reads_no_more_than_the_block(files):
    stream = stream_pairs(*files, window=3, settings=PreferenceDataConfig(scan=0))
    asked = []
    for part in stream.parts:
        real = part.stream.rows
        part.stream.rows = lambda shard, start=0, real=real: asked.append((shard, start)) or real(shard, start)
    assert first(stream, 1, Cursor(epoch=5, shard=1, block=1, row=1))[0][0] == "caption 15", "caption 14 is a tie"
    assert asked == [(0, 3)], "the second file, from its fourth row on"


def test_processes_share_the_files(files):
    table = load_pairs(*files)
    shares = [stream_pairs(*files, permutation=shuffled, rank=rank, world=2) for rank in (0, 1)]
    texts = [[pair.prompt.text for pair in share.once()] for share in shares]
    assert sorted(texts[0] + texts[1]) == sorted(table[i].prompt.text for i in range(17))
    assert not set(texts[0]) & set(texts[1])
    with pytest.raises(ValueError, match="3 files for 4 processes: split them"):
        stream_pairs(*files, world=4)
    with pytest.raises(ValueError, match=r"rank in \[0, 2\), got 2"):
        stream_pairs(*files, rank=2, world=2)


def test_bad_pairs_of_a_stream_are_named_left_out_and_counted(tmp_path):
    rows = [pick_row(i) for i in range(120)]
    rows[5] = pick_row(5, jpg_0=b"nothing")
    path = pick_a_pic(tmp_path / "a.parquet", rows)
    with pytest.warns(DataWarning, match="unreadable: 1"):
        stream = stream_pairs(path)
    texts = [pair.prompt.text for pair, _, _ in islice(stream.load(), 238)]
    assert texts == [f"caption {i}" for i in range(120) if i != 5] * 2
    assert stream.quarantine.summary()["faults"]["unreadable"]["count"] == 1
    rows[6] = pick_row(6, 0.3)
    with pytest.raises(ValueError, match=r"1\.7% of the data cannot be used"):
        stream_pairs(pick_a_pic(tmp_path / "b.parquet", rows))


def test_a_stream_that_turns_bad_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.data.stream.ENOUGH", 10)
    rows = [pick_row(i) for i in range(10)] + [pick_row(i, jpg_1=None) for i in range(10, 20)]
    stream = stream_pairs(pick_a_pic(tmp_path / "a.parquet", rows), settings=PreferenceDataConfig(scan=10))
    with pytest.warns(DataWarning, match="left out"), pytest.raises(ValueError, match="unreadable: 1"):
        list(islice(stream.load(), 11))


def test_a_stream_without_pairs_is_an_error_and_not_endless(tmp_path):
    path = pick_a_pic(tmp_path / "a.parquet", [pick_row(0, 0.5)])
    with pytest.raises(ValueError, match="no pair can be used"):
        next(stream_pairs(path).pairs())


def test_folders_of_pairs_stream_too(tmp_path):
    for side, number in (("chosen", 0), ("rejected", 1)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.jpg").write_bytes(encoded(number))
    (tmp_path / "chosen/a.txt").write_text("a text")
    pair, images, _ = next(stream_pairs(tmp_path).load())
    assert (pair.prompt.text, len(images)) == ("a text", 2)
