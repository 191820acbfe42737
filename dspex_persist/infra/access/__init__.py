"""Who may come in: certificates, tokens, users, and the addresses that others may have this process call."""
