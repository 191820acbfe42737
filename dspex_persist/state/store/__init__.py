"""A store of sessions in one SQLite file. All SQL of the project is in this package."""
