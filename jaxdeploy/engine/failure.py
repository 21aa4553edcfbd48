"""Why one request ended with an error: a line in the log, and an error that its caller gets."""

from __future__ import annotations

import logging
import pickle

from jaxdeploy.errors import JaxdeployError, RequestFailedError

logger = logging.getLogger("jaxdeploy")


def failure(request_id: str, error: Exception) -> JaxdeployError:
    """Log why ``request_id`` ends, and return the error for its caller. It pickles.

    The log gets the traceback of an error that no user can correct.
    """
    if isinstance(error, JaxdeployError) and _pickles(error):
        logger.warning("request %s failed: %s", request_id, error)
        return error
    logger.error("request %s failed: %s: %s", request_id, type(error).__name__, error, exc_info=error)
    return RequestFailedError(f"request failed with {type(error).__name__}; the log of the server has the cause")


def _pickles(error: Exception) -> bool:
    """Return whether ``error`` can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error class may raise anything when it is built again
        return False
    return True
