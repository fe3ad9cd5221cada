"""A path in a table starts at the table and stays there; a cell may hold the image itself; an address is refused."""

import base64
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign import media
from diffalign.cli import main
from diffalign.commands.check import CheckConfig, examine
from diffalign.commands.image_sources import read
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.images import decode, to_uint8
from diffalign.data.pairs import load_pairs
from diffalign.data.stream import stream_pairs
from diffalign.data.tables import open_table
from diffalign.data.validation import SampleError
from diffalign.files import MAX_MESSAGE
from tests.data import table_writers
from tests.data.preference_files import encoded, jsonl
from tests.data.table_writers import CONTAINERS

# What does not fit into an Arrow column beside a text is written as text files only.
FLAT = [container for container in CONTAINERS if container is not table_writers.saved]


def row(first, second="1.jpg"):
    return {"prompt": "p", "image_0": first, "image_1": second, "label": 1.0, "image": first}


@pytest.fixture
def folder(tmp_path):
    """A folder with images, and an image beside the folder."""
    place = tmp_path / "data"
    place.mkdir()
    for number in range(4):
        (place / f"{number}.jpg").write_bytes(encoded(number))
    (tmp_path / "secret.jpg").write_bytes(encoded(9))
    return place


def content_of(source):
    decode(source)
    return source.read()


def by_training(path, **settings):
    return content_of(load_pairs(path, settings=PreferenceDataConfig(scan=0, **settings))[0].images[0])


def by_stream(path, **settings):
    return content_of(
        next(iter(stream_pairs(path, settings=PreferenceDataConfig(scan=0, **settings)).once())).images[0]
    )


def by_mask(path, **settings):
    data = load_pairs(path, settings=PreferenceDataConfig(scan=0, mask="image", **settings))
    return content_of(data[0].mask)


def by_score(path, **settings):
    item = next(read(str(path), **settings))
    pixels = (item.load() * 255).round().byte()
    known = {number: decode_bytes(encoded(number)) for number in (0, 9)}
    return encoded(next(number for number, wanted in known.items() if (pixels == wanted).all()))


def decode_bytes(content):
    return to_uint8(media.decode(content))


READERS = [by_training, by_stream, by_mask, by_score]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("container", FLAT)
def test_a_relative_path_starts_at_the_folder_of_the_table(reader, container, folder, tmp_path, monkeypatch):
    """From another working folder, where a file of that name is another picture."""
    (tmp_path / "0.jpg").write_bytes(encoded(5))
    path = container(folder, [row("0.jpg"), row("2.jpg")])
    monkeypatch.chdir(tmp_path)
    assert reader(path.relative_to(tmp_path)) == encoded(0)
    assert reader(path) == encoded(0)


@pytest.mark.parametrize("reader", READERS[:3])
def test_a_table_in_a_folder_of_a_folder_is_where_paths_start(reader, folder):
    table_writers.table(folder, [row("0.jpg"), row("2.jpg")]).rename(folder / "train-00000.parquet")
    assert reader(folder.parent / "data") == encoded(0)
    (folder.parent / "outer/data").mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, folder.parent / "outer/data")
    assert reader(folder.parent / "outer") == encoded(0)


OUTSIDE = {
    "absolute": lambda folder: str(folder.parent / "secret.jpg"),
    "above": lambda folder: "../secret.jpg",
    "around": lambda folder: "x/../../secret.jpg",
    "link": lambda folder: "link.jpg",
    "linked folder": lambda folder: "up/secret.jpg",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", OUTSIDE)
@pytest.mark.parametrize("container", [table_writers.json_lines, table_writers.comma, table_writers.table])
def test_a_path_does_not_leave_the_folder_unless_it_is_allowed(reader, way, container, folder):
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "up").symlink_to(folder.parent)
    (folder / "x").mkdir()
    path = container(folder, [row(OUTSIDE[way](folder)), row("2.jpg")])
    with pytest.raises(
        (ValueError, SampleError), match=r"lies outside the folder of the data, .*set image_root .*allow_outside"
    ):
        reader(path)
    assert reader(path, allow_outside=True) == encoded(9)
    if way == "absolute":
        assert reader(path, image_root=folder.parent) == encoded(9), "a folder that the user named holds it"


@pytest.mark.parametrize("reader", [by_training, by_stream, by_score])
@pytest.mark.parametrize("way", OUTSIDE)
def test_the_source_of_an_edit_does_not_leave_the_folder_either(reader, way, folder):
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "up").symlink_to(folder.parent)
    (folder / "x").mkdir()
    rows = [{**row(name), "metadata": {"image": image}}
            for name, image in (("0.jpg", OUTSIDE[way](folder)), ("2.jpg", "2.jpg"))]  # fmt: skip
    path = table_writers.json_lines(folder, rows)
    if reader is by_stream:
        assert reader(path) == encoded(2), "a stream leaves the row out, and counts it"
    else:
        with pytest.raises((ValueError, SampleError), match=r"image in metadata: lies outside .*allow_outside"):
            reader(path)
    assert reader(path, allow_outside=True) == encoded(0)


@pytest.mark.parametrize("command", ["check", "relabel", "score"])
def test_the_commands_say_how_to_allow_it(command, folder, tmp_path, capsys):
    path = str(table_writers.json_lines(folder, [row("../secret.jpg"), row("2.jpg")]))
    options = [] if command == "check" else ["--rewards", "brightness"]
    options += ["--output_dir", str(tmp_path / "out")] if command == "score" else []
    main([command, path, *options])
    said = capsys.readouterr()
    assert "allow_outside" in said.out + said.err
    assert (
        main(
            [
                command,
                path,
                *options,
                "--allow_outside",
                "--max_bad_share" if command != "score" else "--batch_size",
                "1",
            ]
        )
        == 0
    )
    assert "outside" not in capsys.readouterr().out


def test_an_absolute_path_within_the_folder_needs_no_permission(folder):
    assert by_training(jsonl(folder / "a.jsonl", [row(str(folder / "0.jpg"))])) == encoded(0)


def test_the_cache_of_the_hub_holds_its_files_by_links(folder, tmp_path):
    """As snapshot_download lays them out: snapshots/COMMIT/FILE -> ../../blobs/DIGEST."""
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number in (0, 1):
        (blobs / f"blob{number}").write_bytes(encoded(number))
        (snapshot / f"{number}.jpg").symlink_to(f"../../blobs/blob{number}")
    assert by_training(jsonl(snapshot / "a.jsonl", [row("0.jpg")])) == encoded(0)
    assert by_score(jsonl(snapshot / "a.jsonl", [row("0.jpg")])) == encoded(0)


def test_files_named_on_the_command_line_may_lie_anywhere(folder, tmp_path):
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for path in (tmp_path / "secret.jpg", folder / "link.jpg", folder / "../secret.jpg"):
        assert by_score(path) == encoded(9)


def test_a_hub_data_set_does_not_reach_into_the_working_folder(folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([row("0.jpg")]))
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="lies outside"):
        by_training("owner/name")
    assert by_training("owner/name", image_root=folder) == encoded(0)


def test_the_path_of_an_image_feature_is_a_path_like_others(folder):
    """Bytes beside a path, which the writer of the file chose."""
    paths = [{"bytes": None, "path": path} for path in ("../secret.jpg", "1.jpg")]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"chosen": pa.array(paths[:1], kind), "rejected": pa.array(paths[1:], kind), "text": ["p"]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    data = load_pairs(folder / "a.parquet", settings=PreferenceDataConfig(scan=0))
    with pytest.raises(ValueError, match="lies outside"):
        data[0].winner.read()
    assert data[0].loser.read() == encoded(1)


PACKED = base64.b64encode(encoded(0)).decode()
WRAPPED = "\n".join(PACKED[i : i + 76] for i in range(0, len(PACKED), 76))
INSIDE = {
    "base64": PACKED,
    "wrapped": WRAPPED,
    "unpadded": PACKED.rstrip("="),
    "data address": f"data:image/jpeg;base64,{PACKED}",
    "url safe": PACKED.replace("+", "-").replace("/", "_") if not PACKED.startswith("/9j/") else PACKED,
    "list of one": [PACKED],
    "list of a path": ["0.jpg"],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize(
    "container", [table_writers.json_lines, table_writers.json_list, table_writers.comma, table_writers.table]
)
def test_an_image_in_a_cell_is_read(reader, kind, container, folder):
    # An Arrow column is of one type, so that all rows have it.
    rows = [row(INSIDE[kind]), row(INSIDE[kind])]
    assert reader(container(folder, rows)) == encoded(0)


LONG = base64.b64encode(os.urandom(75_000)).decode()
REFUSED = {
    "address": ("https://example.invalid/a.png", "is an address, and nothing is fetched: download it"),
    "long address": ("s3://bucket/" + "a" * 10**6, "is an address, and nothing is fetched"),
    "file address": ("file:///etc/passwd", "is an address, and nothing is fetched"),
    "other base64": (LONG, r"a text of 100,000 characters is neither a path nor an image in base64"),
    "cut base64": (PACKED[:-9] + "====" + "A" * 5, r"a text of 1,\d+ characters is neither a path nor"),
    "zero byte": ("a\0b.png", "a text of 7 characters is neither"),
    "long path": ("x/" * 3000 + "a.png", "a text of 6,005 characters is neither"),
    "number": (7, "7 is neither a path nor the content of an image file"),
    "list": (["0.jpg", "1.jpg"], "a list of 2 images where one belongs"),
    "mapping": ({"url": "x"}, "is neither a path nor the content of an image file"),
    "nothing": (None, "no image"),
    "name too long": ("a" * 300 + ".png", "file name too long"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("container", [table_writers.json_lines, table_writers.table])
def test_cells_without_an_image_are_refused_in_few_words(reader, kind, container, folder):
    value, message = REFUSED[kind]
    if reader is by_score and value is None:
        message = "no picture|no image"
    with pytest.raises((ValueError, SampleError), match=message) as caught:
        reader(container(folder, [row(value), row(value)]))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("command", ["check", "relabel", "score"])
@pytest.mark.parametrize("kind", ["rows", "columns", "names", "texts"])
def test_no_message_is_longer_than_a_page(command, kind, folder, tmp_path, capsys):
    long = "k" * 10**5
    rows = {
        "rows": [{**row(LONG + str(i)), "label": LONG, "metadata": LONG} for i in range(20)],
        "columns": [{f"{long}{i}": 1 for i in range(3)} | {f"c{i}": 1 for i in range(5000)}],
        "names": [{"name": long, **row(long + ".png"), "prompt": ""} for i in range(20)],
        "texts": [{**row("0.jpg"), "prompt": "word " * 10**5} for i in range(3)],
    }[kind]
    options = [] if command == "check" else ["--rewards", "brightness"]
    options += ["--output_dir", str(tmp_path / "out")] if command == "score" else []
    main([command, str(jsonl(folder / "a.jsonl", rows)), *options])
    said = capsys.readouterr()
    assert len(said.err) < MAX_MESSAGE or "img" in said.err
    assert all(len(line) < MAX_MESSAGE for line in (said.out + said.err).splitlines())


def test_every_error_of_a_table_is_bounded(folder):
    rows = [{**row(LONG), "label": LONG, "name": LONG, "metadata": LONG} for _ in range(20)]
    rows += [{**row("https://x.y/" + LONG), "name": LONG} for _ in range(20)]
    path = jsonl(folder / "a.jsonl", rows)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_pairs(path)
    assert len(str(caught.value)) <= MAX_MESSAGE
    assert str(caught.value).endswith("or raise max_bad_share")
    report = examine(CheckConfig(data=(str(path),)))
    assert all(len(detail) < 1000 for fault in report["faults"].values() for detail in fault["samples"].values())
    assert open_table(path, PreferenceDataConfig()).row(0).name.startswith(str(path)[:50])
