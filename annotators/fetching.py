"""Weights on demand: the files of networks are looked for where people keep them, else fetched from the hub."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .images import AnnotatorError
from .networks import File, Network, checksum

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are here; may raise, which stops the download: the next one goes on from there."""

SETTINGS = 1_000_000
"""Files of fewer bytes are settings, which may change at their source; of unknown checksum, any size will do."""

NO_CONNECTION = {"ConnectionError", "Timeout", "ChunkedEncodingError", "TransportError"}
"""Errors of the libraries that the hub speaks HTTP with, which is its own affair."""

ETAG_TIMEOUT = 30.0
"""Seconds that the hub has for saying how large a file is."""


def find(network: Network, folders: Sequence[Path]) -> list[Path | None]:
    """The network's files in their order, `None` for each that is missing.

    Each is looked for in every folder as REPOSITORY/NAME (as this pack and comfyui_controlnet_aux keep them), as
    NAME in a folder called like the repository without its owner, and, if the network is that one file, by its name
    alone; then in the hub's own cache. A file that cannot be the published one is passed over, with a warning.
    """
    return [_found(file, folders, alone=len(network.files) == 1) for file in network.files]


def fetch(networks: Sequence[Network], folders: Sequence[Path], progress: Progress) -> list[list[Path]]:
    """Each network's files in their order: those that `find` finds, all others fetched into the first of `folders`.

    A download that broke off goes on where it stopped, but for the library's last 10 MB; a file appears under its name
    when it is whole and its size and checksum are right. Nothing that lies there is overwritten. Raises AnnotatorError,
    which says all that is missing, where to get it and where to put it.
    """
    paths, missing = [], []
    for network in networks:
        found = find(network, folders)
        paths.append([path or place(file, folders[0]) for file, path in zip(network.files, found)])
        missing += [file for file, path in zip(network.files, found) if path is None]
    for file in missing:
        path = place(file, folders[0])
        if path.exists():
            raise AnnotatorError(
                f"{path} is {_refusal(file, path.stat().st_size)}: move it away, and the published file is fetched"
            )
    offers = []
    for file in missing:
        try:
            offers.append(_offer(file))
        except _Failure as failure:
            raise AnnotatorError(_by_hand(missing, folders[0], str(failure))) from failure
    total = sum(offer.size for offer in offers)
    done = 0
    for i, offer in enumerate(offers):
        path = place(offer.file, folders[0])
        try:
            _download(offer, path, lambda here, before=done: progress(before + here, total))
        except _Failure as failure:
            raise AnnotatorError(_by_hand(missing[i:], folders[0], str(failure))) from failure
        done += offer.size
    return paths


def place(file: File, folder: Path) -> Path:
    """Where `fetch` puts a file, and where to put it by hand."""
    return folder / file.repository / file.name


def _found(file: File, folders: Sequence[Path], alone: bool) -> Path | None:
    """The file, if it lies in one of the folders or in the hub's cache; `alone` when its network has no other."""
    import huggingface_hub

    name = Path(file.name)
    ways = [Path(file.repository) / name, Path(file.repository.split("/")[-1]) / name, *([Path(name.name)] * alone)]
    candidates = [folder / way for folder in folders for way in ways]
    cached = huggingface_hub.try_to_load_from_cache(file.repository, file.name)
    candidates += [Path(cached)] if isinstance(cached, str) else []
    for path in candidates:
        if path.is_file():
            refusal = _refusal(file, path.stat().st_size)
            if refusal is None:
                return path
            logging.getLogger(__name__).warning("%s is %s: passed over", path, refusal)
    return None


def _refusal(file: File, size: int) -> str | None:
    """Why a file of so many bytes cannot be the published one."""
    exact = file.sha256 is not None
    if size == file.size or (not exact and (2 * size >= file.size or file.size < SETTINGS)):
        return None
    return f"{size} bytes, where {file.name} of {file.repository} has {'' if exact else 'about '}{file.size}"


@dataclass(frozen=True)
class _Offer:
    """What the hub says about a file: `url` means this very version of it."""

    file: File
    url: str
    size: int
    etag: str

    @property
    def sha256(self) -> str | None:
        """The checksum: the hub's own, which it gives for large files, or the table's."""
        return self.etag if re.fullmatch("[0-9a-f]{64}", self.etag) else self.file.sha256


class _Failure(AnnotatorError):
    """A file cannot be fetched, for the reason that this says in a few words."""


def _offer(file: File) -> _Offer:
    """Asks the hub for a file's size and version; for the public file, without anyone's token. Raises _Failure."""
    import huggingface_hub as hub

    try:
        url = hub.hf_hub_url(file.repository, file.name)
        said = hub.get_hf_file_metadata(url, token=False, timeout=ETAG_TIMEOUT)
    except _network_errors() as error:
        raise _Failure(_reason(error)) from error
    if said.size is None or said.etag is None:
        raise _Failure(f"the answer from {url} is not one of the hub's")
    offer = _Offer(file, hub.hf_hub_url(file.repository, file.name, revision=said.commit_hash), said.size, said.etag)
    refusal = _refusal(file, offer.size)
    if refusal is None and file.sha256 not in (None, offer.sha256):
        refusal = f"a file with checksum {offer.sha256}, where the published one has {file.sha256}"
    if refusal is not None:
        raise _Failure(f"the hub offers {refusal}")
    return offer


def _download(offer: _Offer, path: Path, progress: Callable[[int], None]) -> None:
    """Fetches one file to `path`; until it is whole it lies beside it, under a name that tells its version.

    Raises _Failure.
    """
    from huggingface_hub.file_download import http_get

    part = path.with_name(f"{path.name}.{offer.etag[:16]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Part(part, progress) as stream:
            here = stream.tell()
            if shutil.disk_usage(path.parent).free < offer.size - here:
                raise OSError(errno.ENOSPC, f"{offer.size - here} bytes are to come")
            progress(here)
            if here < offer.size:
                # The library's own resumable download, alike in all its versions. Bytes come as they are, not zipped;
                # asked for a range, it leaves them to no hf_transfer (HF_HUB_ENABLE_HF_TRANSFER), which cannot resume.
                http_get(
                    offer.url,
                    stream,
                    resume_size=here,
                    expected_size=offer.size,
                    headers={"Accept-Encoding": "identity", "Range": "bytes=0-"},
                    displayed_filename=offer.file.name,
                )
            stream.flush()
            os.fsync(stream.fileno())
        if part.stat().st_size != offer.size or offer.sha256 not in (None, checksum(part)):
            part.unlink()
            raise _Failure("what came has another size or checksum")
        part.replace(path)
    except (*_network_errors(), ValueError, RuntimeError) as error:  # the last two: what the library itself refuses
        kept = part.stat().st_size if part.exists() else 0
        here = f" ({kept} of {offer.size} bytes are here; the next run goes on from there)"
        raise _Failure(_reason(error) + here) from error


class _Part(io.BufferedRandom):
    """A file that grows at its end and tells how large it is."""

    def __init__(self, path: Path, progress: Callable[[int], None]):
        super().__init__(io.FileIO(str(path), "ab+"))  # type: ignore[arg-type]
        self.seek(0, os.SEEK_END)
        self._progress = progress

    def write(self, data: bytes) -> int:  # type: ignore[override]
        written = super().write(data)
        self._progress(self.tell())
        return written


def _network_errors() -> tuple[type[BaseException], ...]:
    """Everything that goes wrong with disks and networks; which library the hub speaks HTTP with is its own affair."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "no connection, for HF_HUB_OFFLINE is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the hub answers {status}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if NO_CONNECTION & kinds and not kinds & {"SSLError", "ProxyError"}:  # these have a cause that can be mended here
        return "no connection"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _by_hand(missing: Sequence[File], folder: Path, reason: str) -> str:
    """The text of an error: why a file cannot be fetched, all that is missing, where to get it, where to put it."""
    import huggingface_hub

    (hub, *_) = huggingface_hub.hf_hub_url(missing[0].repository, missing[0].name).split(f"/{missing[0].repository}/")
    files = ", ".join(f"{file.repository}/{file.name} ({max(file.size, 100_000) / 1e6:.1f} MB)" for file in missing)
    return (
        f"{reason}: get {files} from {hub} and put {'it' if len(missing) == 1 else 'each'} into {folder}, in the "
        "folders of its name"
    )
