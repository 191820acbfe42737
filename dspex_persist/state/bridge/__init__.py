"""The unified bridge protocol: messages to commands and back, errors to statuses and back, the servicer."""
