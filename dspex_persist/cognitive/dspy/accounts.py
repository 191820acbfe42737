"""What DSPy knows of a call besides its answer: its cost, its tokens, and whether the cache answered.

Every call of DSPy's own LMs and engines ends in `finalize`, which has all of it. An LM of a user's that overrides
`__call__` may say some of it in the entry that it adds to its history.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

from dspy.clients import execution
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict

from dspex_persist.cognitive.dspy.requests import plain

ACCOUNT: Final = "dspex_persist_lm_account"
"""The key of the running call's account in DSPy's settings."""


@dataclass(frozen=True, slots=True)
class _Said:
    cost: float | None
    cached: bool | None
    usage: Mapping[str, Any]


@dataclass(eq=False, slots=True)
class Account:
    """What is known of one call, which `lm` makes. Others may be called by that one."""

    lm: object
    _own: _Said | None = None
    _inner: list[_Said] = field(default_factory=list)

    def note(self, lm: object, said: _Said) -> None:
        """Keep what is said about a call of an LM."""
        if lm is not self.lm:
            self._inner.append(said)
        elif self._own is None:
            self._own = said

    def facts(self) -> dict[str, Any]:
        """Return the fields of the recorded call that are known: `cost` and `cached`."""
        # An LM that passes its calls on to others costs what they cost.
        own, inner = self._own, self._inner
        cost, cached = (None, None) if own is None else (own.cost, own.cached)
        if cost is None and inner and all(each.cost is not None for each in inner):
            cost = sum(each.cost or 0.0 for each in inner)
        if cached is None and inner:
            cached = all(each.cached is True for each in inner)
        # Nothing is paid for an answer of the cache, although DSPy's history repeats what it once cost.
        known = {"cost": 0.0 if cached else cost, "cached": cached}
        return {name: fact for name, fact in known.items() if fact is not None}

    def usage(self) -> dict[str, Any]:
        """Return the tokens that only the LM's history tells, by model; usually none."""
        if self._own is None or not self._own.usage:
            return {}
        return {str(getattr(self.lm, "model", "")): plain(self._own.usage)}


def _running() -> Account | None:
    account: Account | None = thread_local_overrides.get().get(ACCOUNT)
    return account


def _amount(cost: object) -> float | None:
    """Return a cost in USD, if it is one."""
    if isinstance(cost, bool):
        return None
    try:
        amount = float(cost)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return amount if isfinite(amount) and amount >= 0 else None


def install() -> None:
    """Have the running calls' accounts kept, permanently."""
    finalize: Callable[..., Any] = execution.finalize

    @functools.wraps(finalize)
    def finalized(lm: Any, call: Any, result: Any) -> Any:
        account = _running()
        if account is None:
            return finalize(lm, call, result)
        hit = bool(result.cache_hit) or getattr(result.raw, "cache_hit", False) is True
        # DSPy gives the tokens to its usage tracker.
        account.note(lm, _Said(_amount(result.cost), hit, {}))
        # It adds an entry to the history, which says the same.
        token = thread_local_overrides.set(dotdict({**thread_local_overrides.get(), ACCOUNT: None}))
        try:
            return finalize(lm, call, result)
        finally:
            thread_local_overrides.reset(token)

    execution.finalize = finalized


def noting(update_history: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `update_history` of an LM class."""

    @functools.wraps(update_history)
    def noted(lm: Any, entry: Any, *args: Any, **kwargs: Any) -> Any:
        account = _running()
        if account is not None and isinstance(entry, Mapping):
            usage = entry.get("usage")
            hit = getattr(entry.get("response"), "cache_hit", None)
            said = _Said(
                _amount(entry.get("cost")),
                hit if isinstance(hit, bool) else None,
                usage if isinstance(usage, Mapping) else {},
            )
            account.note(lm, said)
        return update_history(lm, entry, *args, **kwargs)

    return noted
