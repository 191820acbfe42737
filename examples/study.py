"""A study over the variables of a session, which goes on where it was when it is killed and run again.

    python examples/study.py                 # in memory
    python examples/study.py study.db        # on a file: end it with Ctrl-C, or kill it, and run it again

It needs the extra [optuna].
"""

import sys
import time

import optuna

from dspex_persist import Context
from dspex_persist.optuna import Study, Trial

TRIALS = 40


def quality(trial: Trial) -> float:
    """Stand in for a program that is run with these values, and measured. It gets better with each of ten steps."""
    distance = abs(trial["temperature"] - 0.3) + abs(trial["examples"] - 4) / 8 + (trial["style"] != "plain")
    score = 0.0
    for step in range(10):
        time.sleep(0.002)
        score = 1 - distance / (step + 1)
        trial.report(score, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return score


def main(path: str) -> None:
    """Run what is missing of a study, and apply the best trial."""
    with Context("tuned", path) as ctx:
        ctx.define("temperature", 1.0, constraints={"min": 0, "max": 2})
        ctx.define("examples", 0, constraints={"min": 0, "max": 8})
        ctx.define("style", "lively", type_name="choice", constraints={"choices": ["plain", "lively"]})

        with Study(ctx, ["temperature", "examples", "style"], direction="maximize", requeue=True) as study:
            before = study.trials
            if not before:
                # Begin with what there is now.
                study.enqueue()
            print(f"{len(before)} trials before")
            study.optimize(quality, n_trials=TRIALS, in_all=True)
            study.apply_best()

        states = [each.state.name for each in study.trials if not each.interrupted]
        print(f"{len(states)} trials: {', '.join(f'{states.count(each)} {each}' for each in sorted(set(states)))}")
        print(f"style: {ctx['style']}")
        print(ctx.history("style")[0].reason)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "memory:")
