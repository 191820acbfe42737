"""What clients may do: the scopes of their tokens, the rules of sessions, and what notes refusals."""
