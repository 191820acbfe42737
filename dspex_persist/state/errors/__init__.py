"""The errors of the state layer: one class for each cause.

Each leaf is a dataclass whose fields are its arguments. `sentence` says what is wrong, and `advice`, if there is any,
what to do next. `str()` combines both for Python; `bridge/hints.py` and `cli/hints.py` have the other texts of the
advice. `bridge/status.py` maps each leaf to a gRPC status code.
"""

from dspex_persist.spelling import printable as printable
from dspex_persist.spelling import quote as quote
from dspex_persist.state.errors.base import InvalidArgumentError as InvalidArgumentError
from dspex_persist.state.errors.base import LimitExceededError as LimitExceededError
from dspex_persist.state.errors.base import OpenError as OpenError
from dspex_persist.state.errors.base import StateError as StateError
from dspex_persist.state.errors.base import UnsupportedError as UnsupportedError
from dspex_persist.state.errors.files import CheckpointError as CheckpointError
from dspex_persist.state.errors.files import DatabaseInUseError as DatabaseInUseError
from dspex_persist.state.errors.files import FileChangedError as FileChangedError
from dspex_persist.state.errors.files import LostCommitsError as LostCommitsError
from dspex_persist.state.errors.files import NewerSchemaError as NewerSchemaError
from dspex_persist.state.errors.files import NotADatabaseError as NotADatabaseError
from dspex_persist.state.errors.files import ReadFailedError as ReadFailedError
from dspex_persist.state.errors.files import StorageError as StorageError
from dspex_persist.state.errors.files import UpgradeError as UpgradeError
from dspex_persist.state.errors.hints import Hint as Hint
from dspex_persist.state.errors.rules import DerivationError as DerivationError
from dspex_persist.state.errors.rules import InvalidRuleError as InvalidRuleError
from dspex_persist.state.errors.rules import RuleExistsError as RuleExistsError
from dspex_persist.state.errors.rules import RuleNotFoundError as RuleNotFoundError
from dspex_persist.state.errors.rules import RuleViolatedError as RuleViolatedError
from dspex_persist.state.errors.service import CircuitOpenError as CircuitOpenError
from dspex_persist.state.errors.service import EngineClosedError as EngineClosedError
from dspex_persist.state.errors.service import ForkedProcessError as ForkedProcessError
from dspex_persist.state.errors.service import InternalError as InternalError
from dspex_persist.state.errors.service import OutcomeUnknownError as OutcomeUnknownError
from dspex_persist.state.errors.service import QueueFullError as QueueFullError
from dspex_persist.state.errors.service import ShuttingDownError as ShuttingDownError
from dspex_persist.state.errors.service import UnavailableError as UnavailableError
from dspex_persist.state.errors.sessions import DamagedSessionError as DamagedSessionError
from dspex_persist.state.errors.sessions import IdempotencyConflictError as IdempotencyConflictError
from dspex_persist.state.errors.sessions import NotInHistoryError as NotInHistoryError
from dspex_persist.state.errors.sessions import RecordingError as RecordingError
from dspex_persist.state.errors.sessions import SessionExistsError as SessionExistsError
from dspex_persist.state.errors.sessions import SessionHeldError as SessionHeldError
from dspex_persist.state.errors.sessions import SessionMovedError as SessionMovedError
from dspex_persist.state.errors.sessions import SessionNotFoundError as SessionNotFoundError
from dspex_persist.state.errors.sessions import SessionPrunedError as SessionPrunedError
from dspex_persist.state.errors.tools import ExecutionConflictError as ExecutionConflictError
from dspex_persist.state.errors.tools import ExecutionEndedError as ExecutionEndedError
from dspex_persist.state.errors.tools import ExecutionNotFoundError as ExecutionNotFoundError
from dspex_persist.state.errors.tools import MissingVariablesError as MissingVariablesError
from dspex_persist.state.errors.tools import RemoteToolError as RemoteToolError
from dspex_persist.state.errors.tools import SessionBusyError as SessionBusyError
from dspex_persist.state.errors.tools import ToolArgumentError as ToolArgumentError
from dspex_persist.state.errors.tools import ToolExistsError as ToolExistsError
from dspex_persist.state.errors.tools import ToolFailedError as ToolFailedError
from dspex_persist.state.errors.tools import ToolInterruptedError as ToolInterruptedError
from dspex_persist.state.errors.tools import ToolNotFoundError as ToolNotFoundError
from dspex_persist.state.errors.tools import ToolTimedOutError as ToolTimedOutError
from dspex_persist.state.errors.tools import TransactionEndedError as TransactionEndedError
from dspex_persist.state.errors.variables import DependencyCycleError as DependencyCycleError
from dspex_persist.state.errors.variables import InvalidConstraintsError as InvalidConstraintsError
from dspex_persist.state.errors.variables import InvalidValueError as InvalidValueError
from dspex_persist.state.errors.variables import NotOptimizingError as NotOptimizingError
from dspex_persist.state.errors.variables import TooManyWatchersError as TooManyWatchersError
from dspex_persist.state.errors.variables import UnknownTypeError as UnknownTypeError
from dspex_persist.state.errors.variables import VariableExistsError as VariableExistsError
from dspex_persist.state.errors.variables import VariableLockedError as VariableLockedError
from dspex_persist.state.errors.variables import VariableNotFoundError as VariableNotFoundError
from dspex_persist.state.errors.variables import VariableReplacedError as VariableReplacedError
from dspex_persist.state.errors.variables import VersionConflictError as VersionConflictError
from dspex_persist.state.errors.variables import VersionNotFoundError as VersionNotFoundError
from dspex_persist.state.errors.variables import VersionPrunedError as VersionPrunedError
from dspex_persist.state.errors.variables import WatchGapError as WatchGapError
from dspex_persist.state.errors.variables import WatchStalledError as WatchStalledError
