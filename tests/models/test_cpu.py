from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from dbcap.models import cpu

# Shortened: the lines that count, with some of their neighbours.
XEON_AMX = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse sse2 ssse3 fma avx f16c avx2 avx512f avx512bw avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse sse2 ssse3 fma avx f16c avx2 avx512f avx512bw avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8
"""
EPYC_BF16 = """\
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse sse2 sse4a fma avx avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vnni
bugs\t\t: sysret_ss_attrs spectre_v1
"""
XEON_CASCADE_LAKE = (
    "model name\t: Intel(R) Xeon(R) CPU @ 2.80GHz\nflags\t\t: fpu sse avx avx2 avx512f avx512bw avx512_vnni\n"
)
XEON_SKYLAKE = "model name\t: Intel Xeon Processor (Skylake)\nflags\t\t: fpu sse avx avx2 avx512f avx512cd\n"
HASWELL = "model name\t: Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz\nflags\t\t: fpu sse sse2 avx f16c avx2 fma\n"
NEHALEM = "model name\t: Intel(R) Xeon(R) CPU X5570\nflags\t\t: fpu sse sse2 sse4_2\n"
GRAVITON3 = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp sve i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""
GRAVITON2 = GRAVITON3.replace(" i8mm bf16", "").replace("0xd40", "0xd0c")
UNKNOWN_ARM = GRAVITON2.replace("0x41", "0x99").replace("0xd0c", "0x123")
RISCV = "processor\t: 0\nhart\t\t: 0\nisa\t\t: rv64imafdc\n"

APPLE_M2 = """\
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.AdvSIMD: 1
hw.optional.floatingpoint: 1
machdep.cpu.brand_string: Apple M2
"""
APPLE_M1 = APPLE_M2.replace("FEAT_BF16: 1", "FEAT_BF16: 0")
APPLE_INTEL = """\
hw.optional.avx2_0: 1
hw.optional.avx512f: 1
hw.optional.sse: 1
machdep.cpu.features: FPU VME SSE SSE2 AVX1.0
machdep.cpu.leaf7_features: RDWRFSGS AVX2 AVX512F AVX512VNNI
"""


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (XEON_AMX, "amx"),
        (EPYC_BF16, "avx512-bf16"),
        (XEON_CASCADE_LAKE, "avx512-vnni"),
        (XEON_SKYLAKE, "avx512"),
        (HASWELL, "avx2"),
        (NEHALEM, "sse"),
        (GRAVITON3, "neon-bf16"),
        (GRAVITON2, "neon"),
        (RISCV, "other"),
        ("", "other"),
    ],
)
def test_class_of_linux_machines(text: str, kind: str) -> None:
    assert cpu.cpu_class(cpu.parse_flags(text)) == kind
    assert kind in cpu.CPU_CLASSES


@pytest.mark.parametrize(
    ("text", "kind"),
    [(APPLE_M2, "neon-bf16"), (APPLE_M1, "neon"), (APPLE_INTEL, "avx512-vnni"), ("", "other")],
)
def test_class_of_macs(text: str, kind: str) -> None:
    assert cpu.cpu_class(cpu.parse_sysctl(text)) == kind


def test_half_of_amx_is_not_amx() -> None:
    """A hypervisor may show the tiles and hide their bfloat16 products."""
    assert cpu.cpu_class(frozenset({"avx512f", "avx512_bf16", "amx_tile"})) == "avx512-bf16"


def test_flags_are_those_that_all_processors_share() -> None:
    text = "flags\t: sse avx2\n\nflags\t: sse avx2 avx512f\n"
    assert cpu.parse_flags(text) == {"sse", "avx2"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (XEON_AMX, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"),
        (EPYC_BF16, "AMD EPYC 9B14"),
        (GRAVITON3, "Arm Neoverse V1"),
        (UNKNOWN_ARM, "Arm implementer 0x99 part 0x123"),
        (RISCV, ""),
        ("", ""),
    ],
)
def test_name(text: str, name: str) -> None:
    assert cpu.parse_name(text) == name


def test_this_machine() -> None:
    assert cpu.cpu_class() in cpu.CPU_CLASSES
    assert cpu.cpu_name()
    assert 1 <= cpu.cores() <= (os.cpu_count() or 1)
    memory = cpu.memory_bytes()
    assert memory is not None
    assert memory > 2**28
    if platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64"):
        assert cpu.cpu_class() != "other"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_follow_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def mount(folder: Path, *, version: int, root: str = "/", controllers: str = "") -> str:
    kind = "cgroup2 cgroup2 rw" if version == 2 else f"cgroup cgroup rw,{controllers}"
    return f"31 23 0:28 {root} {str(folder).replace(' ', chr(92) + '040')} rw,relatime shared:9 - {kind}\n"


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    base = tmp_path / "with space"
    write(base / "a", "cpu.max", "150000 100000\n")
    write(base / "a/b", "cpu.max", "max 100000\n")
    write(base / "a", "memory.max", "max\n")
    write(base / "a/b", "memory.max", "1073741824\n")
    write(base / "other", "cpu.max", "1000 100000\n")
    groups = cpu.parse_groups("0::/a/b\n", mount(base, version=2), "cpu")
    assert groups == [(2, base / "a/b"), (2, base / "a"), (2, base)]
    assert cpu.cpu_quota(groups) == 1.5
    assert cpu.memory_limit(groups) == 2**30


def test_version_1_reads_its_controller_only(tmp_path: Path) -> None:
    write(tmp_path / "cpu/job", "cpu.cfs_quota_us", "400000\n")
    write(tmp_path / "cpu/job", "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cpu", "cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu", "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory/job", "memory.limit_in_bytes", "536870912\n")
    write(tmp_path / "memory", "memory.limit_in_bytes", "9223372036854771712\n")
    mounts = mount(tmp_path / "cpu", version=1, controllers="cpu,cpuacct")
    mounts += mount(tmp_path / "memory", version=1, controllers="memory") + mount(tmp_path / "unified", version=2)
    own = "5:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"
    assert cpu.cpu_quota(cpu.parse_groups(own, mounts, "cpu")) == 4
    assert cpu.memory_limit(cpu.parse_groups(own, mounts, "memory")) == 2**29


@pytest.mark.parametrize(
    ("own", "root"),
    [
        ("0::/docker/1234\n", "/docker/1234"),  # the container sees its own group as the mount
        ("0::/\n", "/"),  # a namespace: the same
        ("0::/../elsewhere\n", "/"),  # outside of the namespace
        ("0::/docker/1234x\n", "/docker/1234"),  # another group, whose name begins alike
    ],
)
def test_containers_end_at_the_mount(tmp_path: Path, own: str, root: str) -> None:
    write(tmp_path, "cpu.max", "50000 100000\n")
    groups = cpu.parse_groups(own, mount(tmp_path, version=2, root=root), "cpu")
    assert groups == [(2, tmp_path)]
    assert cpu.cpu_quota(groups) == 0.5


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert cpu.parse_groups("", "", "cpu") == []
    assert cpu.parse_groups("garbage\n", "1 2 3 - x\n", "cpu") == []
    empty = [cpu.Group(2, tmp_path), cpu.Group(1, tmp_path / "absent")]
    assert cpu.cpu_quota(empty) is None
    assert cpu.memory_limit(empty) is None


@pytest.mark.parametrize(("quota", "expected"), [("10000 100000", 1), ("100000 100000", 1), ("max 100000", None)])
def test_quota_bounds_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int | None) -> None:
    write(tmp_path, "cpu.max", quota)
    unbounded = cpu.cores()
    monkeypatch.setattr(cpu, "_groups", lambda _: [cpu.Group(2, tmp_path)])
    assert cpu.cores() == (unbounded if expected is None else expected)


def test_limit_bounds_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "memory.max", str(2**20))
    monkeypatch.setattr(cpu, "_groups", lambda _: [cpu.Group(2, tmp_path)])
    assert cpu.memory_bytes() == 2**20


def test_peak_memory_only_grows() -> None:
    before = cpu.peak_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    held = bytearray(before + 50_000_000)
    assert (cpu.peak_bytes() or 0) >= len(held)
