import pytest

from diffalign.runtime import processes
from diffalign.runtime.processes import asked_for, check_world, connect

LAUNCH = ["/venv/bin/python", "/venv/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("environment", "parent", "count"),
    [
        ({"WORLD_SIZE": "4"}, [*LAUNCH, "--num_processes", "2", "train.py"], 4),
        ({}, [*LAUNCH, "--cpu", "--num_processes", "2", "train.py"], 2),
        ({}, [*LAUNCH, "--num_processes=3", "train.py"], 3),
        ({}, ["/venv/bin/accelerate-launch", "--num-processes", "2", "train.py"], 2),
        ({}, [*LAUNCH, "train.py", "--num_processes", "2"], None),  # the script's own
        ({}, ["bash", "-c", "python train.py --num_processes 2"], None),
        ({}, [], None),
    ],
)
def test_what_the_launcher_was_asked_for(environment, parent, count):
    assert asked_for(environment, parent) == count


def test_a_launcher_is_asked_by_its_config_file(tmp_path):
    (tmp_path / "a.yaml").write_text("num_processes: 2\nuse_cpu: true\n")
    assert asked_for({}, [*LAUNCH, "--config_file", str(tmp_path / "a.yaml"), "train.py"]) == 2


def test_another_world_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(processes, "_parent", lambda: [*LAUNCH, "--cpu", "--num_processes", "2", "train.py"])
    with pytest.raises(RuntimeError, match=r"asked for 2 process\(es\).*part of 1.*--multi_gpu"):
        check_world(1)
    check_world(2)


@pytest.mark.parametrize(("size", "expected"), [("2", "true"), ("1", None)])
def test_processes_without_an_accelerator_meet_on_the_cpu(monkeypatch, size, expected):
    monkeypatch.setattr(processes.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    connect()
    assert processes.os.environ.get("ACCELERATE_USE_CPU") == expected
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
