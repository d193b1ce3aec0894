"""What the processor can do, and how much of it this process may use. Imports no torch.

The functions named `parse_*` take the text of a system file, so that tests feed samples of machines they do not run on.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CPU_CLASSES = ("amx", "avx512-bf16", "avx512-vnni", "avx512", "avx2", "sse", "neon-bf16", "neon", "other")

# The first class all of whose flags are there is the class. The names are Linux's; sysctl's are translated to them.
_CLASS_FLAGS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx", frozenset({"amx_tile", "amx_bf16"})),
    ("avx512-bf16", frozenset({"avx512f", "avx512_bf16"})),
    ("avx512-vnni", frozenset({"avx512f", "avx512_vnni"})),
    ("avx512", frozenset({"avx512f"})),
    ("avx2", frozenset({"avx2"})),
    ("sse", frozenset({"sse"})),
    ("neon-bf16", frozenset({"asimd", "bf16"})),
    ("neon", frozenset({"asimd"})),
)

_SYSCTL_FLAGS = {
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.neon": "asimd",
    "hw.optional.sse": "sse",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}

# Arm's cpuinfo names a processor by numbers only: (implementer, part). These are the ones found in servers.
_ARM_NAMES = {
    (0x41, 0xD0C): "Arm Neoverse N1",
    (0x41, 0xD40): "Arm Neoverse V1",
    (0x41, 0xD49): "Arm Neoverse N2",
    (0x41, 0xD4F): "Arm Neoverse V2",
    (0x41, 0xD84): "Arm Neoverse V3",
    (0x41, 0xD8E): "Arm Neoverse N3",
    (0xC0, 0xAC3): "Ampere-1",
}


class Group(NamedTuple):
    """One control group that this process is in, as the folder that holds its limits. `version` is 1 or 2."""

    version: int
    folder: Path


def cpu_class(flags: frozenset[str] | None = None) -> str:
    """Return the one of `CPU_CLASSES` that these flags make; without flags, that of this machine.

    Where the system does not tell its flags, the class is what every processor of the architecture has.
    """
    if flags is None:
        flags = _flags() or _least_flags(platform.machine())
    return next((name for name, needed in _CLASS_FLAGS if needed <= flags), "other")


def cpu_name() -> str:
    """Return the processor's name, or the name of its architecture where the system does not tell."""
    if platform.system() == "Darwin":
        name = _sysctl("-n", "machdep.cpu.brand_string").strip()
    else:
        name = parse_name(_read(Path("/proc/cpuinfo")))
    return name or platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Return how many cores this process may keep busy: its affinity, and no more than its control groups' quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_groups("cpu"))
    # 1.5 cores are used up by two threads, not by one.
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def memory_bytes() -> int | None:
    """Return the bytes of memory this process may use: the machine's, and no more than its control groups' limit.

    None where the system tells neither.
    """
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None
    known = [value for value in (total, memory_limit(_groups("memory"))) if value is not None and value > 0]
    return min(known, default=None)


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags that all processors in the text of /proc/cpuinfo share (`flags` of x86, `Features` of Arm)."""
    found = [frozenset(line.split()) for line in _values(cpuinfo, "flags", "Features")]
    return frozenset.intersection(*found) if found else frozenset()


def parse_name(cpuinfo: str) -> str:
    """Return the processor's name from the text of /proc/cpuinfo, or an empty string."""
    for key in ("model name", "Processor", "Hardware"):
        for value in _values(cpuinfo, key):
            if value:
                return value
    numbers = [next(iter(_values(cpuinfo, key)), "") for key in ("CPU implementer", "CPU part")]
    try:
        implementer, part = (int(number, 16) for number in numbers)
    except ValueError:
        return ""
    return _ARM_NAMES.get((implementer, part), f"Arm implementer {implementer:#x} part {part:#x}")


def parse_sysctl(text: str) -> frozenset[str]:
    """Return, under Linux's names, the flags in what macOS's `sysctl hw.optional machdep.cpu` prints."""
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in _SYSCTL_FLAGS and value.strip() == "1":
            flags.add(_SYSCTL_FLAGS[key])
        elif key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            flags.update(value.lower().replace("avx512vnni", "avx512_vnni").split())
    return frozenset(flags)


def parse_groups(cgroup: str, mountinfo: str, controller: str) -> list[Group]:
    """Return the control groups that limit `controller` ("cpu" or "memory"): the process's own and all above it.

    Takes the text of /proc/self/cgroup and /proc/self/mountinfo. In a container only a part of the tree is mounted.
    """
    paths: dict[int, str] = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    groups: list[Group] = []
    for version, root, mount in _group_mounts(mountinfo, controller):
        if version in paths:
            groups += [Group(version, folder) for folder in _upwards(mount, root, paths[version])]
    return groups


def cpu_quota(groups: Sequence[Group]) -> float | None:
    """Return the smallest quota of these groups in cores, or None where there is none."""
    quotas = []
    for version, folder in groups:
        if version == 2:
            quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
        else:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        # "max" (version 2) and -1 (version 1) mean no quota.
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(groups: Sequence[Group]) -> int | None:
    """Return the smallest memory limit of these groups in bytes, or None where there is none."""
    texts = [_read(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")) for version, folder in groups]
    return min((int(text) for text in map(str.strip, texts) if text.isdecimal()), default=None)


def _flags() -> frozenset[str]:
    if platform.system() == "Darwin":
        return parse_sysctl(_sysctl("hw.optional", "machdep.cpu"))
    return parse_flags(_read(Path("/proc/cpuinfo")))


def _least_flags(machine: str) -> frozenset[str]:
    if machine.lower() in ("x86_64", "amd64"):
        return frozenset({"sse"})
    return frozenset({"asimd"}) if machine.lower() in ("arm64", "aarch64") else frozenset()


def _groups(controller: str) -> list[Group]:
    return parse_groups(_read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mountinfo")), controller)


def _group_mounts(mountinfo: str, controller: str) -> list[tuple[int, str, Path]]:
    """Return (version, the group that is mounted, where) of each control group mount that can hold `controller`."""
    mounts = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, mount = (_unescape(field) for field in fields[3:5])
        if kind[0] == "cgroup2":
            mounts.append((2, root, Path(mount)))
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            mounts.append((1, root, Path(mount)))
    return mounts


def _upwards(mount: Path, root: str, path: str) -> list[Path]:
    """Return the folder of the group `path` and of all above it up to the mount, which shows the group `root`."""
    inside = path == root or path.startswith(root.rstrip("/") + "/")
    parts = Path(path[len(root) :].lstrip("/")).parts if inside else ()
    if ".." in parts:  # outside of what this namespace may see
        parts = ()
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _values(cpuinfo: str, *keys: str) -> list[str]:
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for key, _, value in lines if key.strip() in keys]


def _read(path: Path) -> str:
    """Return the text of a system file, or an empty string where this system has no such file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _sysctl(*arguments: str) -> str:
    try:
        # A key that this macOS does not know makes the exit status 1; the others are printed all the same.
        done = subprocess.run(["/usr/sbin/sysctl", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def peak_bytes() -> int | None:
    """Return the most memory that this process had at once, where the system tells."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")))
    return int(found[1]) * 1024 if found else None
