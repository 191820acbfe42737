"""Studies with Optuna over the variables of a session: see docs/studies.md. The only package that imports Optuna."""

from dspex_persist.extras import how_to_install

try:
    import optuna as _optuna  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "optuna":
        raise
    raise ModuleNotFoundError(
        f"this needs Optuna, which is not installed: {how_to_install('optuna')}", name="optuna"
    ) from None

from dspex_persist.optuna.space import ConfigurationSpace
from dspex_persist.optuna.study import Study
from dspex_persist.optuna.trials import Trial, TrialRecord

__all__ = ["ConfigurationSpace", "Study", "Trial", "TrialRecord"]
