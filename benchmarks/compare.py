"""Compares two runs: finds the figures that changed by more than the noise of both.

The spread of a figure is half the distance between its lowest and its highest round; its noise is the sum of the
spreads in both runs. A figure that changed by more than its noise is better or worse. With fewer than three rounds in a
run, there is no verdict.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.table import Row, aligned, number

_LEAST_ROUNDS = 3
_LEAST_CHANGE = 0.02
"""A smaller change is ignored, however little noise there is."""
_COLUMNS = ("what", "unit", "before", "now", "change", "noise", "")
_CONDITIONS = ("quick", "python", "built", "sqlite", "cpus", "filesystem")
"""The conditions that must be equal for the rates of two runs to be comparable."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A run that `--json` wrote: its conditions and its rows."""

    run: Mapping[str, Any]
    rows: Sequence[Row]

    @classmethod
    def load(cls, path: Path) -> "SavedRun":
        """Read a saved run; raise ValueError, naming the file, if it is missing or not the JSON of a run."""
        try:
            saved = json.loads(path.read_text())
            return cls(dict(saved["run"]), list(map(Row.from_json, saved["rows"])))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what --json writes: {type(error).__name__} {error}") from error


@dataclass(frozen=True, slots=True)
class Figure:
    """A compared number: the value of a row, or its ratio."""

    key: str
    of: Literal["value", "ratio"]
    what: str
    unit: str
    size: float
    rounds: Sequence[float]
    more_is_better: bool

    @property
    def spread(self) -> float | None:
        """Half the distance between lowest and highest round, in the figure's unit; None with too few rounds."""
        if len(self.rounds) < _LEAST_ROUNDS:
            return None
        return (max(self.rounds) - min(self.rounds)) / 2


def _figures(rows: Sequence[Row]) -> dict[tuple[str, str, str], Figure]:
    figures: list[Figure] = []
    for row in rows:
        figures.append(Figure(row.key, "value", row.what, row.unit, row.value, row.rounds, row.more_is_better))
        if row.ratio is not None:
            what = f"{row.what}: ratio"
            figures.append(Figure(row.key, "ratio", what, "", row.ratio, row.ratio_rounds, row.more_is_better))
    # With its unit: a row whose unit has changed is another figure.
    return {(each.key, each.of, each.unit): each for each in figures}


@dataclass(frozen=True, slots=True)
class Change:
    """A figure in two runs."""

    before: Figure
    now: Figure

    @property
    def part(self) -> float:
        """The relative change of the figure."""
        return self.now.size / self.before.size - 1 if self.before.size else 0.0

    @property
    def noise(self) -> float | None:
        """The noise relative to the figure before; a larger change is significant. None if it is unknown."""
        before, now = self.before.spread, self.now.spread
        if before is None or now is None or not self.before.size:
            return None
        return max((before + now) / abs(self.before.size), _LEAST_CHANGE)

    @property
    def verdict(self) -> Literal["better", "worse", "", "?"]:
        """The verdict: "" for a change within the noise, "?" if the noise is unknown."""
        if self.noise is None:
            return "?"
        if abs(self.part) <= self.noise:
            return ""
        return "better" if (self.part > 0) == self.now.more_is_better else "worse"


def changes(before: Sequence[Row], now: Sequence[Row]) -> list[Change]:
    """Return the changes of the figures that both runs have, in the order of the second one."""
    earlier = _figures(before)
    return [Change(earlier[name], figure) for name, figure in _figures(now).items() if name in earlier]


def unlike(before: SavedRun, now: SavedRun) -> list[str]:
    """Return the differences between the conditions of the two runs, in words."""
    pairs = ((name, before.run.get(name), now.run.get(name)) for name in _CONDITIONS)
    return [f"{name} was {old}, and is {new}" for name, old, new in pairs if old != new]


def format_changes(before: SavedRun, now: SavedRun) -> str:
    """Return the figures of both runs next to each other, the different conditions, and how much has changed."""
    changed = changes(before.rows, now.rows)
    verdicts = [each.verdict for each in changed]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    lines = [
        *(f"Not measured alike: {difference}" for difference in unlike(before, now)),
        "noise: half the range of the rounds, summed over both runs, at least 2 %; ?: fewer than three rounds",
        "",
        aligned(_COLUMNS, list(map(_cells, changed)), numbers=range(2, 6)),
        "",
        f"Changed beyond noise: {better} better, {worse} worse, of {len(changed)} figures",
        *_only_in_one(before.rows, now.rows),
    ]
    return "\n".join(lines)


def _cells(change: Change) -> tuple[str, ...]:
    before, now, noise = change.before, change.now, change.noise
    changed = f"{100 * change.part:+.0f} %"
    apart = "" if noise is None else f"{100 * noise:.0f} %"
    return (now.what, now.unit, number(before.size), number(now.size), changed, apart, change.verdict)


def _only_in_one(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """Return the rows without a counterpart, in the sections that both runs have."""
    sections = {row.section for row in before} & {row.section for row in now}
    old, new = ([row.key for row in rows if row.section in sections] for rows in (before, now))
    pairs = (("before", [key for key in old if key not in new]), ("now", [key for key in new if key not in old]))
    return [f"Only {when}: {', '.join(keys)}" for when, keys in pairs if keys]


def as_json(before: SavedRun, now: SavedRun) -> dict[str, Any]:
    """Return the comparison as JSON; `change` and `noise` are relative to the earlier figure."""
    return {"run": before.run, "figures": [_figure_as_json(each) for each in changes(before.rows, now.rows)]}


def _figure_as_json(change: Change) -> dict[str, Any]:
    figure = change.now
    return {
        "key": figure.key,
        "of": figure.of,
        "what": figure.what,
        "unit": figure.unit,
        "more_is_better": figure.more_is_better,
        "before": change.before.size,
        "now": figure.size,
        "change": change.part,
        "noise": change.noise,
        "verdict": change.verdict,
    }
