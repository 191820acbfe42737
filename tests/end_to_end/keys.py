"""A secret API key: some tools hold it, and tests check that it appears nowhere. This module imports nothing heavy."""

from typing import Final

SECRET: Final = "sk-secret-0123456789"
PROMPT, ANSWER = "which prompt-text is it", "the answer-text"
"""What no trace may show of LM calls."""
