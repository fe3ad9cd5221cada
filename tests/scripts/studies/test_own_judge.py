"""Data of the study of judges of one's own."""

from pyarrow import parquet

from scripts.studies import own_judge


def test_no_prompt_is_in_both_files_and_the_seed_decides(tmp_path):
    def captions(seed, name):
        files = own_judge.split(seed, tmp_path / name)
        return [parquet.read_table(file).column("caption").to_pylist() for file in files]

    tables = [captions(0, "a"), captions(0, "b"), captions(1, "c")]
    assert tables[0] == tables[1] != tables[2]
    for labels, held_out in tables:
        assert len(labels) == own_judge.LABELS
        assert len({*held_out}) == own_judge.PROMPTS
        assert not {*labels} & {*held_out}
