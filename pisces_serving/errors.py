"""Everything that a server can refuse, in the one form that OpenAI's clients read."""

from typing import Any


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no answer, told to its sender.

    Args:
        message: one line: the value, what was expected, what to do.
        status: of HTTP.
        param: the field of the request that is at fault.
        code: a word for programs.
        retry_after_s: when to ask again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = " ".join(message.split()), status, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.message), "type": kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def _encodable(text: str) -> str:
    """JSON can spell halves of characters (lone surrogates), which UTF-8 has no bytes for."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any, limit: int = 60) -> str:
    """A value of a request for an error: quoted, in one line of printable characters, and cut."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def deadline_passed(deadline_s: float) -> ApiError:
    return ApiError(
        f"no answer after {deadline_s:g} s, this server's --deadline_s. Ask for less, or ask again later.",
        status=504,
        code="deadline_exceeded",
    )


def shutting_down() -> ApiError:
    return ApiError("the server is shutting down. Send the request again.", status=503, code="shutting_down")


__all__ = ["ApiError", "deadline_passed", "shown", "shutting_down"]
