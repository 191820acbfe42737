"""Layer 1 alone: a ping service, no bridge and no variables."""
