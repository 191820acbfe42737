"""The only SQL: a store of sessions in one SQLite file."""
