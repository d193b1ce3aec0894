"""What `dbcap doctor` looks at: versions, device, processor, folders and the hub, and what is wrong with them."""

from __future__ import annotations

import base64
import http.client
import importlib
import importlib.util
import os
import platform
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

import dbcap
from dbcap.models import cpu, device

Json: TypeAlias = str | int | list[str] | dict[str, str | int | None] | None

DISTRIBUTION = "dbcap"
DEFAULT_PARAMETERS = 239_195_904  # of nlpconnect/vit-gpt2-image-captioning
DEFAULT_ENDPOINT = "https://huggingface.co"
HUB_TIMEOUT_S = 3.0
LEAST_FREE = 2 * 2**30  # bytes: one full-size captioner, its download and its conversion
NOT_FOR_USERS = frozenset({"dev"})  # extras that only work on dbcap itself needs


@dataclass(frozen=True)
class Row:
    """One finding: `key` and `value` for programs, `label` and `text` for people; `good` is False for a problem."""

    key: str
    label: str
    value: Json
    text: str
    good: bool = True


@dataclass(frozen=True)
class Section:
    """Findings that belong together, in the order to show them."""

    key: str
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Doctor:
    """The report. Each problem is one line that says what to do; `broken` means that dbcap cannot work like this."""

    sections: tuple[Section, ...]
    problems: tuple[str, ...]
    broken: bool

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON types: a section a key, a row a key in it, then `problems` and `broken`."""
        report: dict[str, object] = {one.key: {row.key: row.value for row in one.rows} for one in self.sections}
        return {**report, "problems": list(self.problems), "broken": self.broken}


@dataclass
class _Findings:
    """Collects while the examination goes on."""

    sections: list[Section] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    broken: bool = False

    def problem(self, message: str, hint: str, *, breaks: bool = False) -> None:
        self.problems.append(f"{message}; {hint}")
        self.broken = self.broken or breaks

    def add(self, key: str, title: str, rows: Sequence[Row]) -> None:
        self.sections.append(Section(key, title, tuple(rows)))


def examine(*, offline: bool, home: Mapping[str, Path], model_parameters: int = DEFAULT_PARAMETERS) -> Doctor:
    """Look at everything; `home` names folders (config, data, cache), which need not exist yet.

    The choice of device and dtype is shown for a captioner of `model_parameters`. Offline, the hub is not asked.
    """
    findings = _Findings()
    findings.add("versions", "Versions", _versions())
    required = _requirements(findings)
    findings.add("dependencies", "Dependencies", [_dependency(findings, one) for one in required if not one.extra])
    findings.add("extras", "Extras", [_extra(findings, one) for one in required if one.extra])
    findings.add("device", "Device", _device(findings, model_parameters))
    findings.add("cpu", "Processor", _processor())
    findings.add("folders", "Folders", _folders(findings, home))
    findings.add("hub", "Hub", _hub(findings, offline=offline))
    _look_at_torchvision(findings)
    return Doctor(tuple(findings.sections), tuple(findings.problems), findings.broken)


# Versions


@dataclass(frozen=True)
class _Requirement:
    name: str
    specifier: str  # ">=2.13,<3", or empty: any version will do
    extra: str  # the extra that asks for it, or empty


def _versions() -> list[Row]:
    return [
        Row("dbcap", "dbcap", dbcap.__version__, dbcap.__version__),
        Row("python", "Python", platform.python_version(), platform.python_version()),
        Row("platform", "Platform", platform.platform(), platform.platform()),
    ]


def _requirements(findings: _Findings) -> list[_Requirement]:
    """Return what the installed dbcap declares that it needs on this platform, without the extras for developers."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        findings.problem(
            "dbcap runs from its source without being installed, so its dependencies cannot be checked",
            "run `pip install -e .` in its folder",
        )
        return []
    parsed = (_parse(line) for line in lines)
    return [one for one in parsed if one is not None and one.extra not in NOT_FOR_USERS]


def _parse(line: str) -> _Requirement | None:
    """Read one `Requires-Dist` line; None for one that is not for this platform. No range without `packaging`."""
    match = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", line)
    extra = match[1] if match else ""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return _Requirement(re.split(r"[^\w.-]", line, maxsplit=1)[0], "", extra)
    parsed = Requirement(line)
    if parsed.marker is not None and not parsed.marker.evaluate({"extra": extra}):
        return None
    return _Requirement(parsed.name, ",".join(sorted(map(str, parsed.specifier), reverse=True)), extra)


def _dependency(findings: _Findings, needed: _Requirement) -> Row:
    version = _version_of(needed.name)
    if version is None:
        hint = f"run `pip install '{needed.name}{needed.specifier}'`"
        findings.problem(f"{needed.name} is missing", hint, breaks=True)
        return Row(needed.name, needed.name, None, "missing", good=False)
    return _checked(findings, needed, version)


def _extra(findings: _Findings, needed: _Requirement) -> Row:
    version = _version_of(needed.name)
    if version is None:
        return Row(needed.name, needed.name, None, f"not installed: `pip install 'dbcap[{needed.extra}]'`")
    return _checked(findings, needed, version)


def _checked(findings: _Findings, needed: _Requirement, version: str) -> Row:
    if _inside(version, needed.specifier):
        return Row(needed.name, needed.name, version, version)
    hint = f"run `pip install '{needed.name}{needed.specifier}'`"
    findings.problem(f"{needed.name} {version} is not a version that dbcap is made for", hint)
    return Row(needed.name, needed.name, version, f"{version}, but dbcap asks for {needed.specifier}", good=False)


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _inside(version: str, specifier: str) -> bool:
    """Say whether the version is in the range."""
    if not specifier:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _look_at_torchvision(findings: _Findings) -> None:
    """Report a torchvision that is there and does not work: transformers trips over it. dbcap itself never uses it."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        findings.problem(
            f"torchvision is installed but cannot be imported ({said})",
            "run `pip uninstall torchvision` (dbcap does not use it), or install the one that belongs to this torch",
        )


# Device and processor


def _device(findings: _Findings, parameters: int) -> list[Row]:
    try:
        found = device.accelerators()
        choice = device.choose(parameters=parameters)
    except (ImportError, OSError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "install it again: `pip install --force-reinstall torch`"
        findings.problem(f"torch cannot be imported ({said})", hint, breaks=True)
        return [Row("torch", "torch", None, "cannot be imported", good=False)]
    rows = [
        Row(
            one.device,
            one.device,
            {"name": one.name, "memory_bytes": one.memory_bytes},
            one.name if one.memory_bytes is None else f"{one.name}, {_gib(one.memory_bytes)}",
        )
        for one in found
    ]
    return [
        *rows,
        Row("parameters", "Choice for", parameters, f"a captioner of {parameters / 1e6:.3g} M parameters"),
        Row("device", "Chosen device", choice.device, choice.device),
        Row("dtype", "Chosen dtype", choice.dtype, choice.dtype),
        Row("batch_size", "Chosen batch size", choice.batch_size, str(choice.batch_size)),
        Row("threads", "Threads", choice.threads, str(choice.threads)),
        Row("why", "Why", list(choice.why), "\n".join(choice.why)),
    ]


def _processor() -> list[Row]:
    name, kind, cores, memory = cpu.cpu_name(), cpu.cpu_class(), cpu.cores(), cpu.memory_bytes()
    return [
        Row("name", "Name", name, name),
        Row("class", "Class", kind, kind),
        Row("cores", "Usable cores", cores, str(cores)),
        Row("memory_bytes", "Memory", memory, "unknown" if memory is None else _gib(memory)),
    ]


# Folders


def _folders(findings: _Findings, home: Mapping[str, Path]) -> list[Row]:
    rows = []
    short: dict[int, tuple[int, list[str]]] = {}  # file system -> (bytes free, the folders on it)
    for name, folder in home.items():
        place = _nearest_existing(folder)
        fault = _why_unwritable(place)
        free = shutil.disk_usage(place).free
        if fault:
            findings.problem(
                f"the {name} folder {folder} cannot be written ({fault})",
                "give yourself the right to write there, or set DBCAP_HOME to another folder",
                breaks=True,
            )
        elif free < LEAST_FREE:
            short.setdefault(place.stat().st_dev, (free, []))[1].append(f"{name} ({folder})")
        state = f"cannot be written: {fault}" if fault else "writable" if place == folder else "writable, not made yet"
        value: Json = {"path": str(folder), "free_bytes": free, "writable": not fault, "exists": folder.is_dir()}
        good = not fault and free >= LEAST_FREE
        rows.append(Row(name, name.capitalize(), value, f"{folder} ({_gib(free)} free, {state})", good))
    for free, names in short.values():
        findings.problem(
            f"only {_gib(free)} are free for {', '.join(names)}",
            "free some space (`dbcap cache clear` empties the cache), or set DBCAP_HOME to a folder on another disk",
        )
    return rows


def _nearest_existing(folder: Path) -> Path:
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())


def _why_unwritable(place: Path) -> str:
    """Return why no file can be made in this folder, or an empty string. Leaves nothing behind."""
    if not place.is_dir():
        return f"{place} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


# Hub


def _hub(findings: _Findings, *, offline: bool) -> list[Row]:
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    token = _token_source()
    shown = _without_password(endpoint)
    return [
        Row("endpoint", "Endpoint", shown, shown),
        _reachable(findings, endpoint, shown, offline=offline),
        Row("token", "Token", token is not None, token or "not set (only private and gated models need one)"),
    ]


def _reachable(findings: _Findings, endpoint: str, shown: str, *, offline: bool) -> Row:
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Row("reachable", "Reachable", None, f"not asked ({'--offline' if offline else 'HF_HUB_OFFLINE is set'})")
    fault = _why_unreachable(endpoint)
    if fault:
        findings.problem(
            f"the hub at {shown} cannot be reached ({fault})",
            "check the network and HF_ENDPOINT; `--offline` uses what is cached, `--profile starter` needs no hub",
        )
    return Row("reachable", "Reachable", not fault, f"no: {fault}" if fault else "yes", good=not fault)


def _why_unreachable(endpoint: str) -> str:
    """Return why the hub does not answer, or an empty string. A refusal (4xx) is an answer too."""
    scheme, _, rest = endpoint.partition("://")
    if scheme.lower() not in ("http", "https"):
        return "HF_ENDPOINT is no http or https address"
    # urllib takes a password in an address for a part of the host's name, and would name it in its errors.
    secret = rest.partition("/")[0].rpartition("@")[0]
    login = {"Authorization": f"Basic {base64.b64encode(unquote(secret).encode()).decode()}"} if secret else {}
    try:
        request = urllib.request.Request(f"{_without_password(endpoint)}/api/models?limit=1", headers=login)
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answers {error.code}" if error.code >= 500 else ""
    except urllib.error.URLError as error:
        # The reason is an exception (`[Errno 111] Connection refused`) or a text.
        return getattr(error.reason, "strerror", None) or str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error) or type(error).__name__


def _without_password(endpoint: str) -> str:
    scheme, mark, rest = endpoint.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def _token_source() -> str | None:
    """Say where the hub's token comes from, never the token; None where there is none.

    huggingface_hub's own `get_token` may go to the network to refresh it, so that it is not asked.
    """
    return next(_token_sources(), None)


def _token_sources() -> Iterator[str]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            yield f"set ({name})"
    try:
        from huggingface_hub.constants import HF_TOKEN_PATH
    except ImportError:  # reported as a missing dependency
        return
    path = Path(HF_TOKEN_PATH)
    if path.is_file() and path.stat().st_size:
        yield f"set ({path})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
