"""DSPy programs on sessions. Importing this imports DSPy, which takes seconds."""

from dspex_persist.cognitive.dspy import (
    LmDivergence,
    Playback,
    RecordedLmError,
    Recording,
    UnexpectedLmCallError,
    UnseenLmCallError,
    bind,
    bindings,
    playing,
    recorded_calls,
    unbind,
)
from dspex_persist.cognitive.dspy.binding import BoundOption
from dspex_persist.cognitive.dspy.carrying import TypeChange
from dspex_persist.cognitive.dspy.module_types import VariableModule
from dspex_persist.cognitive.dspy.program_loading import LoadReport
from dspex_persist.cognitive.dspy.programs import Programs
from dspex_persist.cognitive.dspy.resolver import ModuleVariableResolver
from dspex_persist.cognitive.dspy.variable_aware import (
    VariableAware,
    VariableAwareChainOfThought,
    VariableAwarePredict,
    VariableAwareProgramOfThought,
    VariableAwareReAct,
    create_variable_aware_program,
    sync_dspy_parameters,
)
from dspex_persist.cognitive.program_tools import program_tool
from dspex_persist.cognitive.programs.catalog import ProgramHistory, ProgramInfo, ProgramVersion
from dspex_persist.cognitive.programs.diff import PredictorDiff, ProgramDiff
from dspex_persist.cognitive.programs.errors import (
    DamagedProgramError,
    ProgramError,
    ProgramMismatchError,
    ProgramNotFoundError,
    ProgramNotSavedError,
)

__all__ = [
    "BoundOption",
    "DamagedProgramError",
    "LmDivergence",
    "LoadReport",
    "ModuleVariableResolver",
    "Playback",
    "PredictorDiff",
    "ProgramDiff",
    "ProgramError",
    "ProgramHistory",
    "ProgramInfo",
    "ProgramMismatchError",
    "ProgramNotFoundError",
    "ProgramNotSavedError",
    "ProgramVersion",
    "Programs",
    "RecordedLmError",
    "Recording",
    "TypeChange",
    "UnexpectedLmCallError",
    "UnseenLmCallError",
    "VariableAware",
    "VariableAwareChainOfThought",
    "VariableAwarePredict",
    "VariableAwareProgramOfThought",
    "VariableAwareReAct",
    "VariableModule",
    "bind",
    "bindings",
    "create_variable_aware_program",
    "playing",
    "program_tool",
    "recorded_calls",
    "sync_dspy_parameters",
    "unbind",
]
