"""The root of every error that this package raises on purpose."""

from typing import ClassVar


class DspexError(Exception):
    """Something that a caller can understand and act on.

    `retryable` says whether the same call can succeed later without any change.
    """

    retryable: ClassVar[bool] = False
