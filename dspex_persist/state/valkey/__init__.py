"""Session state in Redis or Valkey, which several servers share. The only code that talks to either."""
