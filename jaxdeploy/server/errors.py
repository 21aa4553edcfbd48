"""Why a server, or a proxy in front of several, turns a request away."""

from __future__ import annotations

from jaxdeploy.errors import JaxdeployError


class UnknownModelError(JaxdeployError):
    """No model of that name is served."""

    http_status = 404


class ForbiddenError(JaxdeployError):
    """The server does not do this as it was started."""

    http_status = 403


class OverloadedError(JaxdeployError):
    """More is asked for than the server takes; ``retry_after`` is in seconds."""

    http_status = 429

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClientGoneError(JaxdeployError):
    """Nobody waits for the answer any more."""

    http_status = 499


class NodeFailedError(JaxdeployError):
    """A node could not be reached, or broke off its reply."""

    http_status = 502


class UnreachableError(NodeFailedError):
    """A node never got the request."""


class BadAnswerError(NodeFailedError):
    """A node answered with something that the proxy does not forward: it is too large, or not JSON."""


class NotTheApiError(BadAnswerError):
    """A node answered as no server of the API does, whatever it was asked."""


class TooManyNodesError(JaxdeployError):
    """The proxy has as many nodes as it takes."""

    http_status = 429


class NodeConflictError(JaxdeployError):
    """A node is known with another key."""

    http_status = 409


class NoNodeError(JaxdeployError):
    """No node that could answer is up."""

    http_status = 503


class NodeSilentError(JaxdeployError):
    """A node that is well has sent nothing for too long."""

    http_status = 504
