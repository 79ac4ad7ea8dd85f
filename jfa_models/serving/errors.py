"""Errors in the form of OpenAI's API."""

from typing import Any


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      kind, param, code: the fields "type", "param" and "code" of the error.
      retry_after: seconds after which the same request may succeed; None: it will not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.kind, self.param, self.code = kind, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def unavailable(message: str, *, retry_after: int | None = 5) -> ApiError:
    """The server cannot take requests now."""
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after=retry_after)
