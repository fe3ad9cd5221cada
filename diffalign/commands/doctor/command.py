"""Run all checks of ``diffalign doctor``, print each finding at once, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from diffalign.commands.doctor.config import PIPELINE, DoctorConfig
from diffalign.commands.doctor.findings import Check, Finding, run_check, verdict
from diffalign.commands.doctor.machine import devices, disk, environment, packages
from diffalign.commands.doctor.probes import attention, compiling, lora_round_trip
from diffalign.commands.doctor.trials import trials
from diffalign.trainers.registry import trainer_names


def run(config: DoctorConfig) -> int:
    """Print the findings; return 1 if one is a problem, else 0."""
    findings = []
    for title, check in checks(config).items():
        print(f"\n{title}", flush=True)
        for finding in run_check(title, check):
            print(f"  {finding}", flush=True)
            findings.append(finding)
    print(f"\n{verdict(findings)}")
    return int(any(finding.status == "problem" for finding in findings))


def checks(config: DoctorConfig) -> dict[str, Check]:
    """Map the title of each section to its check, in order."""
    found: dict[str, Check] = {
        "environment": environment,
        "packages": packages,
        "devices": devices,
        "disk": partial(disk, config.output_dir),
        "attention": attention,
        "compile": compiling,
    }
    world = config.world()
    if world is None:
        return {**found, "embedded world": _no_world}
    return {
        **found,
        "LoRA": partial(lora_round_trip, world / PIPELINE),
        "trainers": partial(trials, trainer_names(), world),
    }


def _no_world() -> Iterator[Finding]:
    text = "assets/shapes-sd3 not found: LoRA and trainers were not tested"
    yield Finding("embedded world", "problem", text, "run in a checkout of the repository, or give --assets FOLDER")
