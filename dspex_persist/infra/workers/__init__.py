"""Pools of workers: processes that are lent to one call at a time."""
