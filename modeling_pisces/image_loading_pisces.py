"""Turning whatever a user calls a picture into one RGB image of 8 bits per channel.

`PiscesProcessor` sends every image through `load_image`, so a path, a PIL image and an array of the same
picture give the same pixels, and a file that cannot be read is refused by its name before any model runs.
Resizing and normalising are left to the image processors.
"""

import base64
import binascii
import io
import os
import re
import struct
import urllib.error
import urllib.request
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# 100 megapixels: above any camera sensor a user is likely to own, and 300 MB once decoded
DEFAULT_MAX_PIXELS = 100_000_000

URL_TIMEOUT_S = 30
URL_MAX_BYTES = 256 * 2**20

# What PIL's plugins raise on damaged data; PNG alone uses three of these
_DECODE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


def load_image(source: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Return `source` as an upright RGB image on white.

    Args:
        source: path (str or `Path`), http(s) or data URL, file bytes, PIL image, or an array or tensor:
            (H, W), (H, W, 1 | 3 | 4) or (1 | 3 | 4, H, W); integers in [0, 255], uint16, bool, or floats in [0, 1].
        max_pixels: larger pictures are refused from their header, before decoding.

    Returns:
        A PIL image of mode RGB, EXIF orientation applied. Of several frames the first, with a warning; of a PIL image
        the one it stands at.

    Raises:
        ValueError: one line with the file, what was found, and what to do.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, _name_of(source), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "image bytes", max_pixels)
    if isinstance(source, str) and re.match(r"(https?://|data:)", source, flags=re.IGNORECASE):
        name = source if len(source) <= 80 else source[:77] + "..."
        return _decode(_read_url(source, name), name, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _decode(_existing_file(Path(source)), str(source), max_pixels)
    if hasattr(source, "shape"):
        return _from_array(source, max_pixels)
    raise ValueError(
        f"image of type {type(source).__name__}: expected a path, a URL, file bytes, a PIL image, an array or a "
        "tensor. Open the picture with PIL.Image.open first."
    )


def _name_of(image: Image.Image) -> str:
    return str(getattr(image, "filename", "") or f"PIL image of mode {image.mode}")


def _existing_file(path: Path) -> Path:
    try:
        if path.is_dir():
            raise ValueError(f"{path}: this is a folder, not an image. Give the path of one picture inside it.")
        if not path.is_file():
            raise ValueError(f"{path}: no such file (looked from {Path.cwd()}). Check the path.")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file has 0 bytes. Copy or download it again.")
    except OSError as error:  # a name longer than the file system allows, or no permission
        raise ValueError(f"{str(path)[:80]}: cannot be opened ({error.strerror}). Check the path.") from error
    return path


def _read_url(url: str, name: str) -> bytes:
    if url[:5].lower() == "data:":
        header, _, payload = url.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"{name}: only base64 data URLs are read. Write data:image/png;base64,<data>.")
        return decode_base64(payload, name)
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as response:
            data = response.read(URL_MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ValueError(f"{name}: could not be downloaded ({error}). Download it and give the path.") from error
    if len(data) > URL_MAX_BYTES:
        raise ValueError(f"{name}: more than {URL_MAX_BYTES} bytes. Download it, shrink it and give the path.")
    return data


def decode_base64(payload: str, name: str = "base64 image") -> bytes:
    """Decode base64 text, with or without line breaks; ValueError if it is anything else."""
    try:
        return base64.b64decode(re.sub(r"\s", "", payload), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: not valid base64 ({error}). Encode the file's bytes again.") from error


def _decode(source: bytes | Path, name: str, max_pixels: int) -> Image.Image:
    if isinstance(source, bytes) and not source:
        raise ValueError(f"{name}: 0 bytes. Read the file again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(name, f"{pixels[1]} pixels" if pixels else "too many pixels", max_pixels) from error
    except UnidentifiedImageError as error:
        start = source[:8] if isinstance(source, bytes) else _first_bytes(source)
        raise ValueError(
            f"{name}: not a picture in a format PIL knows (it starts with {start!r}). Give a PNG, JPEG or WebP file."
        ) from error
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from error
    with image:
        return _to_rgb(image, name, max_pixels)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _too_large(name: str, found: str, max_pixels: int) -> ValueError:
    return ValueError(
        f"{name}: {found}, more than the limit of {max_pixels} pixels. Shrink the picture first; to read it as it is, "
        "call load_image with a larger max_pixels (above 178 million raise PIL.Image.MAX_IMAGE_PIXELS too) and resize."
    )


def _damaged(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name}: the picture is damaged ({reason}). Copy, download or export it again.")


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Check the size, decode, turn upright, and convert to RGB."""
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{name}: {image.width} x {image.height} pixels. Give a picture with at least one pixel.")
    try:
        _warn_of_frames(image, name)
        image.load()
        image = ImageOps.exif_transpose(image)
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from error
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_deep_pixels(image), max_pixels, name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image)
    try:
        return image.convert("RGB")  # palette, grey, CMYK (PIL undoes Adobe's inversion when it decodes), YCbCr, HSV
    except ValueError as error:
        raise ValueError(f"{name}: colour mode {image.mode} cannot become RGB. Export it as an RGB PNG.") from error


def _warn_of_frames(image: Image.Image, name: str) -> None:
    # MPO is a phone's JPEG with a preview or a second view behind it: nobody means that as an animation
    if getattr(image, "is_animated", False) and image.format != "MPO":
        used = f"frame {image.tell()}" if image.tell() else "the first"
        warnings.warn(f"{name}: {getattr(image, 'n_frames', 2)} frames; only {used} is used.", stacklevel=2)


def _on_white(image: Image.Image) -> Image.Image:
    # White, because that is what a viewer or a page shows behind a transparent picture. Dropping the alpha
    # channel would show whatever colour the editor left under it, mostly black, and black outlines vanish.
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _deep_pixels(image: Image.Image) -> np.ndarray:
    """Grey pixels of more than 8 bits as an array that `_from_array` knows how to scale."""
    pixels = np.asarray(image)
    # PIL's own conversion from these modes clips at 255, which turns a 16-bit picture white
    if image.mode == "I" and image.format is not None and pixels.size and 0 <= pixels.min() and pixels.max() <= 65535:
        return pixels.astype(np.uint16)  # mode I is how PIL reads some 16-bit files
    return pixels.astype(np.uint16) if image.mode.startswith("I;16") else pixels


def _from_array(source: Any, max_pixels: int, name: str | None = None) -> Image.Image:
    array = source.detach().cpu() if hasattr(source, "detach") else source
    if str(getattr(array, "dtype", "")) == "torch.bfloat16":
        array = array.float()  # numpy has no bfloat16
    array = np.asarray(array)
    name = name or f"array of shape {array.shape}, {array.dtype}"
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)  # (C, H, W) -> (H, W, C)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or array.size == 0:
        raise ValueError(f"{name}: expected (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4. Reshape it.")
    pixels = _to_uint8(array, name)
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    return _to_rgb(image, name, max_pixels)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded to nearest
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating) and 0 <= low and high <= 1:
        return np.rint(array * 255).astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer) and 0 <= low and high <= 255:
        return array.astype(np.uint8)
    raise ValueError(
        f"{name}: values from {low} to {high}. Expected integers in [0, 255], uint16, or floats in [0, 1]; "
        "rescale it, and give pixels that are not yet normalised."
    )
