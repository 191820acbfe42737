"""A session in which something happens: an optimization with failures, conflicts, tools called by tools, a rollback.

    python -m tests.end_to_end.story sessions.db 0.1

writes one at a pace that looks well on pictures.
"""

import sys
import time
from pathlib import Path
from typing import Any

import dspex_persist
from dspex_persist import ToolContext, tool
from dspex_persist.state.denials import Refused
from tests.asked import AT, entry

SESSION = "tune-checkout"
OTHER_SESSION = "a-quiet-one"
SECRET = "sk-very-secret"
HOSTILE = "<script>document.title = 'taken over'</script>"
PROMPTS = (
    "Classify the ticket.",
    "Classify the ticket by urgency.\nAnswer with one word.",
    "Classify the support ticket by urgency.\nAnswer with one word: low, normal or high.",
)
TICKETS = (
    "The checkout is down for all customers in Norway!",
    "Could you send me last month's invoice again? No hurry.",
    "I was charged twice, and the second charge is not mine.",
)


class Story:
    """The tools, and what they share: the provider, through which others write while they run."""

    def __init__(self, pace_s: float = 0.0) -> None:
        self.pace_s = pace_s
        self.provider: Any = None

    def rest(self, beats: float = 1) -> None:
        """Take time, so that there is some to be seen."""
        if self.pace_s:
            time.sleep(self.pace_s * beats)

    @tool
    def evaluate(self, ctx: ToolContext, step: int) -> float:
        """Score the prompt at the temperature."""
        self.rest(2)
        score = round(0.9 - (ctx["temperature"] - 0.35) ** 2 + 0.02 * len(ctx["prompt"].split()) / 10, 4)
        ctx._session.record("lm", self.judged(step, ctx["prompt"], score))
        if step == 5:
            raise TimeoutError("the judge did not answer")
        ctx["score"] = score
        ctx.log("scored", step=step, score=score)
        return score

    @staticmethod
    def judged(step: int, prompt: str, score: float) -> dict[str, Any]:
        """What the journal has of the call of a model that scores; its prompt quotes a secret."""
        system = f"You are given a prompt, and a ticket. Score the prompt from 0 to 1.\n\nThe prompt:\n{prompt}"
        question = f"[[ ## ticket ## ]]\n{TICKETS[step % len(TICKETS)]}\n{HOSTILE}\nkey: {SECRET}"
        counts = {"prompt_tokens": 180 + 9 * step, "completion_tokens": 12, "total_tokens": 192 + 9 * step}
        outcome: dict[str, Any] = {
            "response": {"outputs": [f"[[ ## score ## ]]\n{score}"], "usage": {"openai/gpt-4o-mini": counts}}
        }
        if step == 5:
            message = "the model did not answer within 30 s"
            outcome = {"response": None, "error": {"type": "dspy.utils.exceptions.LMTimeoutError", "message": message}}
        if step == 6:
            outcome |= {"cached": True, "cost": 0.0, "latency_us": 310}
            outcome["response"]["usage"] = {}
        facts: dict[str, Any] = {
            "variables": {"temperature": step, "prompt": step // 4},
            "predictor": "judge.predict",
            "at": AT + step * 60_000_000,
            "latency_us": 640_000 + 83_000 * step,
            "cost": round(0.0000272 + 0.0000014 * step, 7),
        }
        return entry(0, question, system=system, **facts | outcome)

    @tool
    def improve(self, ctx: ToolContext, step: int) -> dict[str, Any]:
        """One step: propose a temperature, have it evaluated, keep it if it is better."""
        tried = round(max(0.05, ctx["temperature"] - 0.12 + 0.05 * ctx.random.random()), 3)
        ctx.publish("progress", step)
        self.rest()
        before, ctx["temperature"] = ctx["score"], tried
        if step % 4 == 2:
            ctx["prompt"] = PROMPTS[min(step // 4 + 1, len(PROMPTS) - 1)]
        score = ctx.call(self.evaluate, step=step)
        self.rest()
        ctx["steps"] += 1
        return {"temperature": tried, "better": score > before}

    @tool(retries=2)
    def tidy(self, ctx: ToolContext) -> int:
        """Read a variable that another caller changes meanwhile, at the first attempt."""
        steps = ctx["steps"]
        self.rest()
        if ctx.attempt == 1:
            self.provider.set_variable(SESSION, "steps", steps + 10)
        ctx["notes"] = [*ctx["notes"], f"tidied after {steps} steps"]
        return int(ctx["steps"])


def toolbox_of(story: Story) -> dspex_persist.Toolbox:
    """Its tools."""
    toolbox = dspex_persist.Toolbox()
    for each in (story.evaluate, story.improve, story.tidy):
        toolbox.add(each)
    return toolbox


def tell(path: Path, pace_s: float = 0.0) -> None:
    """Write it to a file."""
    story = Story(pace_s)
    with dspex_persist.connect(path, tools=toolbox_of(story)) as story.provider:
        context = dspex_persist.Context(SESSION, story.provider, metadata={"team": "support"})
        variables = context
        variables.define("temperature", 0.9, constraints={"min": 0, "max": 2})
        variables.define("score", 0.0)
        variables.define("steps", 0)
        variables.define("progress", 0)
        variables.define("prompt", PROMPTS[0])
        variables.define("notes", ["begun"])
        variables.define("footer", HOSTILE)
        variables.define("api_key", SECRET, metadata={"sensitive": "true"})
        variables.define("draft", True)
        for step in range(8):
            story.provider.execute_tool(SESSION, "improve", {"step": step}, metadata={"request": f"r-{step}"})
            story.rest()
        del variables["draft"]
        story.provider.execute_tool(SESSION, "tidy", {})
        story.rest(3)
        variables.rollback("temperature", 2)
        variables["api_key"] = f"{SECRET}-2"
        other = dspex_persist.Context(OTHER_SESSION, story.provider)
        other.define("x", 1)
        other.rule("positive", "x > 0", "it counts")
        story.provider.engine.denials.note(
            Refused("reports", "unix", "snakepit.bridge.BridgeService.Ping", "", "it all")
        )


if __name__ == "__main__":
    tell(Path(sys.argv[1]), float(sys.argv[2]))
