"""Layer 1, infrastructure: processes, sockets and bytes. Knows nothing of variables, sessions or tools."""
