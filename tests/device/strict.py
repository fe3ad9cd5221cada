"""The device "strict": a stand-in for a GPU that runs anywhere, with real values, and refuses mixed devices.

    python -m tests.device.strict train flow_grpo --config configs/flow_grpo/shapes.yaml --max_train_steps 2 ...

runs a `diffalign` command on it. The first call compiles ``strict.cpp`` for some 15 s; a C++ compiler is needed. It
finds tensors on the wrong device, and float64 where a device has none. It tells nothing about speed, memory or kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

NAME = "strict"
SOURCE = Path(__file__).with_name("strict.cpp")
COMPILER = os.environ.get("CXX") or "c++"


def compiler_missing() -> bool:
    return shutil.which(COMPILER) is None


def build() -> Path:
    """Compile the device, once per version of torch and of the source."""
    from torch.utils import cpp_extension

    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = Path(root) / f"diffalign_strict_{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    torch_libraries = Path(torch.__file__).parent / "lib"
    include = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        staged = Path(folder) / library.name
        command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", *include, str(SOURCE), "-o", str(staged)]
        command += [f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", "-ltorch"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{COMPILER} cannot compile {SOURCE.name}: {done.stderr[:1500]}")
        staged.replace(library)
    return library


def install() -> None:
    """Make the device known to torch and accelerate; call it before the first backward pass of the process."""
    global _native
    _native = ctypes.CDLL(str(build()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    _native.strict_register()
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME


def set_float64(value: bool) -> None:
    """Set whether the device has float64, as CUDA has and Apple's mps has not."""
    from diffalign.device import computes_float64

    computes_float64.cache_clear()
    _native.strict_set_float64(ctypes.c_bool(value))


def _module() -> types.ModuleType:
    module = types.ModuleType(NAME)
    state = {"generator": torch.zeros(8, dtype=torch.uint8)}

    def seed(value: int) -> None:
        state["generator"] = torch.full((8,), value % 256, dtype=torch.uint8)

    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16, torch.float32],
        "get_rng_state": lambda device=None: state["generator"].clone(),
        "set_rng_state": lambda value, device=None: state.update(generator=value.clone()),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


if __name__ == "__main__":
    install()
    from diffalign.cli import main

    sys.exit(main(sys.argv[1:]))
