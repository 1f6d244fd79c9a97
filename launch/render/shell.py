"""What the bash of every target begins with: the plan as assignments, and the recipe as a file."""

import shlex
from importlib.resources import files

from launch.render.plan import LaunchPlan


def body(name: str) -> str:
    """A script of this package, which reads the plan from the variables that `assignments` sets."""
    return (files("launch.render") / name).read_text(encoding="utf-8")


def assignments(plan: LaunchPlan) -> str:
    """The plan as bash variables; exported are those alone that programs read."""
    lines = [
        f"run={shlex.quote(str(plan.run_dir))}",
        f"state={shlex.quote(str(plan.state_dir))}",
        f"overrides=({shlex.join(plan.overrides)})",
        *(f"export {name}={shlex.quote(value)}" for name, value in plan.env),
    ]
    return "\n".join([*lines, *([plan.setup] if plan.setup else [])]) + "\n"


def size(plan: LaunchPlan) -> str:
    """The plan's size as bash variables, for scripts that start Ray themselves."""
    return f"nodes={plan.nodes}\ngpus={plan.gpus_per_node}\ncpus={plan.cpus_per_node}\n"


def recipe_file(plan: LaunchPlan) -> str:
    """Bash that writes the recipe to $state/recipe.yaml, to the letter."""
    end = "END_OF_RECIPE"
    while end in plan.recipe.splitlines():
        end += "_"
    return f'mkdir -p "$state"\ncat >"$state/recipe.yaml" <<\'{end}\'\n{plan.recipe}{end}\n'
