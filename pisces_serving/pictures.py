"""Pictures of a request: judged by their header when they come in, decoded only when their batch starts.

A queue of decoded pictures would be a hundred times as large as one of files. No string of a client is ever taken for
a path, and an address is visited only where `--allow_urls` says so.
"""

import asyncio
import base64
import io
from typing import Any

from PIL import Image

from modeling_pisces.image_loading_pisces import decode_base64, load_image, open_picture

from .errors import ApiError, shown
from .settings import Settings


async def read_url(url: Any, settings: Settings, param: str) -> bytes | Image.Image:
    """The picture that a data URL holds, as its file; of an http URL, downloaded and decoded.

    Raises:
        ApiError: it is neither, not allowed, not a picture, or too large.
    """
    if not isinstance(url, str):
        raise ApiError(f"{param} is {shown(url)}; expected a data URL of a picture.", param=param)
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return await asyncio.to_thread(_read_data_url, url, settings.max_pixels, param)
    if not scheme.startswith(("http://", "https://")):
        raise ApiError(f"{param} is {shown(url)}; expected a data URL: data:image/png;base64,<data>.", param=param)
    if not settings.allow_urls:
        raise ApiError(
            f"{param}: this server visits no addresses (--allow_urls is off). Send the picture as a data URL.",
            param=param,
            code="urls_not_allowed",
        )
    try:
        return await asyncio.to_thread(load_image, url, settings.max_pixels)
    except ValueError as error:
        raise ApiError(str(error), param=param, code="invalid_image") from error


def _read_data_url(url: str, max_pixels: int, param: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ApiError(f"{param}: only base64 data URLs are read. Write data:image/png;base64,<data>.", param=param)
    try:
        data = decode_base64(payload, param)
    except ValueError as error:
        raise ApiError(str(error), param=param, code="invalid_image") from error
    return check_file(data, max_pixels, param)


def check_file(data: bytes, max_pixels: int, param: str) -> bytes:
    """Give back a picture file whose header is in order.

    Raises:
        ApiError: no picture, or one of more pixels than allowed.
    """
    try:
        with open_picture(data, max_pixels) as picture:
            width, height = picture.size
    except ValueError as error:
        raise ApiError(f"{param}: {error}", param=param, code="invalid_image") from error
    if width * height > max_pixels:
        raise ApiError(
            f"{param}: {width} x {height} pixels; expected at most {max_pixels}, this server's --max_pixels. Shrink "
            "the picture.",
            param=param,
            code="image_too_large",
        )
    return data


def decode(picture: bytes | Image.Image, max_pixels: int) -> Image.Image:
    """Pixels of a picture that came in.

    Raises:
        ValueError: the file is damaged behind its header.
    """
    return picture if isinstance(picture, Image.Image) else load_image(picture, max_pixels)


def encode_png(image: Image.Image) -> str:
    """Base64 of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


__all__ = ["check_file", "decode", "encode_png", "read_url"]
