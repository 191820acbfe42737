"""Workers, seen from both ends: those that a pool lends, those that register themselves, and what runs in them."""
