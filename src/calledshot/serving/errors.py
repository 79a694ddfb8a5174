"""What the API answers when it cannot: the status, and an object in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 200. `parameter` is the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}
        self.parameter, self.code, self.kind = parameter, code, kind

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.parameter, "code": self.code},
        }
