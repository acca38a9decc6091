"""What a client is told when it gets no picture: a status, and OpenAI's envelope around one sentence.

No message holds a path or a traceback: what failed inside is in the server's log alone.
"""

from __future__ import annotations

import math
from typing import Any

from sparse_engine.errors import OptionError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CLIENT_GONE = 499  # in the metrics; nobody reads the answer
RETRY_WHILE_LOADING = 5  # seconds


class Refusal(Exception):
    """A request that gets no picture.

    Args:
        status: of the answer.
        message: what is wrong, and what to do.
        code: for programs.
        param: the field at fault.
        retry_after: seconds after which it may go better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """OpenAI's envelope."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_option(error: OptionError, fields: Any) -> Refusal:
    """For an argument that the engine refuses; names the field where the sentence begins with it."""
    words = error.what.split(maxsplit=1)[0] if error.what else ""
    first = words.partition("[")[0].rstrip(":")
    first = {"label": "labels"}.get(first, first)
    message = error.what if error.fix is None else f"{error.what}. {error.fix[0].upper()}{error.fix[1:]}"
    return Refusal(400, message, "invalid_value", param=first if first in fields else None)


def full(message: str, seconds: float) -> Refusal:
    """The queue takes no more."""
    return Refusal(429, message, "queue_full", retry_after=seconds)


def failed() -> Refusal:
    """Something failed here that the client can do nothing about."""
    return Refusal(500, "the engine failed; the server's log says why", "engine_failed")


def diverged(rows: int, n: int) -> Refusal:
    """Images that are NaN or infinite."""
    return Refusal(
        500,
        f"{rows} of {n} images became NaN or infinite; try a lower guidance, more steps or another sampler",
        "non_finite",
    )


def late(seconds: float) -> Refusal:
    """A deadline is over."""
    return Refusal(504, f"not drawn within {seconds:g} s; ask for fewer images or steps, or later", "deadline")


def closed(draining: bool) -> Refusal:
    """The service takes no requests yet, or no more."""
    if draining:
        return Refusal(503, "the service is shutting down", "shutting_down", retry_after=RETRY_WHILE_LOADING)
    return Refusal(503, "the service is loading its engines", "loading", retry_after=RETRY_WHILE_LOADING)
