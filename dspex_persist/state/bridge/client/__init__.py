"""`BridgedState`: the provider that reaches a server."""
