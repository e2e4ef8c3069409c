"""POST /v1/embeddings: texts and pictures to unit vectors, those of `pisces embed`."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..batcher import Key
from ..errors import ApiError, shown
from ..fields import Fields, check_text
from ..flow import Server, Ticket, read_json
from ..pictures import read_url
from ..worker import Embedding


async def embed(request: Request, server: Server) -> Response:
    fields = Fields(await read_json(request, server), "embeddings")
    name, adapter = server.find_model(fields.take("model"))
    encoding = fields.choice("encoding_format", ("float", "base64")) or "float"
    size = fields.whole("dimensions", 1, 2**20)
    items = await _items(fields.take("input"), server)
    fields.finish()
    # texts and pictures of one batch become two calls, so they need no queues of their own
    vectors, num_tokens = await Ticket(request, server, Key("embed", adapter), len(items), Embedding(items)).result()
    if size is not None and size != len(vectors[0]):
        raise ApiError(
            f"dimensions is {size}; this model's vectors have {len(vectors[0])} numbers and are not cut.",
            param="dimensions",
        )
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


async def _items(given: Any, server: Server) -> list[Any]:
    items = given if isinstance(given, list) else [given]
    if not 1 <= len(items) <= server.settings.max_inputs:
        raise ApiError(
            f"input has {len(items)} items; expected 1 to {server.settings.max_inputs}, this server's --max_inputs.",
            param="input",
        )
    return [await _item(item, f"input[{number}]", server) for number, item in enumerate(items)]


async def _item(item: Any, param: str, server: Server) -> Any:
    """A text; or a picture, as a data URL or as the part of a chat."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and set(item) == {"type", "text"}:
        item = item["text"]
    elif kind == "image_url" and set(item) == {"type", "image_url"}:
        inner = item["image_url"]
        return await read_url(inner.get("url") if isinstance(inner, dict) else inner, server.settings, param)
    if isinstance(item, int) or (isinstance(item, list) and all(isinstance(one, int) for one in item)):
        raise ApiError(f"{param} is made of token ids, which are not taken. Send the text itself.", param=param)
    if not isinstance(item, str) or not item.strip():
        raise ApiError(
            f"{param} is {shown(item)}; expected a text, a data URL of a picture, or an image_url part.", param=param
        )
    if item[:11].lower() == "data:image/":
        return await read_url(item, server.settings, param)
    return check_text(param, item)


def _encoded(vector: Any, encoding: str) -> Any:
    values = np.asarray(vector, dtype="<f4")
    return values.tolist() if encoding == "float" else base64.b64encode(values.tobytes()).decode("ascii")


__all__ = ["embed"]
