"""From what a decoder gives to pixels that every command can use: 8-bit RGB in sRGB, upright, on a background."""

from __future__ import annotations

import array
import functools
import io
import math
import struct
import zlib

from PIL import Image, ImageChops, ImageCms, ImageFile

PNG = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 8 * 1024 * 1024  # a press's profile has 1 to 3 MB; a larger one is ignored

# What Pillow's decoders let out on hostile data. All but a KeyboardInterrupt or a fault of the interpreter.
HOSTILE = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError,
    SyntaxError, EOFError, MemoryError, BufferError, struct.error, zlib.error,
    Image.DecompressionBombError, ImageCms.PyCMSError,
)  # fmt: skip

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def finish(image: ImageFile.ImageFile, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    """Turn a loaded image into an upright one in sRGB that holds on to nothing else."""
    try:
        # Pillow has already turned TIFF, and pillow_heif HEIC, and both have taken the tag away.
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except HOSTILE:  # a broken EXIF block
        turn = None
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or len(profile) > MAX_PROFILE_BYTES:
        profile = b""
    colour, mask = _split(image, data)
    rgb = _to_srgb(colour, profile)
    if mask is not None:
        canvas = Image.new("RGB", rgb.size, background)
        canvas.paste(rgb, mask=mask)
        rgb = canvas
    if turn is not None:
        rgb = rgb.transpose(turn)
    elif isinstance(rgb, ImageFile.ImageFile):
        rgb = rgb.copy()
    rgb.info = {}  # Pillow would write an old profile into whatever is saved from this
    return rgb


def _split(image: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """Return 8-bit colour without alpha, and the alpha channel (mode L) where there is one."""
    # The depth of a PNG's samples: its transparent colour is in these units, Pillow's pixels are in 8 bits.
    depth, kind = (data[24], data[25]) if data.startswith(PNG) else (8, 0)
    key = image.info.get("transparency")
    mode = image.mode
    if mode == "P":
        clear = key is not None or (image.palette is not None and image.palette.mode == "RGBA")
        image = image.convert("RGBA" if clear else "RGB")
    elif mode in ("PA", "RGBa"):
        image = image.convert("RGBA")
    elif mode == "La":
        image = image.convert("LA")
    elif mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        image.info["transparency"] = tuple(value >> 8 if depth == 16 else value & 0xFF for value in key)
        image = image.convert("RGBA")
    elif mode == "F" or mode[0] == "I":
        wide = image if mode == "F" else image.convert("I")
        mask = _mask_of(wide, key, 65536) if mode.startswith("I;16") and isinstance(key, int) else None
        return _to_8_bits(wide), mask
    elif mode in ("1", "L"):
        grey = image.convert("L") if mode == "1" else image
        scale = {2: 85, 4: 17}.get(depth, 1)
        return grey, _mask_of(grey, key * scale, 256) if isinstance(key, int) else None
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode == "RGBA":
        # Pillow has no 16-bit LA: such a PNG comes as RGBA, but its profile is one for grey.
        grey_png = depth == 16 and kind == 4
        return image.getchannel("R") if grey_png else image.convert("RGB"), image.getchannel("A")
    return image, None


def _mask_of(image: Image.Image, key: int, levels: int) -> Image.Image:
    """Return a mask (mode L) that is 0 where a grey image has the value `key`, else 255."""
    table = [255] * levels
    if 0 <= key < levels:
        table[key] = 0
    return image.point(table, "L")


@functools.cache
def _from_16_bits() -> list[int]:
    return [(value + 128) // 257 for value in range(65536)]


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return mode L of a mode I or F image; `read_bytes` says how the values are scaled."""
    low, high = _range(image)
    if image.mode == "I":
        if low >= 0 and high <= 65535:
            return image.point(_from_16_bits(), "L")
        image = image.convert("F")
    elif low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scale = 255 / (high - low) if high > low else 0.0
    offset = 0.5 - low * scale  # the conversion to L cuts off fractions
    return image.point(lambda value: value * scale + offset).convert("L")


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the least and the greatest finite value of a one-channel image; 0, 0 where there is none."""
    extrema = image.getextrema()
    low, high = float(extrema[0]), float(extrema[1])  # type: ignore[arg-type]
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    values = [value for value in array.array("f", image.tobytes()) if math.isfinite(value)]
    return min(values, default=0.0), max(values, default=0.0)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB") if image.mode != "RGB" else image
    space = profile[16:20]  # of the profile's header
    if image.mode == "L" and space == b"RGB ":  # grey pictures with a colour profile are common
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if space.strip() == _SPACES[image.mode] else None
    if transform is None:
        return image.convert("RGB") if image.mode != "RGB" else image
    return transform.apply(image)


_SPACES = {"L": b"GRAY", "RGB": b"RGB", "CMYK": b"CMYK"}


@functools.lru_cache(maxsize=8)  # a folder's pictures tend to share a profile; lcms transforms may be shared by threads
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts `mode` to sRGB, or None where the profile is broken or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        levels = (0, 1, 4, 16, 32, 64, 96, 128, 160, 192, 224, 255)
        grid = bytes(v for r in levels for g in levels for b in levels for v in ((r, g, b) if mode == "RGB" else (r,)))
        probe = Image.frombytes(mode, (len(levels) ** 2, len(levels)), grid)
        change = ImageChops.difference(probe.convert("RGB"), transform.apply(probe)).tobytes()
    except HOSTILE:
        return None
    # Most profiles say sRGB in other words: one level is rounding, and such pictures keep their exact pixels.
    return transform if max(change) > 1 else None
