"""What a client is told when something is wrong: the error object of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error: status, message, and which parameter is meant.

    ``code`` is the machine-readable reason (``model_not_found``, ``image_too_large``, …).
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_reply(status: int, body: bytes) -> ApiError:
    """The error in a reply of FastAPI (``{"detail": …}``), Starlette, transformers, vLLM or `engine` (an error object).

    What a server error says is of no use to the client and may tell of the machine: it is left out.
    """
    if status >= 500:
        return ApiError(status, "The server failed to answer this request", code="internal_error")
    try:
        value = json.loads(body)
    except ValueError:
        value = body.decode(errors="replace")
    detail = value.get("detail", value.get("error", value)) if isinstance(value, dict) else value
    if isinstance(detail, dict) and isinstance(detail.get("message"), str):
        message, param, code = detail["message"], detail.get("param"), detail.get("code")
        if not isinstance(code, str):  # vLLM's is the status once more, and its param may be a word of its own
            long = "maximum context length" in message
            param, code = ("messages", "context_length_exceeded") if long else (param, None)
        return ApiError(status, message, param=param, code=code)
    if isinstance(detail, list):  # FastAPI's list of what does not validate
        detail = "; ".join(str(item.get("msg", item)) if isinstance(item, dict) else str(item) for item in detail)
    return ApiError(400 if status == 422 else status, str(detail))
