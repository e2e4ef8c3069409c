"""Turning whatever a user calls a picture into one RGB image of 8 bits per channel.

`PiscesProcessor` sends every image through `load_image`, so a path, a PIL image and an array of the same
picture give the same pixels, and a file that cannot be read is refused by its name before any model runs.
Every other place of the project that opens a picture file does it with `load_image` or `open_picture` too: the list of
formats stands here, once. Resizing and normalising are left to the image processors.
"""

import base64
import binascii
import http.client
import io
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError


# What PIL decodes in its own process, by its names, with the endings of such files. PIL goes by the content and not by
# the name: without a list, an EPS called photo.png starts Ghostscript on the sender's program.
PICTURE_FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".mpo",),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
PICTURE_SUFFIXES = tuple(sorted(suffix for suffixes in PICTURE_FORMATS.values() for suffix in suffixes))

# How other files begin that people take for pictures, to call them by name; from the formats' own specifications
_OTHER_FORMATS = {
    rb"%!PS|\xc5\xd0\xd3\xc6": "EPS (PostScript)",
    rb"%PDF": "PDF",
    rb"\s*(<\?xml|<!DOCTYPE svg|<svg)": "SVG or other XML",
    rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)": "HEIF",
    rb"....ftyp": "a video or HEIF file",
    rb"8BPS": "PSD (Photoshop)",
    rb"DDS ": "DDS",
    rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"\xff\x0a|\x00\x00\x00\x0cJXL ": "JPEG XL",
    rb"\x00\x00[\x01\x02]\x00": "ICO or CUR",
    rb"icns": "ICNS",
    rb"qoif": "QOI",
    rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00....................................  ?EMF": "WMF or EMF",
    rb"SIMPLE  =": "FITS",
    rb"\x89HDF": "HDF5",
    rb"\x1aE\xdf\xa3": "a video (Matroska)",
}

# How a picture of the user enters: by the understanding path, or with its generation vectors beside it as context.
UNDERSTANDING, BOTH = "understanding", "both"

# 100 megapixels: above any camera sensor a user is likely to own, and 300 MB once decoded
DEFAULT_MAX_PIXELS = 100_000_000
# The longest side that a JPEG can have; a side of 10^8 pixels breaks PIL's own arithmetic although its area is small
MAX_SIDE = 65_535

URL_TIMEOUT_S = 30  # without a byte
URL_TOTAL_S = 300
URL_MAX_BYTES = 256 * 2**20


def load_image(source: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Return `source` as an upright RGB image on white.

    Args:
        source: path (str or `Path`), http(s) or data URL, file bytes, PIL image, or an array or tensor:
            (H, W), (H, W, 1 | 3 | 4) or (1 | 3 | 4, H, W); integers in [0, 255], uint16, bool, or floats in [0, 1].
            Files are of one of `PICTURE_FORMATS`. A mask of 0 and 1 is a picture as bool or float; as uint8 it is what
            it says, nearly black, and as any wider integer it is refused.
        max_pixels: larger pictures are refused from their header, before decoding, and so is one with a side above
            65,535 (or above the root of `max_pixels`).

    Returns:
        A PIL image of mode RGB, EXIF orientation applied. Of several frames the first, with a warning; of a PIL image
        the one it stands at.

    Raises:
        ValueError: one line with the file, what was found, and what to do.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, _name_of(source), max_pixels)
    if isinstance(source, memoryview) and source.ndim > 1:
        return _from_array(np.asarray(source), max_pixels)
    if _shape(source) is not None and not isinstance(source, (str, bytes, memoryview)):
        return _from_array(source, max_pixels)
    image, name = _open(source, max_pixels)
    with image:
        return _to_rgb(image, name, max_pixels)


def open_picture(source: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """A picture file as PIL reads it, for its size, mode or metadata; pixels are decoded when they are asked for.

    Args:
        source: path, http(s) or data URL, or file bytes.

    Raises:
        ValueError: as `load_image`; of pixels that cannot be decoded PIL speaks later, so use `load_image` for pixels.
    """
    return _open(source, max_pixels)[0]


def _open(source: Any, max_pixels: int) -> tuple[Image.Image, str]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _identify(bytes(source), "image bytes", max_pixels), "image bytes"
    if isinstance(source, str) and (scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+(?=://)|data(?=:)", source, re.I)):
        name = one_line(source, 80)
        if scheme[0].lower() not in ("http", "https", "data"):
            raise ValueError(f"{name}: only http, https and data URLs are read. Download it and give the path.")
        return _identify(_read_url(source, name), name, max_pixels), name
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.fsdecode(source))
        return _identify(_existing_file(path), one_line(path), max_pixels), one_line(path)
    raise ValueError(
        f"image of type {type(source).__name__}: expected a path, a URL, file bytes, a PIL image, an array or a "
        "tensor. Open the picture with modeling_pisces.load_image or PIL first."
    )


def _shape(source: Any) -> Any:
    """The shape of an array or tensor; None for what has none, () where it cannot be said (nested tensors)."""
    try:
        shape = getattr(source, "shape", None)
        return tuple(shape) if isinstance(shape, (tuple, list)) else shape
    except Exception:  # a property may raise anything
        return ()


def one_line(text: Any, limit: int = 400) -> str:
    """`text` for an error: in one line, without what a terminal would obey, and cut after `limit` characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _name_of(image: Image.Image) -> str:
    return one_line(getattr(image, "filename", "") or f"PIL image of mode {image.mode}")


def _existing_file(path: Path) -> Path:
    name = one_line(path)
    try:
        if path.is_dir():
            raise ValueError(f"{name}: this is a folder, not an image. Give the path of one picture inside it.")
        if path.exists() and not path.is_file():  # opening a pipe waits for a writer, perhaps forever
            raise ValueError(f"{name}: a pipe, a socket or a device, not a file. Copy the picture into a file.")
        if not path.is_file():
            raise ValueError(f"{name}: no such file (looked from {Path.cwd()}). Check the path.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name}: the file has 0 bytes. Copy or download it again.")
        with open(path, "rb"):
            return path
    except OSError as error:  # a name longer than the file system allows, or no permission
        short = name if len(name) <= 80 else f"...{name[-77:]}"  # the end says which file it is
        raise ValueError(f"{short}: cannot be opened ({error.strerror}). Check the path.") from error


def _read_url(url: str, name: str) -> bytes:
    if url[:5].lower() == "data:":
        header, _, payload = url.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"{name}: only base64 data URLs are read. Write data:image/png;base64,<data>.")
        return decode_base64(payload, name)
    try:
        _ = urllib.parse.urlsplit(url).port  # raises beyond 65535, which a socket would wrap to another port
        with _web_opener().open(url, timeout=URL_TIMEOUT_S) as response:
            data = _read_body(response)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError, InvalidURL the last
        reason = _reason(error)
        raise ValueError(f"{name}: could not be downloaded ({reason}). Download it and give the path.") from error
    if len(data) > URL_MAX_BYTES:
        raise ValueError(f"{name}: more than {URL_MAX_BYTES} bytes. Download it, shrink it and give the path.")
    return data


def _web_opener() -> urllib.request.OpenerDirector:
    """http and https only, redirects included: the usual opener would follow one to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _read_body(response: Any) -> bytes:
    """At most one byte more than the limit, and not for ever: a server may send a byte every few seconds."""
    deadline, pieces, length = time.monotonic() + URL_TOTAL_S, [], 0
    while length <= URL_MAX_BYTES and (piece := response.read1(2**20)):
        pieces.append(piece)
        length += len(piece)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not complete after {URL_TOTAL_S} s")
    if (missing := getattr(response, "length", None)) and length <= URL_MAX_BYTES:
        raise http.client.IncompleteRead(b"", missing)  # read1 says nothing of a connection that broke off
    return b"".join(pieces)


def decode_base64(payload: str, name: str = "base64 image") -> bytes:
    """Decode base64 text, with or without line breaks; ValueError if it is anything else."""
    try:
        return base64.b64decode(re.sub(r"\s", "", payload), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: not valid base64 ({_reason(error)}). Encode the file's bytes again.") from error


def _identify(source: bytes | Path, name: str, max_pixels: int) -> Image.Image:
    """Open a picture of one of our formats; only its header is read."""
    if isinstance(source, bytes) and not source:
        raise ValueError(f"{name}: 0 bytes. Read the file again.")
    Image.init()
    formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]  # a PIL may be built without AVIF or WebP
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_pixels is the limit here, and what cannot be read raises below
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(name, f"{pixels[1]} pixels" if pixels else "too many pixels", max_pixels) from error
    except UnidentifiedImageError as error:
        raise _unknown_format(name, source[:64] if isinstance(source, bytes) else _first_bytes(source)) from error
    except Exception as error:  # whatever a decoder raises on damaged data: AVIF a RuntimeError, others much else
        raise _damaged(name, error) from error


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def _unknown_format(name: str, start: bytes) -> ValueError:
    known = ", ".join(PICTURE_FORMATS)
    for pattern, found in _OTHER_FORMATS.items():
        if re.match(pattern, start, re.DOTALL):
            return ValueError(f"{name}: {found}, not one of {known}. Export it as PNG or JPEG first.")
    found = f"not a picture in a format PIL knows and Pisces reads (it starts with {start[:8]!r})"
    return ValueError(f"{name}: {found}. Give a PNG, JPEG or WebP file.")


def _too_large(name: str, found: str, max_pixels: int) -> ValueError:
    return ValueError(
        f"{name}: {found}, more than the limit of {max_pixels} pixels. Shrink the picture first; to read it as it is, "
        "call load_image with a larger max_pixels (above 178 million raise PIL.Image.MAX_IMAGE_PIXELS too) and resize."
    )


def _reason(error: Exception) -> str:
    return one_line(error, 160) or type(error).__name__


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name}: the picture is damaged ({_reason(error)}). Copy, download or export it again.")


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Check format and size, decode, turn upright, and convert to RGB."""
    _check_opened(image, name, max_pixels)
    try:
        num_frames = _count_frames(image)
        _decode(image)
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # as in _identify; MemoryError too, from a header that promises too much
        raise _damaged(name, error) from error
    if num_frames > 1:
        used = f"frame {image.tell()}" if image.tell() else "the first"
        warnings.warn(f"{name}: {num_frames} frames; only {used} is used.", stacklevel=2)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_array(_deep_pixels(upright, image.format), max_pixels, name)
    try:
        return _on_white(upright) if _is_transparent(upright) else upright.convert("RGB")
    except (ValueError, OSError, KeyError, TypeError) as error:  # palette, grey, CMYK, YCbCr, HSV and LAB do convert
        raise ValueError(
            f"{name}: colour mode {image.mode} cannot become RGB ({_reason(error)}). Export it as an RGB PNG."
        ) from error


def _decode(image: Image.Image) -> None:
    """Decode. PIL 13 maps a TIFF of four bytes per pixel into memory where it has a name, and leaves it unturned."""
    name = getattr(image, "filename", None)
    if image.format != "TIFF" or not name:
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]


def _check_opened(image: Image.Image, name: str, max_pixels: int) -> None:
    # a file that the caller opened with PIL may still be what decoding would hand to a program
    is_decoded = not isinstance(image, ImageFile.ImageFile) or getattr(image, "_im", None) is not None
    found = image.format or getattr(type(image), "format", None)  # of an unread file the class knows it too
    if found is not None and found not in PICTURE_FORMATS and not is_decoded:
        raise ValueError(
            f"{name}: {found}, not one of {', '.join(PICTURE_FORMATS)}. If you trust the file, decode it "
            'yourself and pass image.convert("RGB"); else export it as PNG or JPEG.'
        )
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{name}: {image.width} x {image.height} pixels. Give a picture with at least one pixel.")
    if max(image.size) > (side := max(MAX_SIDE, math.isqrt(max_pixels))):
        raise ValueError(
            f"{name}: {image.width} x {image.height} pixels, a side above {side}. Cut or shrink it first."
        )


def _count_frames(image: Image.Image) -> int:
    # MPO is a phone's JPEG with a preview or a second view behind it: nobody means that as an animation
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return 1
    return getattr(image, "n_frames", 2)


def _is_transparent(image: Image.Image) -> bool:
    # a note of transparency on other modes (CMYK, say) is a leftover that PIL cannot follow
    is_noted = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    return is_noted or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")


def _on_white(image: Image.Image) -> Image.Image:
    # White, because that is what a viewer or a page shows behind a transparent picture. Dropping the alpha
    # channel would show whatever colour the editor left under it, mostly black, and black outlines vanish.
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _deep_pixels(image: Image.Image, file_format: str | None) -> np.ndarray:
    """Grey pixels of more than 8 bits as an array that `_from_array` knows how to scale."""
    # PIL's own conversion from these modes clips at 255, which turns a 16-bit picture white
    is_16_bit = image.mode.startswith("I;16") or (
        image.mode == "I" and file_format == "PPM"
    )  # PIL scales PPM to 65535
    return np.asarray(image).astype(np.uint16) if is_16_bit else np.asarray(image)


def _from_array(source: Any, max_pixels: int, name: str | None = None) -> Image.Image:
    array = _to_numpy(source)
    name = name or f"array of shape {array.shape}, {one_line(array.dtype, 60)}"
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)  # (C, H, W) -> (H, W, C)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or array.size == 0:
        raise ValueError(f"{name}: expected (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4. Reshape it.")
    if array.shape[0] * array.shape[1] > max_pixels:  # before it is copied
        raise _too_large(name, f"{array.shape[1]} x {array.shape[0]} pixels", max_pixels)
    pixels = _to_uint8(array, name)
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    return _to_rgb(image, name, max_pixels)


def _to_numpy(source: Any) -> np.ndarray:
    """An array or tensor of any library as real numbers in this machine's byte order."""
    kind = getattr(source, "dtype", type(source).__name__)
    if isinstance(source, np.ma.MaskedArray) and np.ma.is_masked(source):
        hidden = int(np.ma.count_masked(source))
        raise ValueError(
            f"array of shape {source.shape}, {one_line(kind, 60)}: {hidden} of its values are masked. Give what shall "
            "stand there, such as array.filled(255)."
        )
    try:
        array = source.detach().cpu() if hasattr(source, "detach") else source
        if str(kind) == "torch.bfloat16":
            array = array.float()  # numpy has no bfloat16
        array = np.asarray(array)
    except Exception as error:  # each library has its own: sparse, quantised or meta tensors, 8-bit floats, ...
        shape, reason = one_line(_shape(source), 60), _reason(error)
        raise ValueError(
            f"array of shape {shape}, {one_line(kind, 60)}: cannot be read as numbers ({reason}). Convert it to uint8 "
            "or float32 first."
        ) from error
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 16:
        raise ValueError(
            f"array of shape {array.shape}, {one_line(array.dtype, 60)}: not real numbers. Give uint8 in [0, 255] or "
            "float32 in [0, 1]."
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    low, high = array.min(), array.max()
    if array.dtype.kind in "iu" and low >= 0 and high == 1:
        raise ValueError(
            f"{name}: only 0 and 1, which as {array.dtype} would be a black picture. If it is a mask, pass it as bool "
            "or times 255; if it is meant to be nearly black, as uint8."
        )
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded to nearest
    if array.dtype.kind == "f" and 0 <= low and high <= 1:
        return np.rint(array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32) * 255).astype(np.uint8)
    if array.dtype.kind in "iu" and 0 <= low and high <= 255:
        return array.astype(np.uint8)
    raise ValueError(
        f"{name}: values from {low} to {high}. Expected integers in [0, 255], uint16, or floats in [0, 1]; "
        "rescale it, and give pixels that are not yet normalised."
    )
