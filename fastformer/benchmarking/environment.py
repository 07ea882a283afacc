"""The machine and the versions that figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastformer.diagnostics.doctor import machine


@dataclass(frozen=True)
class Environment:
    """Everything except the code that influences the figures.

    Attributes:
        device: the product's name.
        gpu: whether the device is a GPU.
        memory_gib: memory of the device in GiB.
        machine: versions and settings, as ``fastformer doctor`` shows them.
        commit: the commit of the sources, with "+" if they have changed since; None outside a checkout.
        began: the time of the start, UTC, ISO 8601.
        load: the load average of the last minute at the start; None if the system has none.
    """

    device: str
    gpu: bool
    memory_gib: float | None
    machine: dict[str, Any]
    commit: str | None
    began: str
    load: float | None

    def rows(self) -> list[tuple[str, str]]:
        """The names and values of all known fields, as rows of a table."""
        known = asdict(self)
        known |= known.pop("machine")
        return [(name, str(value)) for name, value in known.items() if value not in (None, {}, "")]


def environment(device: torch.device) -> Environment:
    """The environment of this process, with `device`."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Environment(
        device=_product(device),
        gpu=device.type == "cuda",
        memory_gib=_memory(device),
        machine=machine(),
        commit=_commit(),
        began=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=load,
    )


def _product(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, AttributeError, OSError):
        return None


def _commit() -> str | None:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
