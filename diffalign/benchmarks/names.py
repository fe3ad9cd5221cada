"""Names of the benchmarks, without importing them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from diffalign.plugins import declaring_modules


def benchmark_modules() -> Mapping[str, str]:
    """Map each benchmark to its module."""
    return declaring_modules("benchmarks", "register_benchmark")


def benchmark_names() -> list[str]:
    """List the benchmarks."""
    return sorted(benchmark_modules())


def unknown_benchmark(name: str) -> str:
    """Explain that there is no such benchmark, with the closest name."""
    close = difflib.get_close_matches(name, benchmark_names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    what = f"there is no benchmark {name[:60]!r}: {hint}" if name else "name a benchmark first: "
    return f"{what}diffalign bench NAME MODEL ..., NAME one of {', '.join(benchmark_names())}"
