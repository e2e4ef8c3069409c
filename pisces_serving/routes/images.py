"""POST /v1/images/generations and /v1/images/edits: a prompt, or a picture and what to change in it, to pictures."""

import asyncio
import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..batcher import Key
from ..errors import ApiError, shown
from ..fields import LARGEST_SEED, Fields, read_size
from ..flow import Server, Ticket, new_seed, read_form, read_json
from ..pictures import check_file, encode_png
from ..worker import Drawing, DrawingShape


MOST_GUIDANCE = 1000


async def generate_images(request: Request, server: Server) -> Response:
    fields = Fields(await read_json(request, server), "images")
    return await _drawn(request, server, fields, "draw", None)


async def edit_images(request: Request, server: Server) -> Response:
    given: dict[str, Any] = {}
    pictures: list[Any] = []
    for name, value in await read_form(request, server, server.settings.max_images):
        if name in ("image", "image[]"):
            pictures.append(value)
        elif name in given:
            raise ApiError(f"{shown(name)} is given twice. Send it once.", param=name[:100])
        else:
            given[name] = value
    fields = Fields(given, "images", is_form=True)
    return await _drawn(request, server, fields, "edit", pictures)


async def _drawn(
    request: Request, server: Server, fields: Fields, endpoint: str, pictures: list[Any] | None
) -> Response:
    if not server.worker.can_draw:
        raise ApiError("this checkpoint has no decoder, so it draws nothing. Ask /v1/chat/completions.")
    name, adapter = server.find_model(fields.take("model"))
    work, shape = read_drawing(fields, server)
    if pictures is not None:
        strength = fields.number("strength", 0, 1, above=True)
        shape = replace(shape, strength=strength, num_pictures=len(pictures))
    fields.finish()
    if pictures is not None:
        work.pictures = await _checked(pictures, server)
    # of an edit its pictures are rows too: a batch holds them decoded
    num_rows = len(work.seeds) * max(1, len(work.pictures or ()))
    ticket = Ticket(request, server, Key(endpoint, adapter, shape), num_rows, work)
    images = await ticket.result()
    data = [
        {"b64_json": await asyncio.to_thread(encode_png, image), "seed": seed}
        for image, seed in zip(images, work.seeds, strict=True)
    ]
    size = f"{images[0].width}x{images[0].height}"
    return JSONResponse(
        {"created": int(time.time()), "data": data, "output_format": "png", "size": size, "model": name}
    )


def read_drawing(fields: Fields, server: Server) -> tuple[Drawing, DrawingShape]:
    """What to draw, and what of it a whole batch shares.

    Raises:
        ApiError: a field is not as it should be.
    """
    limits = server.settings
    prompt = fields.text("prompt", required=True)
    assert prompt is not None
    num_images = fields.whole("n", 1, limits.max_n, "--max_n") or 1
    if (form := fields.choice("response_format", ("b64_json", "url"))) == "url":
        raise ApiError(
            f"response_format {form} is not supported: this server keeps no pictures. Take b64_json.",
            param="response_format",
        )
    height, width = read_size(fields.take("size"), limits.max_draw_pixels)
    negative = fields.text("negative_prompt")
    seed = fields.seed()
    if seed is None:
        seed = new_seed()
    elif seed + num_images - 1 > LARGEST_SEED:
        raise ApiError(f"seed is {seed} and n is {num_images}; picture k takes seed + k, at most {LARGEST_SEED}.")
    shape = DrawingShape(
        height,
        width,
        fields.whole("num_inference_steps", 1, limits.max_steps, "--max_steps"),
        fields.number("guidance_scale", 0, MOST_GUIDANCE),
        has_negative=negative is not None,
    )
    return Drawing(prompt, [seed + k for k in range(num_images)], negative), shape


async def _checked(pictures: list[Any], server: Server) -> list[bytes]:
    limits = server.settings
    if not 1 <= len(pictures) <= limits.max_images:
        raise ApiError(
            f"the form has {len(pictures)} pictures; expected 1 to {limits.max_images} (--max_images) as image or "
            "image[].",
            param="image",
        )
    found = []
    for picture in pictures:
        if not isinstance(picture, bytes):
            raise ApiError("image is a text; expected a file: -F image=@photo.png.", param="image")
        found.append(await asyncio.to_thread(check_file, picture, limits.max_pixels, "image"))
    return found


__all__ = ["edit_images", "generate_images", "read_drawing"]
