"""The exceptions of the package."""


class BackendUnavailable(RuntimeError):
    """A backend that was named explicitly cannot run this call; the message says why."""
