from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dbcap.errors import UsageError
from dbcap.models import cpu, device
from dbcap.models.device import Accelerator, Choice, accelerators, choose, decide

FULL, STARTER, TINY = 239_195_904, 8_560_384, 2_000_000

H100 = Accelerator("cuda:0", "H100", 80 * 2**30, True, (9, 0))
A100 = Accelerator("cuda:1", "A100", 40 * 2**30, True, (8, 0))
T4 = Accelerator("cuda:0", "T4", 16 * 2**30, False, (7, 5))
P100 = Accelerator("cuda:0", "P100", 16 * 2**30, False, (6, 0))
M2 = Accelerator("mps", "Apple M2", 10 * 2**30, True)
M1_OLD_SYSTEM = Accelerator("mps", "Apple M1", 10 * 2**30, False)


def on(*found: Accelerator, cpu_class: str = "avx2", **asked: Any) -> Choice:
    settings: dict[str, Any] = {
        "device": "auto",
        "dtype": "auto",
        "batch_size": "auto",
        "parameters": FULL,
        "threads": 4,
        "threads_reason": "asked for",
        "system": "Linux",
    }
    return decide(**(settings | asked), cpu_class=cpu_class, found=found)


@pytest.mark.parametrize(
    ("cpu_class", "parameters", "dtype"),
    [
        ("amx", FULL, "bfloat16"),
        ("avx512-bf16", FULL, "bfloat16"),
        ("neon-bf16", FULL, "bfloat16"),
        ("avx512-vnni", FULL, "float32"),
        ("avx2", FULL, "float32"),
        ("neon", FULL, "float32"),
        ("other", FULL, "float32"),
        ("amx", 8_000_000, "bfloat16"),
        ("amx", 7_999_999, "float32"),
        ("avx512-bf16", STARTER, "bfloat16"),
        ("avx512-bf16", TINY, "float32"),
    ],
)
def test_auto_dtype_on_cpu(cpu_class: str, parameters: int, dtype: str) -> None:
    choice = on(cpu_class=cpu_class, parameters=parameters)
    assert (choice.device, choice.dtype, choice.cpu_class) == ("cpu", dtype, cpu_class)
    assert cpu_class in choice.why[1]


def test_auto_dtype_on_a_mac_cpu() -> None:
    assert on(cpu_class="neon-bf16", system="Darwin").dtype == "float32"


@pytest.mark.parametrize(
    ("gpu", "parameters", "dtype"),
    [
        (H100, FULL, "bfloat16"),
        (T4, FULL, "float16"),
        (P100, FULL, "float32"),
        (H100, STARTER, "float32"),
        (T4, STARTER, "float32"),
        (M2, FULL, "float32"),
    ],
)
def test_auto_on_gpu(gpu: Accelerator, parameters: int, dtype: str) -> None:
    choice = on(gpu, parameters=parameters)
    assert (choice.device, choice.dtype) == (gpu.device, dtype)


@pytest.mark.parametrize(
    ("asked", "device"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_device_names(asked: str, device: str) -> None:
    assert on(H100, A100, device=asked).device == device


def test_cuda_before_mps_before_cpu() -> None:
    assert on(M2, H100).device == "cuda:0"
    assert on(M2).device == "mps"
    assert on().device == "cpu"


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        ((), "cuda", "device cuda is not there: torch finds no CUDA device on this machine; use auto, cpu"),
        ((), "mps", "device mps is not there: torch finds no MPS device on this machine; use auto, cpu"),
        (
            (H100, A100),
            "cuda:2",
            "device cuda:2 is not there: torch finds cuda:0 (H100), cuda:1 (A100); use auto, cpu, cuda:0, cuda:1",
        ),
        ((M2,), "cuda", "device cuda is not there: torch finds mps (Apple M2); use auto, cpu, mps"),
        ((), "cdua", "there is no device 'cdua'; use auto, cpu, cuda, cuda:N or mps: did you mean cuda?"),
        ((H100,), "cuda:x", "there is no device 'cuda:x'; use auto, cpu, cuda, cuda:N or mps: did you mean cuda?"),
        ((H100,), "cuda:", "there is no device 'cuda:'; use auto, cpu, cuda, cuda:N or mps: did you mean cuda?"),
        ((H100,), "cpu:0", "there is no device 'cpu:0'; use auto, cpu, cuda, cuda:N or mps: did you mean cpu?"),
    ],
)
def test_devices_that_are_not_there(found: tuple[Accelerator, ...], asked: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        on(*found, device=asked)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_what_is_asked_for_is_taken_and_doubts_are_said() -> None:
    choice = on(H100, device="cuda", dtype="float32", batch_size=3)
    assert (choice.dtype, choice.batch_size) == ("float32", 3)
    assert all("asked for" in reason for reason in choice.why)
    assert "slower" in on(dtype="bfloat16").why[1]
    assert "slower" not in on(dtype="bfloat16", cpu_class="amx").why[1]
    half = on(dtype="float16")
    assert half.dtype == "float16"
    assert "tenth" in half.why[1]
    assert "imitates" in on(T4, dtype="bfloat16").why[1]
    assert on(M2, dtype="bfloat16").dtype == "bfloat16"


def test_bfloat16_on_an_old_macos_is_refused() -> None:
    with pytest.raises(UsageError, match="macOS 14"):
        on(M1_OLD_SYSTEM, dtype="bfloat16")


@pytest.mark.parametrize(
    "asked", [{"dtype": "bf16"}, {"batch_size": 0}, {"batch_size": -1}, {"batch_size": "many"}, {"threads": 0}]
)
def test_values_that_cannot_be(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        on(**asked)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("found", "parameters", "size"), [((H100,), STARTER, 64), ((H100,), FULL, 32), ((M2,), FULL, 16)]
)
def test_auto_batch_size_on_a_gpu(found: tuple[Accelerator, ...], parameters: int, size: int) -> None:
    choice = on(*found, parameters=parameters)
    assert choice.batch_size == size
    assert f"batch size {size}: " in choice.why[2]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put another table in the place of the one that `make bench` wrote."""
    table = {
        "amx": {"measured": "x", "float32": [[2e6, 64], [200e6, 8]], "bfloat16": [[2e6, 32], [200e6, 16]]},
        "avx2": {"measured": "y", "float32": [[2e6, 2]], "bfloat16": [[2e6, 4]]},
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(device, "BATCH_SIZES", tmp_path / "table.json")
    device._batch_sizes.cache_clear()
    yield
    device._batch_sizes.cache_clear()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("cpu_class", "dtype", "parameters", "size"),
    [
        ("amx", "float32", 1, 64),
        ("amx", "float32", 0, 64),
        ("amx", "float32", 2_000_000, 64),
        ("amx", "float32", 19_000_000, 64),
        ("amx", "float32", 21_000_000, 8),
        ("amx", "float32", 10**12, 8),
        ("amx", "bfloat16", FULL, 16),
        ("amx", "float16", FULL, 8),
        ("avx2", "float32", FULL, 2),
        ("neon", "float32", FULL, 8),
    ],
)
def test_auto_batch_size_on_a_cpu(cpu_class: str, dtype: str, parameters: int, size: int) -> None:
    choice = on(cpu_class=cpu_class, dtype=dtype, parameters=parameters)
    assert choice.batch_size == size
    of = cpu_class if cpu_class == "avx2" else "amx"
    assert f"batch size {size}: the best for" in choice.why[2]
    assert f"(CPU class {of})" in choice.why[2]


def test_the_table_that_make_bench_wrote() -> None:
    table = json.loads(device.BATCH_SIZES.read_text())
    assert table
    for of_class in table.values():
        assert set(of_class) == {"measured", "float32", "bfloat16"}
        for dtype in ("float32", "bfloat16"):
            rows = of_class[dtype]
            assert [parameters for parameters, _ in rows] == sorted({parameters for parameters, _ in rows})
            assert all(1 <= size <= 64 for _, size in rows)


def test_this_machine_twice() -> None:
    choice = choose(parameters=FULL)
    assert choice == choose(parameters=FULL)
    assert choice.cpu_class == cpu.cpu_class()
    assert 1 <= choice.threads <= cpu.cores()
    assert [reason.split()[0] for reason in choice.why] == ["device", "dtype", "batch", "threads"]
    assert choice.device == (accelerators()[0].device if accelerators() else "cpu")
    torch.empty(1, device=choice.device, dtype=getattr(torch, choice.dtype))


def test_threads() -> None:
    assert choose(parameters=TINY, device="cpu", threads=7).threads == 7
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert choose(parameters=TINY, device="cpu").threads == 1
        torch.set_num_threads(cpu.cores() + 3)
        assert choose(parameters=TINY, device="cpu").threads == cpu.cores()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda() -> None:
    with pytest.raises(UsageError, match="device cuda:0 is not there"):
        choose(parameters=TINY, device="cuda:0")


@pytest.mark.parametrize("module", ["device", "cpu", "doctor"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import dbcap.models.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
