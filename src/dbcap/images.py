"""The one image reader of every command: bytes in, an upright RGB picture in sRGB out, or an `InputError`.

Messages do not name the file: the caller puts the path before them. Kinds of `InputError` raised here:
`missing`, `unreadable` (permission, I/O error), `not-a-file` (folder, device, socket), `empty`, `not-an-image`,
`unsupported` (a known format that is refused), `truncated`, `damaged`, `too-large` (bytes, pixels or memory),
`heic-extra` (a HEIC picture, and the extra `heif` is not installed).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import logging
import os
import pathlib
import re
import stat
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from PIL import Image, ImageFile, UnidentifiedImageError, _imaging

from dbcap.errors import InputError, UsageError
from dbcap.pixels import HOSTILE, PNG, finish

DEFAULT_MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 512 * 1024 * 1024
"""More than this is not read, be it a file or a pipe that never ends."""

PICTURE_SUFFIXES: frozenset[str] = frozenset(
    """.apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .flc .fli .ftc .ftu .gbr .gif .heic .heif .hif .icb .icns
    .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd
    .pxr .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm""".split()  # noqa: SIM905 - readable
)
"""What is taken from folders: pictures only, no video, raw, PostScript or data format."""

# Tried in this order: the common ones first, those without a signature last. Left out: EPS starts Ghostscript, WMF
# the system's renderer, IPTC opens what it holds as any format (so EPS too); BUFR, FITS, GRIB, HDF5, MPEG and PDF are
# no pictures. A file that is given by name may be SPIDER or MCIDAS: they have no suffix to be found by.
_FORMATS = tuple(
    """JPEG PNG WEBP GIF TIFF BMP DIB PPM AVIF JPEG2000 ICO ICNS CUR PSD DDS QOI SGI SUN PCX DCX FLI BLP FTEX GBR MSP
    PIXAR XBM XPM XVTHUMB MCIDAS IM IMT PCD SPIDER TGA""".split()  # noqa: SIM905
)
_JPEG = b"\xff\xd8\xff"
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
# Offset, signature, name: what is ours, to tell a damaged picture from no picture, and what is refused by name.
_KNOWN = (
    (0, _JPEG, "JPEG"), (0, PNG, "PNG"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"),
    (0, b"II*\x00", "TIFF"), (0, b"MM\x00*", "TIFF"),
)  # fmt: skip
_REFUSED = (
    (0, b"%!PS", "a PostScript file"), (0, b"\xc5\xd0\xd3\xc6", "a PostScript file"), (0, b"%PDF", "a PDF file"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile"), (40, b" EMF", "a Windows metafile"),
    (0, b"\x00\x00\x01\xb3", "a video"), (0, b"\x00\x00\x01\xba", "a video"), (8, b"AVI ", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"), (4, b"ftyp", "a video or raw file"),
    (0, b"SIMPLE  =", "a FITS file"), (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"GRIB", "a GRIB file"), (0, b"BUFR", "a BUFR file"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"), (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"<svg", "an SVG drawing"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: `image` is RGB, upright, in sRGB, without metadata; `sha256` is that of the file's bytes."""

    image: Image.Image
    sha256: str

    @property
    def width(self) -> int:
        """Pixels of the upright picture."""
        return self.image.width

    @property
    def height(self) -> int:
        """Pixels of the upright picture."""
        return self.image.height


def read(path: str | os.PathLike[str], *, alpha: str = "white", max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """Read the picture in a file or pipe, with what is transparent on the colour `alpha` (see `parse_colour`)."""
    return read_bytes(_bytes_of(path), alpha=alpha, max_pixels=max_pixels)


def read_bytes(data: bytes, *, alpha: str = "white", max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """Decode the picture in `data`, the content of an image file. May be called from several threads at once.

    Of an animation the first frame is taken, of a TIFF the first page. 16-bit samples are divided by 257. An integer
    image beyond 16 bits is stretched from its darkest to its brightest value; a float image likewise, unless it lies
    within 0..1 or within 0..255: these are taken as the whole range.
    """
    background = parse_colour(alpha)
    if not data:
        raise InputError("the file is empty", kind="empty")
    _keep_quiet()
    token = _pixel_limit.set(max_pixels)
    image: ImageFile.ImageFile | None = None
    try:
        image = _open(data)
        try:
            image.load()
            _check_pixels(image.size)  # HEIF may only learn its size when it decodes
            rgb = finish(image, data, background)
        finally:
            image.close()
    except HOSTILE as error:
        raise _explain(error, data, image.format if image else None) from error
    finally:
        _pixel_limit.reset(token)
    return Picture(rgb, hashlib.sha256(data).hexdigest())


def is_picture_name(name: str) -> bool:
    """Tell whether a file of this name (or path) is taken from a folder; hidden and `._` companion files are not."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in PICTURE_SUFFIXES


def parse_colour(text: str) -> tuple[int, int, int]:
    """Return red, green and blue (0..255) of `white`, `black` or `#rrggbb` in any case. Raises `UsageError`."""
    colour = {"white": "#ffffff", "black": "#000000"}.get(text.lower(), text)
    if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        raise UsageError(f"{text!r} is no colour", "use white, black or #rrggbb, for example #808080")
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


# ---- bytes


def _bytes_of(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                raise InputError("is a device, not a file", kind="not-a-file")
            return _read_all(file, status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        link = pathlib.Path(path).is_symlink()
        raise InputError("is a link to nowhere" if link else "no such file", kind="missing") from None
    except IsADirectoryError:
        raise InputError("is a folder, not a file", kind="not-a-file") from None
    except PermissionError:
        raise InputError("cannot be read: permission denied", "check its access rights", kind="unreadable") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):
            raise InputError("is a socket, not a file", kind="not-a-file") from None
        raise InputError(f"cannot be read: {error.strerror or error}", kind="unreadable") from error
    except ValueError:  # a NUL, or a lone surrogate that no file name can hold
        raise InputError("no such file", kind="missing") from None


def _read_all(file: io.FileIO, size: int) -> bytes:
    """Read to the end. `size` is what the system says, 0 for a pipe and for some real files (/proc)."""
    if size > MAX_FILE_BYTES:
        raise _too_many_bytes(size)
    parts: list[bytes] = []
    total = 0
    while part := file.read(max(size + 1 - total, 1 << 20)):
        parts.append(part)
        total += len(part)
        if total > MAX_FILE_BYTES:
            raise _too_many_bytes(total)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_many_bytes(count: int) -> InputError:
    return InputError(
        f"has {count:,} bytes or more; the limit is {MAX_FILE_BYTES:,}", "make it smaller first", kind="too-large"
    )


# ---- guards
#
# Pillow's own limit is one global number that only refuses from twice its value on, and warns below that. It cannot
# hold a limit for each call while several threads read. But Pillow asks one function wherever it learns a size, before
# it decodes: in Image.open, and for what is inside icons, animations, tiled TIFF and WebP. So that function is replaced
# by one that looks up the limit of the reading thread; a thread that is not reading, and so any other user of Pillow in
# this process, gets Pillow's own check. Should a later Pillow stop asking it, `read_bytes` still checks what came out,
# and the tests of bombs fail.

_pixel_limit: ContextVar[int | None] = ContextVar("_pixel_limit", default=None)
_pillow_check = Image._decompression_bomb_check


class _TooManyPixels(Image.DecompressionBombError):
    pass


def _check_pixels(size: tuple[int, int], *, error_only: bool = False) -> None:
    limit = _pixel_limit.get()
    if limit is None:
        _pillow_check(size, error_only=error_only)
    elif size[0] * size[1] > limit:
        raise _TooManyPixels(f"has {size[0] * size[1]:,} pixels; the limit is {limit:,}")


Image._decompression_bomb_check = _check_pixels
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints the errors it logs on stderr

_QUIET = [("ignore", None, category, re.compile(r"PIL\b"), 0) for category in (UserWarning, DeprecationWarning)]


def _keep_quiet() -> None:
    """Keep Pillow's talk about corrupt EXIF and the like off stderr.

    `warnings.catch_warnings` is not thread-safe, so two filters are put first for good, and again when somebody has
    put others before them. They hide what Pillow's own modules say to themselves, but not its warning of bombs.
    """
    if list(warnings.filters[:2]) != _QUIET:
        for category in (DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"PIL\b")


_lock = threading.Lock()
_heif_is_registered = False


def _register_heif() -> None:
    global _heif_is_registered
    with _lock:
        if _heif_is_registered:
            return
        try:
            import pillow_heif

            pillow_heif.register_heif_opener()
        except ImportError:
            raise InputError(
                "is a HEIC image, for which an extra package is needed",
                "run `pip install 'dbcap[heif]'`",
                kind="heic-extra",
            ) from None
        _heif_is_registered = True


def _container(data: bytes) -> str:
    """Return `AVIF` (Pillow's own), `HEIF` (needs the extra) or nothing; the two may share their first brand."""
    if data[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(data[:4]), 1024)
    brands = {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}
    return "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if data[8:12] in _HEIF_BRANDS else ""


@functools.cache
def _formats() -> tuple[str, ...]:
    with _lock:  # Image.init imports every plugin and is not made for threads
        Image.init()
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff, or with one that cannot be reached
        # libtiff writes what it finds wrong straight to file 2; Pillow raises an exception as well.
        libtiff = ctypes.CDLL(_imaging.__file__)
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> ImageFile.ImageFile:
    formats = _formats()
    if _container(data) == "HEIF":
        _register_heif()
        formats = ("HEIF",)
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except HOSTILE:
        for repaired in _repairs(data):
            try:
                return Image.open(io.BytesIO(repaired), formats=formats)
            except HOSTILE:
                continue
        raise


def _repairs(data: bytes) -> Iterator[bytes]:
    """Yield copies without the metadata that may have kept Pillow from opening a sound picture."""
    if data.startswith(PNG):
        parts, at = [PNG], len(PNG)
        while at + 12 <= len(data) and (name := data[at + 4 : at + 8]) != b"IDAT":
            end = at + 12 + int.from_bytes(data[at : at + 4])
            broken = zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end])
            if name != b"iCCP" and not (broken and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")):
                parts.append(data[at:end])
            at = end
        yield b"".join([*parts, data[at:]])
    elif data.startswith(_JPEG):
        # The colour profile is in APP2; only if that is not it, EXIF (APP1) and Photoshop's block (APP13) go as well.
        for doomed in ({0xE2}, {0xE1, 0xE2, 0xED}):
            parts, at = [data[:2]], 2
            while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xDA, 0xFF):
                end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
                if data[at + 1] not in doomed:
                    parts.append(data[at:end])
                at = end
            yield b"".join([*parts, data[at:]])


def _explain(error: Exception, data: bytes, name: str | None) -> InputError:
    """Say what a decoder's exception means; `name` is the format where the file could be opened."""
    text = str(error)
    if isinstance(error, _TooManyPixels):
        return InputError(text, "raise --max-pixels if you trust it", kind="too-large")
    if isinstance(error, MemoryError):
        return InputError("needs more memory than there is", "make it smaller first", kind="too-large")
    if isinstance(error, ValueError) and re.search("too large|too much memory", text, re.IGNORECASE):
        return InputError("unpacks to more metadata than is safe", "save it without metadata", kind="too-large")
    name = name or _container(data) or next((known for at, magic, known in _KNOWN if data.startswith(magic, at)), None)
    if name is None:
        for at, magic, what in _REFUSED:
            if data.startswith(magic, at):
                hint = "convert it to PNG or JPEG"
                return InputError(f"is {what}, which dbcap does not read", hint, kind="unsupported")
        if isinstance(error, UnidentifiedImageError):
            return InputError("is no image that dbcap can read", kind="not-an-image")
    again = "fetch or export it again"
    if "truncated" in text.lower() or isinstance(error, EOFError) or _is_cut_webp(data):
        return InputError(f"is truncated: the {name or 'image'} data ends too early", again, kind="truncated")
    return InputError(f"is damaged: the {name or 'image'} data cannot be decoded", again, kind="damaged")


def _is_cut_webp(data: bytes) -> bool:
    return data.startswith(b"WEBP", 8) and int.from_bytes(data[4:8], "little") + 8 > len(data)
