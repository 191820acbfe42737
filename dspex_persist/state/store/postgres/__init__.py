"""The log in a PostgreSQL database that several servers share. Only this package knows psycopg."""
