"""Word problems, of a file or made by reasoning-gym."""

import importlib
import json
import os
import sys
import types
from importlib.util import find_spec

import datasets

EXAMPLES = 5


def splits(problems):
    parts = {"test": problems[:-EXAMPLES], "examples": problems[-EXAMPLES:]}
    return {name: datasets.Dataset.from_list(part) for name, part in parts.items()}


def from_file(file=None, **_):
    problems = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                problem = json.loads(line)
                problems.append({"question": problem["question"], "answer": problem["answer"]})
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{file}: line {number} has no question and answer in JSON") from None
    if len(problems) <= EXAMPLES:
        raise ValueError(f"{file}: {len(problems)} problems; {EXAMPLES} are the examples")
    return splits(problems)


def reasoning_gym():
    """Its gsm_symbolic. `import reasoning_gym` would want eleven packages, one of them compiled, for its other tasks; these
    templates want none of them, so the packages above are stood in for and the registry does nothing."""
    root = os.path.dirname(find_spec("reasoning_gym").origin)
    for name in ("reasoning_gym", "reasoning_gym.arithmetic"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split(".")[1:])]
        sys.modules[name] = package
    factory = types.ModuleType("reasoning_gym.factory")
    factory.ProceduralDataset = importlib.import_module("reasoning_gym.dataset").ProceduralDataset
    factory.register_dataset = lambda *_, **__: None
    sys.modules["reasoning_gym.factory"] = factory
    return importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")


def symbolic(seed=42, size=500, **_):
    gym = reasoning_gym()
    made = gym.GSMSymbolicDataset(gym.GSMSymbolicDatasetConfig(seed=seed, size=size + EXAMPLES))
    return splits([{"question": problem["question"], "answer": problem["metadata"]["answer_cot"]}
                   for problem in (made[i] for i in range(size + EXAMPLES))])
