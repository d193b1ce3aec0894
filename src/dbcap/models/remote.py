"""The hub, spoken to through huggingface_hub: what it has, what is in its cache here, and getting files from it.

The cache is huggingface_hub's own, so that other tools share it: `models--ORG--NAME/` with `blobs/HASH`,
`snapshots/COMMIT/FILE` (links to blobs) and `refs/BRANCH` (a commit). What we add to its behaviour:

- All files are asked for by commit, and `refs/BRANCH` is written when the last one is there: a snapshot that a branch
  names is whole, and a download that was cut short does not spoil an older one.
- Small files come first and weights last, under a lock of ours; what a killed download left behind is removed.
- Content hashes are checked where the hub states them. Nothing is printed: what it logs goes to `events.detail`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import silent_tqdm

from dbcap.errors import LockHeldError, ModelError
from dbcap.events import Events, Tracker
from dbcap.files import Lock, in_units, sha256_of, write_atomic
from dbcap.models.waiting import waiting_lock

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = ("1", "ON", "YES", "TRUE")
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: its name, its size in bytes, and its SHA-256 where it is known."""

    name: str
    size: int
    sha256: str | None


class HubOutOfReachError(ModelError):
    """The hub gave no answer, or said that it cannot answer now."""


@dataclass(frozen=True)
class RemoteModel:
    """What the hub says about one revision of a model."""

    commit: str
    files: Mapping[str, ModelFile]
    licence: str
    blobs: Mapping[str, str] = field(repr=False)
    """What the cache calls the content of a file, as far as the hub tells."""
    config: Mapping[str, Any] | None = field(repr=False)
    """A part of `config.json`, `model_type` among it; None where the hub does not tell."""


def endpoint() -> str:
    """Return the hub's address, without a slash at its end. Read at each call, unlike huggingface_hub's constant."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def forbidden() -> bool:
    """Return whether the environment says that the hub must not be asked."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def cache_folder() -> Path:
    """Return the folder of huggingface_hub's cache, by the same variables that it reads (but at each call)."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not given:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        given = os.path.join(os.environ.get("HF_HOME") or os.path.join(base, "huggingface"), "hub")
    return Path(os.path.expandvars(os.path.expanduser(given))).absolute()


# ---- the cache


def _repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached_commit(repo: str, revision: str) -> str | None:
    """Return the commit that `revision` stands for as far as the cache knows. Asks nobody."""
    if COMMIT.fullmatch(revision):
        return revision
    try:
        return (_repo_folder(repo) / "refs" / revision).read_text().strip() or None
    except OSError:
        return None


def snapshot_folder(repo: str, commit: str) -> Path:
    """Return the folder that holds (or would hold) the files of a commit."""
    return _repo_folder(repo) / "snapshots" / commit


def cached_file(folder: Path, name: str) -> ModelFile:
    """Describe one file of a snapshot: blobs of large files are named by their hash."""
    blob = (folder / name).resolve()
    return ModelFile(name, blob.stat().st_size, blob.name if _SHA256.fullmatch(blob.name) else None)


# ---- asking


def ask(repo: str, revision: str, *, timeout: float, events: Events) -> RemoteModel:
    """Ask the hub for the commit and the files of a revision. Raises `HubOutOfReachError` or another `ModelError`."""
    with _quiet(events), _explained(repo, revision):
        api = HfApi(endpoint=endpoint())
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        except (ValueError, KeyError, TypeError) as error:  # of reading the answer: a captive portal's page, perhaps
            if isinstance(error, HfHubHTTPError):
                raise
            raise HubOutOfReachError(f"what answers at {endpoint()} is no model hub") from error
    if not info.sha:
        raise HubOutOfReachError(f"what answers at {endpoint()} is no model hub")
    files = {
        entry.rfilename: ModelFile(
            entry.rfilename,
            -1 if entry.size is None else entry.size,
            entry.lfs.sha256 if entry.lfs else None,
        )
        for entry in info.siblings or ()
    }
    blobs = {entry.rfilename: (entry.lfs.sha256 if entry.lfs else entry.blob_id) or "" for entry in info.siblings or ()}
    licence = info.card_data.get("license") if info.card_data else None
    spelt = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or "")
    return RemoteModel(info.sha, files, spelt, blobs, info.config)


def sized(repo: str, commit: str, files: Sequence[ModelFile], events: Events) -> tuple[ModelFile, ...]:
    """Ask for the sizes of files that the hub's listing left out, as some mirrors do."""

    def size(file: ModelFile) -> int:
        url = hf_hub_url(repo, file.name, revision=commit, endpoint=endpoint())
        return get_hf_file_metadata(url, timeout=10, endpoint=endpoint()).size or 0

    with _quiet(events), _explained(repo, commit):
        return tuple(ModelFile(file.name, size(file), file.sha256) if file.size < 0 else file for file in files)


# ---- fetching


def fetch(repo: str, revision: str, found: RemoteModel, names: Collection[str], events: Events, title: str) -> Path:
    """Bring those of the files `names` that are missing into the cache, in this order; return the snapshot's folder.

    Says first what will be fetched, and waits while another dbcap fetches from the same repository.
    """
    folder = snapshot_folder(repo, found.commit)
    if any(not (folder / name).is_file() for name in names):
        locks = cache_folder() / ".locks" / _repo_folder(repo).name
        message = f"another dbcap is fetching {repo}: waiting for it"
        with _writing(repo), waiting_lock(locks / "dbcap.lock", events, message):
            _remove_leftovers(repo, locks)
            _fetch(repo, found, [name for name in names if not (folder / name).is_file()], events, title)
    if revision != found.commit and cached_commit(repo, revision) != found.commit:
        with contextlib.suppress(OSError):  # a cache that is shared and read-only still serves
            write_atomic(_repo_folder(repo) / "refs" / revision, found.commit.encode())
    return folder


def _fetch(repo: str, found: RemoteModel, missing: Sequence[str], events: Events, title: str) -> None:
    blobs = _repo_folder(repo) / "blobs"
    known = {name for name in missing if found.blobs.get(name) and (blobs / found.blobs[name]).is_file()}
    files = sized(repo, found.commit, [found.files[name] for name in missing if name not in known], events)
    if files:
        total = sum(file.size for file in files)
        events.say(f"downloading {title} ({len(files)} file{'s' * (len(files) > 1)}, {in_units(total)})")
        cache = cache_folder()
        free = shutil.disk_usage(cache).free
        if free < total:
            raise ModelError(
                f"{title} needs {in_units(total)}, and {cache} has {in_units(free)} left",
                "make room, or choose another place with HF_HOME",
            )
        with events.track(f"Downloading {title}", total, unit="bytes") as tracker:
            for file in files:
                _fetch_file(repo, found.commit, file, events, tracker)
    for name in known:  # another revision has the same file: this makes a link
        _download(repo, found.commit, name, silent_tqdm, events)


def _fetch_file(repo: str, commit: str, file: ModelFile, events: Events, tracker: Tracker) -> None:
    bar = bar_class(tracker)
    path = _download(repo, commit, file.name, bar, events)
    if file.size > bar.told:
        tracker.advance(file.size - bar.told)
    blob = path.resolve()
    if blob.stat().st_size != file.size or (file.sha256 and sha256_of(blob) != file.sha256):
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ModelError(
            f"{file.name} of {repo} arrived damaged (it is not what the hub says it is)", "run the command again"
        )


def bar_class(tracker: Tracker) -> Any:
    """Return what stands where huggingface_hub wants a class like tqdm; it feeds `tracker` with one file's bytes.

    Started over or resumed, it never counts a byte twice. `told` is how many the tracker knows of.
    """

    class Bar:
        done = 0
        told = 0

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            Bar.done += int(count or 0)
            if Bar.done > Bar.told:
                tracker.advance(Bar.done - Bar.told)
                Bar.told = Bar.done

        def ignore(self, *_: object, **__: object) -> None:
            """Say nothing of speeds, nor of bytes on the wire, of which Xet has fewer than of content."""

        update_transfer = set_transfer_postfix_str = set_postfix_str = refresh = close = ignore

    return Bar


def small_file(repo: str, commit: str, name: str, events: Events) -> Path:
    """Bring one small file into the cache without a word, and return where it is."""
    with _writing(repo):
        return _download(repo, commit, name, silent_tqdm, events)


def _download(repo: str, commit: str, name: str, bar: type, events: Events) -> Path:
    with _quiet(events), _explained(repo, commit, name):
        return Path(
            hf_hub_download(repo, name, revision=commit, cache_dir=cache_folder(), endpoint=endpoint(), tqdm_class=bar)
        )


def _remove_leftovers(repo: str, locks: Path) -> None:
    """Remove what killed downloads left behind. A file that another program is fetching right now is left alone."""
    for path in (_repo_folder(repo) / "blobs").glob("*.incomplete"):
        # huggingface_hub holds the lock of that blob while it writes; the system releases it when the program dies
        with contextlib.suppress(LockHeldError), Lock(locks / f"{path.name.split('.')[0]}.lock"):
            path.unlink(missing_ok=True)


# ---- silence and errors


class _Relay(logging.Handler):
    """Hands huggingface_hub's log lines to the events."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.detail(f"huggingface_hub: {' '.join(record.getMessage().split())}")


@contextlib.contextmanager
def _quiet(events: Events) -> Iterator[None]:
    """Let huggingface_hub print nothing, and ask the hub for nothing but the model."""
    logger = logging.getLogger("huggingface_hub")
    handlers, propagate, telemetry = logger.handlers[:], logger.propagate, constants.HF_HUB_DISABLE_TELEMETRY
    logger.handlers, logger.propagate = [_Relay(events)], False
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry


@contextlib.contextmanager
def _writing(repo: str) -> Iterator[None]:
    """Turn a failure to write the cache into a `ModelError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise ModelError(
            f"cannot write {repo} into {cache_folder()}: {error.strerror}",
            "make room there, or choose another place with HF_HOME",
        ) from error


@contextlib.contextmanager
def _explained(repo: str, revision: str, name: str = "") -> Iterator[None]:
    """Turn what goes wrong between us and the hub, about the file `name` if given, into a `ModelError` of one line."""
    try:
        yield
    except LocalEntryNotFoundError as error:  # huggingface_hub's word for a hub that was there a moment ago
        raise _broken_off(repo, name) from error
    except HfHubHTTPError as error:
        raise _refused(error, repo, revision, name) from error
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        if name:
            raise _broken_off(repo, name) from error
        raise HubOutOfReachError(f"cannot reach the hub at {endpoint()}") from error
    except (OSError, RuntimeError) as error:
        if not name or getattr(error, "errno", None) is not None:
            raise  # of the file system: `_writing` has the words for it
        raise _broken_off(repo, name) from error  # fewer bytes than promised; RuntimeError: of the library hf_xet


def _broken_off(repo: str, name: str) -> ModelError:
    return ModelError(
        f"the connection to the hub broke off while {name or 'the listing'} of {repo} was fetched",
        "run the command again: finished files are kept",
    )


def _refused(error: HfHubHTTPError, repo: str, revision: str, name: str) -> ModelError:
    status = error.response.status_code
    page = f"{endpoint()}/{repo}"
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{repo} is gated: the hub gives it only to users who were granted access",
            f"ask for access at {page}, then `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(f"the hub has no model {repo}", "check the name; if it is private, `hf auth login` first")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{repo} has no revision {revision}", f"its branches and tags are listed at {page}/tree/main")
    if isinstance(error, EntryNotFoundError):
        return ModelError(f"{repo} has no file {name} at revision {revision}", f"see {page}/tree/{revision}")
    if status in _BUSY:
        return HubOutOfReachError(f"the hub at {endpoint()} cannot answer now (HTTP {status})")
    if status in (401, 403):
        return ModelError(f"the hub refuses access to {repo} (HTTP {status})", "`hf auth login` with a valid token")
    return ModelError(f"the hub answers HTTP {status} for {repo}", f"see {page}")
