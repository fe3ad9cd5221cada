"""Ways in which a run folder can be damaged, forged, or somebody else's: each a function of the folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffalign.runtime.manifest import manifest_text

NEWEST = "checkpoint-6"


def newest(folder: Path) -> Path:
    return folder / NEWEST


def resign(folder: Path) -> None:
    """Write a manifest that fits what lies there, as somebody who forges a checkpoint would."""
    (newest(folder) / "manifest.json").unlink(missing_ok=True)
    names = [path.name for path in newest(folder).iterdir() if path.is_file()]
    (newest(folder) / "manifest.json").write_text(manifest_text(newest(folder), 6, names))


def forged(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A state that says something else, signed."""

    def damage(folder: Path) -> None:
        path = newest(folder) / "state.json"
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))
        resign(folder)

    return damage


def manifest(text: str | bytes | Callable[[dict], object]) -> Callable[[Path], None]:
    """Another manifest: bytes, or a change of its content without a new signature."""

    def damage(folder: Path) -> None:
        path = newest(folder) / "manifest.json"
        if callable(text):
            content = json.loads(path.read_text())
            text(content)
            path.write_text(json.dumps(content, indent=1))
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def signed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A manifest that lists something else, signed."""
    from diffalign.runtime.manifest import _signed

    def damage(folder: Path) -> None:
        path = newest(folder) / "manifest.json"
        content = json.loads(path.read_text())
        content.pop("sha256")
        change(content)
        path.write_text(_signed(content))

    return damage


def file(name: str, act: Callable[[Path], object]) -> Callable[[Path], None]:
    """One file of the newest checkpoint."""
    return lambda folder: act(newest(folder) / name)


def top(name: str, act: Callable[[Path], object]) -> Callable[[Path], None]:
    """One file of the run folder."""
    return lambda folder: act(folder / name)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def to_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def hollow(path: Path) -> None:
    """Two terabytes that were never written."""
    with path.open("r+b") as handle:
        handle.truncate(2 << 40)


def hollow_and_signed(folder: Path) -> None:
    hollow(newest(folder) / "weights.safetensors")
    signed(lambda content: content["files"]["weights.safetensors"].update(bytes=2 << 40))(folder)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Other weights, signed."""

    def damage(folder: Path) -> None:
        path = newest(folder) / "weights.safetensors"
        named = load_file(path)
        change(named)
        save_file(named, path)
        resign(folder)

    return damage


def header(text: bytes) -> Callable[[Path], None]:
    """A safetensors file whose header is something else, signed."""

    def damage(folder: Path) -> None:
        (newest(folder) / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        resign(folder)

    return damage


def moved_and_linked(folder: Path) -> None:
    """The newest checkpoint lies elsewhere, and a link leads to it."""
    elsewhere = folder.with_name(f"{folder.name}-elsewhere")
    shutil.move(newest(folder), elsewhere)
    newest(folder).symlink_to(elsewhere)


def of_another_program(folder: Path) -> None:
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "optimizer.bin").write_bytes(b"theirs")


ENTRY = {"bytes": 1, "sha256": ""}
DEEP = "[" * 200_000
# What must end as if nothing had happened: the newest sound checkpoint is used, or what is broken is repaired.
SURVIVED: dict[str, Callable[[Path], object]] = {
    "manifest missing": file("manifest.json", Path.unlink),
    "manifest empty": manifest(""),
    "manifest truncated": file("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "manifest not UTF-8": manifest(b"\xff\xfe\x00"),
    "manifest deep": manifest(DEEP),
    "manifest a list": manifest("[]"),
    "manifest null": manifest("null"),
    "manifest of files that are a list": manifest(lambda content: content.update(files=[])),
    "manifest with another size": manifest(lambda content: content["files"]["state.json"].update(bytes=1)),
    "manifest with a huge number": manifest('{"format": ' + "9" * 5000 + "}"),
    "manifest a pipe": file("manifest.json", fifo),
    "manifest a loop": file("manifest.json", loop),
    "manifest a folder": file("manifest.json", to_folder),
    "manifest hollow": file("manifest.json", hollow),
    "manifest signed, files a number": signed(lambda content: content.update(files=3)),
    "manifest signed, sizes text": signed(lambda content: content["files"]["state.json"].update(bytes="9")),
    "manifest signed, path outside": signed(lambda c: c["files"].update({"../config.yaml": ENTRY})),
    "manifest signed, absolute path": signed(lambda c: c["files"].update({"/dev/zero": ENTRY})),
    "manifest signed, a zero byte in a name": signed(lambda c: c["files"].update({"\0": ENTRY})),
    "manifest signed, format text": signed(lambda content: content.update(format="x" * 10**6)),
    "manifest signed, weights left out": signed(lambda content: content["files"].pop("weights.safetensors")),
    "manifest signed, state left out": signed(lambda content: content["files"].pop("state.json")),
    "weights hollow and signed": hollow_and_signed,
    "weights missing": file("weights.safetensors", Path.unlink),
    "weights a pipe": file("weights.safetensors", fifo),
    "weights a loop": file("weights.safetensors", loop),
    "weights a device": file("weights.safetensors", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
    "weights flipped": file("weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f")),
    "state a folder": file("state.json", to_folder),
    "state empty": file("state.json", lambda path: path.write_bytes(b"")),
    "checkpoint empty": lambda folder: (shutil.rmtree(newest(folder)), newest(folder).mkdir()),
    "checkpoint a file": lambda folder: (shutil.rmtree(newest(folder)), newest(folder).write_text("theirs")),
    "checkpoint a dangling link": lambda folder: (shutil.rmtree(newest(folder)), newest(folder).symlink_to("gone")),
    "checkpoint a loop": lambda folder: (shutil.rmtree(newest(folder)), newest(folder).symlink_to(NEWEST)),
    "checkpoint a pipe": lambda folder: (shutil.rmtree(newest(folder)), os.mkfifo(newest(folder))),
    "checkpoint moved and linked": moved_and_linked,
    "checkpoints of another program": of_another_program,
    "number beyond all steps": lambda folder: (folder / f"checkpoint-{'9' * 300}"[:200]).mkdir(),
    "log with garbage": top("metrics.jsonl", lambda path: path.write_text(f"garbage\n{path.read_text()}")),
    "log twice": top("metrics.jsonl", lambda path: path.write_text(path.read_text() * 2)),
    "log torn": top("metrics.jsonl", lambda path: path.write_text(path.read_text() + '{"step": 7, "lo')),
    "log deep": top("metrics.jsonl", lambda path: path.write_text(f"{DEEP}\n{path.read_text()}")),
    "config empty": top("config.yaml", lambda path: path.write_text("")),
    "config garbage": top("config.yaml", lambda path: path.write_bytes(b"\xff\x00{[")),
    "config missing": top("config.yaml", Path.unlink),
    "exports forged": top("exports.json", lambda path: path.write_text("{}")),
    "exports a list": top("exports.json", lambda path: path.write_text("[1]")),
    "staged files of a crash": lambda folder: (folder / ".diffalign-1-checkpoint-9").mkdir(),
    "lock left over": top(".diffalign.lock", lambda path: path.write_text("process 1 on nowhere")),
}
# What no run can go on from: a message that says so, and nothing in the folder is lost.
REFUSED: dict[str, Callable[[Path], object]] = {
    "state signed, not JSON": lambda folder: ((newest(folder) / "state.json").write_text("{"), resign(folder)),
    "state signed, deep": lambda folder: ((newest(folder) / "state.json").write_text(DEEP), resign(folder)),
    "state signed, a list": lambda folder: ((newest(folder) / "state.json").write_text("[]"), resign(folder)),
    "state without groups": forged(lambda state: state.pop("tensor_groups")),
    "state without a step": forged(lambda state: state.pop("step")),
    "state without origin": forged(lambda state: state.pop("origin")),
    "state with a number for origin": forged(lambda state: state.update(origin=3)),
    "state without tasks": forged(lambda state: state.update(tasks=[])),
    "state with text for the guard": forged(lambda state: state.update(guard="x")),
    "state without the optimizer": forged(lambda state: state.pop("optimizer")),
    "state with another optimizer": forged(lambda state: state["optimizer"].update(shapes=[])),
    "state without a schedule": forged(lambda state: state.update(schedule=None)),
    "weights of another shape": tensors(lambda named: named.update({"00000": torch.zeros(1)})),
    "weights that broadcast": tensors(lambda named: named.update({"00000": torch.zeros(1, 8)})),
    "weights without names": tensors(lambda named: named.clear()),
    "weights with other names": tensors(lambda named: named.update(x=named.pop("00000"))),
    "weights with a broken header": header(b"{"),
    "weights with a header that lies": header(
        b'{"00000":{"dtype":"F32","shape":[8,8],"data_offsets":[0,99999999999999]}}'
    ),
    "weights with a header that is deep": header(b'{"a":' * 50_000),
    "log a folder": top("metrics.jsonl", lambda path: (path.unlink(), path.mkdir())),
    "log a pipe": top("metrics.jsonl", fifo),
    "config a pipe": top("config.yaml", fifo),
    "card a folder": top("README.md", lambda path: path.mkdir()),
    "exports a pipe": top("exports.json", fifo),
    "samples a file": top("samples", lambda path: path.write_text("theirs")),
    "a model lies there": top("model_index.json", lambda path: path.write_text("{}")),
}
