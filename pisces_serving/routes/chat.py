"""POST /v1/chat/completions: messages in, an answer out, whole or as a stream, of words or of words and pictures."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..answers import Answer, Chat
from ..batcher import Key
from ..errors import ApiError, shown
from ..fields import Fields, check_text
from ..flow import Gone, Server, Ticket, new_seed, read_json
from ..pictures import encode_png, read_url


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DETAILS = (None, "auto", "low", "high")  # a picture is read at the one size of its tower, whatever is asked for
MOST_STOPS = 4  # as OpenAI's own
LONGEST_STOP = 200  # characters


async def complete_chat(request: Request, server: Server) -> Response:
    body = await read_json(request, server)
    fields = Fields(body, "chat")
    name, adapter = server.find_model(fields.take("model"))
    wants_stream, options = fields.flag("stream"), fields.take("stream_options")
    with_usage = _wants_usage(options, wants_stream)
    chat = await read_chat(fields, server)
    fields.finish()
    ticket = Ticket(request, server, Key("chat", adapter), 1, chat)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    first = await ticket.next()  # what is refused before the first word is a plain answer with its own status
    if wants_stream:
        events = _stream(ticket, first, head, chat.draws, with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    answer = first[1] if first[0] == "done" else await ticket.result()
    message = {"role": "assistant", "content": await _content(answer, chat.draws), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)})


async def read_chat(fields: Fields, server: Server) -> Chat:
    """The chat that a request asks for.

    Raises:
        ApiError: a field is not as it should be.
    """
    limits = server.settings
    draws = _draws(fields.take("modalities"), server)
    names = ("max_completion_tokens", "max_tokens")
    lengths = [fields.whole(name, 1, limits.max_tokens, "--max_tokens") for name in names]
    temperature, top_p = fields.number("temperature", 0, 2), fields.number("top_p", 0, 1, above=True)
    if temperature is None:  # greedy, as `pisces describe`; who names top_p wants to sample
        temperature = 0.0 if top_p is None else 1.0
    seed = fields.seed()
    return Chat(
        messages=await _messages(fields.take("messages"), server),
        max_tokens=next((length for length in lengths if length is not None), None),
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=new_seed() if seed is None else seed,
        stops=_stops(fields.take("stop")),
        draws=draws,
    )


def _draws(modalities: Any, server: Server) -> bool:
    if modalities is None or modalities == ["text"]:
        return False
    if not isinstance(modalities, list) or sorted(map(str, modalities)) != ["image", "text"]:
        raise ApiError(
            f'modalities is {shown(modalities)}; expected ["text"] or ["text", "image"]. For a picture without words '
            "ask /v1/images/generations.",
            param="modalities",
        )
    if not server.worker.can_draw:
        raise ApiError("this checkpoint has no decoder, so it answers in words alone.", param="modalities")
    return True


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    is_list = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not is_list or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stops):
        raise ApiError(
            f"stop is {shown(stop)}; expected a text or up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters.",
            param="stop",
        )
    return tuple(check_text("stop", one) for one in stops)


def _wants_usage(options: Any, wants_stream: bool) -> bool:
    if options is None:
        return False
    if not wants_stream:
        raise ApiError("stream_options is for streams. Set stream, or leave it out.", param="stream_options")
    known = {"include_usage": bool, "include_obfuscation": bool}
    if not isinstance(options, dict) or any(not isinstance(v, known.get(k, ())) for k, v in options.items()):
        raise ApiError(
            f'stream_options is {shown(options)}; expected {{"include_usage": true}} or false.', param="stream_options"
        )
    return options.get("include_usage", False)


# ---- messages


async def _messages(messages: Any, server: Server) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages is missing or empty; expected a list of messages.", param="messages")
    found, num_pictures = [], 0
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        found.append(await _message(message, param, server))
        num_pictures += sum(part["type"] == "image" for part in found[-1]["content"])
        if num_pictures > server.settings.max_images:
            raise ApiError(
                f"messages show more than {server.settings.max_images} pictures, this server's --max_images.",
                param=param,
            )
    if found[-1]["role"] != "user":
        raise ApiError(
            f"the last message is of the role {found[-1]['role']}; expected user, whom the model answers.",
            param="messages",
        )
    return found


async def _message(message: Any, param: str, server: Server) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(f"{param} is {shown(message)}; expected an object with role and content.", param=param)
    left = {name: value for name, value in message.items() if value is not None}
    role, content = left.pop("role", None), left.pop("content", None)
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(f"{param}.role is {shown(role)}; expected one of {', '.join(ROLES)}.", param=f"{param}.role")
    left.pop("name", None)  # the template has no place for it
    if left := {name: value for name, value in left.items() if value != []}:
        raise ApiError(f"{param}.{next(iter(left))[:60]} is not supported. Leave it out.", param=param)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ApiError(
            f"{param}.content is {shown(content)}; expected a text or a list of parts.", param=f"{param}.content"
        )
    place = f"{param}.content"
    read = [await _part(part, role, f"{place}[{n}]", server) for n, part in enumerate(parts)]
    return {"role": ROLES[role], "content": read}


async def _part(part: Any, role: str, param: str, server: Server) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and set(part) == {"type", "text"}:
        return {"type": "text", "text": check_text(f"{param}.text", part["text"])}
    if kind == "image_url" and set(part) == {"type", "image_url"}:
        if role not in ("user", "assistant"):
            raise ApiError(f"{param}: only the user and the assistant show pictures.", param=param)
        shown_url = part["image_url"] if isinstance(part["image_url"], dict) else {"url": part["image_url"]}
        if set(shown_url) - {"url", "detail"} or shown_url.get("detail") not in DETAILS:
            raise ApiError(
                f"{param}.image_url is {shown(shown_url)}; expected url, and detail as auto, low or high.",
                param=f"{param}.image_url",
            )
        picture = await read_url(shown_url.get("url"), server.settings, f"{param}.image_url.url")
        return {"type": "image", "image": picture}
    raise ApiError(
        f'{param} is {shown(part)}; expected {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": '
        '{"url": ...}}.',
        param=param,
    )


# ---- answers


async def _content(answer: Answer, draws: bool) -> Any:
    if not draws:
        return "".join(answer.parts)
    return [await _answer_part(part) for part in answer.parts]


async def _answer_part(part: Any) -> dict[str, Any]:
    """A text or a picture as clients send it back in the next turn."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:image/png;base64,{await asyncio.to_thread(encode_png, part)}"
    return {"type": "image_url", "image_url": {"url": url}}


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_new_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_new_tokens,
    }


async def _stream(
    ticket: Ticket, first: tuple[str, Any], head: dict[str, Any], draws: bool, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of one answer; an error on the way is an event too, and then nothing follows."""
    text = {"modality": "text"} if draws else {}
    usage = {"usage": None} if with_usage else {}

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        return _event({**head, "object": "chat.completion.chunk", "choices": choices, **usage, **more})

    said = ""
    try:
        yield chunk({"role": "assistant", "content": ""}, **text)
        async for kind, value in ticket.pieces(first):
            if kind == "piece":
                said += value
                yield chunk({"content": value}, **text)
                continue
            for part in _unsaid(value.parts, said):
                if isinstance(part, str):
                    yield chunk({"content": part}, **text)
                else:
                    yield chunk({"content": [await _answer_part(part)]}, modality="image")
            yield chunk({}, value.finish_reason)
            if with_usage:
                last = {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(value)}
                yield _event(last)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except Gone:
        return
    finally:
        ticket.drop()


def _unsaid(parts: list[Any], said: str) -> list[Any]:
    """What of an answer has not been streamed: text goes out early up to the first picture."""
    if parts and isinstance(parts[0], str):
        return [part for part in (parts[0][len(said) :], *parts[1:]) if part != ""]
    return parts


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


__all__ = ["complete_chat", "read_chat"]
