"""Counters and histograms that a server keeps, and families of values for whoever shows them. Knows no format.

An instrument is written by one thread at a time: that of an event loop, or the one that holds a lock. Any thread reads.
So counting takes no lock. What is not made does not count, and costs nothing.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final, Literal, NamedTuple

OTHER: Final = "other"
"""What a label says for all names beyond the first ones."""
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The bounds that clients of Prometheus use for times, unless they are told others."""
_LONGEST: Final = 100

Kind = Literal["counter", "gauge", "histogram"]


class Sample(NamedTuple):
    """One value, with the values of its family's labels."""

    labels: tuple[str, ...]
    value: float


class Distribution(NamedTuple):
    """One histogram, with the values of its family's labels.

    Attributes:
        buckets: How many observations were at most as large as each bound, the last one being infinity.
        total: Their sum.
    """

    labels: tuple[str, ...]
    buckets: tuple[tuple[float, int], ...]
    total: float


@dataclass(frozen=True, slots=True)
class Family:
    """All values of one name.

    Attributes:
        name: The name; that of a counter ends in `_total`.
        help: What it means.
        labels: The names of its labels.
        samples: The values of a counter or a gauge.
        distributions: Those of a histogram.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    distributions: tuple[Distribution, ...] = ()


class Asker(NamedTuple):
    """Who asks for metrics.

    Attributes:
        host: Where it is, as gRPC would say: `ipv4:10.0.0.7`.
        token: Its token; None if it has none.
        names: The names in its certificate, the common name first; () if it has shown none.
    """

    host: str
    token: str | None
    names: tuple[str, ...]


def gauge(name: str, text: str, value: float) -> Family:
    """Return a gauge without labels."""
    return Family(name, "gauge", text, samples=(Sample((), value),))


def total(name: str, text: str, value: float) -> Family:
    """Return a counter without labels."""
    return Family(name, "counter", text, samples=(Sample((), value),))


class Names:
    """Values for a label that others make up: the first ones, and "other" for those that come later.

    Args:
        most: How many there may be.
        known: Names of our own, which always stay, and do not count.
    """

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self._most = most
        self._labels = {name: _printable(name) for name in known}
        self._most += len(self._labels)

    def label(self, name: str) -> str:
        """Return the value of the label for a name."""
        label = self._labels.get(name)
        if label is None:
            if len(self._labels) >= self._most:
                return OTHER
            label = self._labels[name] = _printable(name)
        return label


def _printable(name: str) -> str:
    """Return a name that can be encoded, which not every text of a JSON document can, and that is not too long."""
    return name[:_LONGEST].encode(errors="replace").decode() or "none"


class Counter:
    """Counts, for each combination of values of its labels."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self._name = name
        self._help = text
        self._labels = labels
        self._cells: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        self._twin: Counter | None = None

    def twin(self) -> "Counter":
        """Return a counter that another thread may write; what it counts is shown as counted by this one."""
        self._twin = Counter(self._name, self._help, *self._labels)
        return self._twin

    def add(self, *labels: str, amount: float = 1) -> None:
        """Add an amount, which is not negative."""
        self._cells[labels] = self._cells.get(labels, 0.0) + amount

    def expect(self, *labels: str) -> None:
        """Show these values from the beginning, as 0: a rate does not see a count that begins with 1."""
        self._cells.setdefault(labels, 0.0)

    def family(self) -> Family:
        """Return what was counted."""
        cells = self._cells.copy()
        if self._twin is not None:
            for labels, value in self._twin._cells.copy().items():
                cells[labels] = cells.get(labels, 0.0) + value
        return Family(
            self._name, "counter", self._help, self._labels, tuple(Sample(each, cells[each]) for each in cells)
        )


class Observations:
    """The observations of a histogram with the same values of its labels."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Add one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self, labels: tuple[str, ...]) -> Distribution:
        """Return them in buckets."""
        counts, sofar = self._counts.copy(), 0
        buckets: list[tuple[float, int]] = []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            sofar += count
            buckets.append((bound, sofar))
        return Distribution(labels, tuple(buckets), self._total)


class Histogram:
    """Observations in buckets, for each combination of values of its labels.

    Args:
        name: Its name.
        text: What it means.
        bounds: The upper bounds of the buckets, ascending, without infinity.
        labels: The names of its labels.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> None:
        self._name = name
        self._help = text
        self._bounds = tuple(bounds)
        self._labels = labels
        self._cells: dict[tuple[str, ...], Observations] = {}
        if not labels:
            self.of()

    def of(self, *labels: str) -> Observations:
        """Return the observations with these values of the labels. Whoever observes often keeps them."""
        cell = self._cells.get(labels)
        if cell is None:
            cell = self._cells[labels] = Observations(self._bounds)
        return cell

    def family(self) -> Family:
        """Return what was observed."""
        found = tuple(cell.distribution(labels) for labels, cell in self._cells.copy().items())
        return Family(self._name, "histogram", self._help, self._labels, distributions=found)


# --- Calls of a server, under the names that are usual for gRPC ---

# Most calls take less than a millisecond.
_CALL_S: Final = (0.0005, 0.001, 0.0025, *SECONDS)
_TYPES: Final = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
_CODES: Final = {"OK": "OK", "CANCELLED": "Canceled"}
_OF_RPC: Final = ("grpc_type", "grpc_service", "grpc_method")


class RpcMeter:
    """Counts the calls of one rpc."""

    __slots__ = ("_handled", "_seconds", "labels", "received", "sent", "started")

    def __init__(self, labels: tuple[str, ...], handled: Counter, seconds: Histogram) -> None:
        self.labels = labels
        self.started = self.received = self.sent = 0
        self._handled = handled
        self._seconds: Histogram | Observations = seconds

    def begin(self) -> float:
        """Count a call that begins; returns when it did, for `end`."""
        if not self.started:
            # Not before: rpcs that nobody calls should not fill the page. Not later: what has begun less what has ended
            # is what is open, also before the first call has ended.
            self._handled.expect(*self.labels, "Internal")
        self.started += 1
        return perf_counter()

    def end(self, began: float, code: str) -> None:
        """Count a call that has ended with a status: the name of its code, such as NOT_FOUND."""
        seconds = self._seconds
        if isinstance(seconds, Histogram):
            seconds = self._seconds = seconds.of(*self.labels)
        seconds.observe(perf_counter() - began)
        self._handled.add(*self.labels, _CODES.get(code) or code.title().replace("_", ""))


class CallMeter:
    """Counts the calls of a server. Used on the event loop of that."""

    def __init__(self) -> None:
        self._rpcs: list[RpcMeter] = []
        self._handled = Counter(
            "grpc_server_handled_total", "Calls that have ended, by their status.", *_OF_RPC, "grpc_code"
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "How long calls took, until their last answer.", _CALL_S, *_OF_RPC
        )

    def rpc(self, service: str, method: str, *, streams_requests: bool, streams_answers: bool) -> RpcMeter:
        """Return what counts the calls of an rpc."""
        labels = (_TYPES[streams_requests, streams_answers], service, method)
        meter = RpcMeter(labels, self._handled, self._seconds)
        self._rpcs.append(meter)
        return meter

    def families(self) -> list[Family]:
        """Return what was counted. An rpc that was never called is left out."""
        called = [meter for meter in self._rpcs if meter.started]

        def counted(name: str, text: str, counts: list[int]) -> Family:
            samples = (Sample(meter.labels, count) for meter, count in zip(called, counts, strict=True))
            return Family(name, "counter", text, _OF_RPC, tuple(samples))

        return [
            counted("grpc_server_started_total", "Calls that have begun.", [meter.started for meter in called]),
            self._handled.family(),
            counted("grpc_server_msg_received_total", "Messages from clients.", [meter.received for meter in called]),
            counted("grpc_server_msg_sent_total", "Messages to clients.", [meter.sent for meter in called]),
            self._seconds.family(),
        ]
