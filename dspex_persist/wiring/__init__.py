"""The composition root: opens the backend for an address, and assembles the server.

Heavy modules are imported where they are used: a client needs no SQL, a database file no gRPC.
"""
