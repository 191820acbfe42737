"""Commands on live sessions, of a running server or of a database file: get, set, watch, call, program, sessions."""
