"""A key that nobody may see, for the tools that have it and the tests that look for it: light to import for both."""

from typing import Final

SECRET: Final = "sk-secret-0123456789"
