"""A secret API key: some tools hold it, and tests check that it appears nowhere. This module imports nothing heavy."""

from typing import Final

SECRET: Final = "sk-secret-0123456789"
