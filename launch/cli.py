"""The `paceline` command. Commands import what is heavy themselves, so that help and typos cost no wait."""

import gc
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from configs import faults
from configs.errors import ConfigError
from launch import bench, doctor, drafter, gate, launching, look
from launch.exits import recorded, run_command, stoppable
from launch.monitor.command import monitor
from launch.monitor.sinks import require_sinks
from launch.room import num_workers, require_room

if TYPE_CHECKING:
    from configs.schema import Config
    from launch.plan import Plan
    from rl.rundir import RunDir

app = typer.Typer(
    help="Reinforcement learning for reasoning language models, with speculative rollouts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set, as train.steps=20.")]
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="A .yaml file, or the name of a shipped recipe.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


# What a process must have when it starts. Hashes: some of reasoning-gym's generators iterate over sets of strings, and
# a resumed run must meet the same order. OpenMP: threads that spin at barriers are 10 to 20 times slower as soon as
# anything else runs on the machine, and no faster when nothing does.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"}


def main() -> None:
    """Run the command line and exit with a code of DESIGN.md."""
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)
    arguments = sys.argv[1:] or ["--help"]
    code = run_command(lambda: app(arguments, standalone_mode=False))
    gc.freeze()  # or the interpreter searches all that Ray and DeepSpeed have made for cycles, a second, as it ends
    sys.exit(code)


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A .yaml file, or a shipped recipe.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run instead.")] = None,
) -> None:
    """Train a policy."""
    from configs.load import parse, read_recipe

    given = list(overrides or [])
    if config is not None and resume is not None and "=" in config:
        given, config = [config, *given], None  # CONFIG may be left out when resuming
    if resume is not None:
        _resume(resume, config, given)
        return
    if config is None or "=" in config:
        raise ConfigError("train needs a CONFIG before any a.b=c, as in `paceline train configs/smoke.yaml`")
    text = read_recipe(Path(config))
    parsed = parse(text, given, origin=config)
    require_sinks(parsed.monitor.sinks)
    plan = _plan(parsed)  # a model that is not there is found out before anything is written
    require_room(parsed, device=plan.device)

    from rl.rundir import RunDir

    with RunDir.create(parsed, text) as run:
        _train(parsed, plan, run, resumed=False)


@app.command()
def resume(run: Run, overrides: Overrides = None) -> None:
    """Go on with a run from its newest intact checkpoint."""
    _resume(run, None, list(overrides or []))


@app.command()
def plan(
    config: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[
        str | None, typer.Option("--simulate-nodes", metavar="N,...", help="Simulate a step on so many such nodes.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="The run whose lengths and times that starts from.")
    ] = None,
) -> None:
    """Show every derived size, the placement and a memory estimate, without starting anything."""
    from configs.load import load

    parsed = load(Path(config), overrides or [])
    if (nodes is None) != (measured is None):
        raise ConfigError("--simulate-nodes N,... and --from RUN go together, as in --simulate-nodes 1,2,4 --from RUN")
    if nodes is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", nodes):
        raise ConfigError(f"--simulate-nodes {nodes}: give numbers of nodes, as in 1,2,4,8")
    derived = _plan(parsed)

    from launch.plan import table

    console = Console()
    console.print(table(derived))
    for warning in derived.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if nodes is not None and measured is not None:
        from launch import simulate

        simulate.require_alike(parsed, measured)
        console.print(simulate.table(simulate.read_run(measured), parsed, [int(each) for each in nodes.split(",")]))


@app.command()
def export(
    run: Run,
    policy: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Folder to write the policy to, for transformers to load.")
    ] = None,
    drafter_out: Annotated[
        Path | None,
        typer.Option("--drafter", metavar="OUT", help="Folder to write the drafter to, for vLLM and SGLang to load."),
    ] = None,
    layout: Annotated[
        Literal["eagle3", "speculators"], typer.Option("--format", help="The drafter's: SGLang reads eagle3 alone.")
    ] = "eagle3",
) -> None:
    """Write the trained policy as a folder that transformers loads, its drafter as one that servers load."""
    from rl.rundir import require_run

    require_run(run)
    if policy is None and drafter_out is None:
        raise ConfigError("say what to export: --policy OUT, --drafter OUT, or both")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving a model imports DeepSpeed, which would look for one aloud
    _prepare()
    from launch.logs import disable_progress_bars

    disable_progress_bars()
    from rl.export_drafter import check_exports

    check_exports(run, policy=policy, drafter=drafter_out)
    if policy is not None:
        from rl.export import export_policy

        export_policy(run, policy)
        print(f"wrote {policy}")
    if drafter_out is not None:
        from rl.export_drafter import export_drafter

        version = export_drafter(run, drafter_out, layout=layout, policy=policy)
        print(f"wrote {drafter_out}" + (f"; vLLM {version} loads it" if version else ""))


@app.command()
def status(run: Run) -> None:
    """Say where a run is, whether or not it is still going."""
    from launch.status import describe
    from rl.rundir import read_status

    Console().print(describe(read_status(run), run), highlight=False)


def _resume(path: Path, recipe: str | None, overrides: list[str]) -> None:
    from configs.load import load
    from launch.crash import post_mortem
    from rl.rundir import RunDir, read_status

    before = read_status(path)
    config = load(Path(recipe) if recipe else path / "config" / "resolved.yaml", overrides)
    require_sinks(config.monitor.sinks)
    plan = _plan(config)
    require_room(config, device=plan.device)
    with RunDir.open(path) as run:
        post_mortem(run, before)
        _train(config, plan, run, resumed=True)


def _train(config: "Config", plan: "Plan", run: "RunDir", *, resumed: bool) -> None:
    """Train in a run directory; logs, display and exit record around it."""
    from dataclasses import asdict

    from launch.crash import Phases
    from launch.logs import log_run
    from launch.monitor.beside import watched
    from launch.monitor.terminal import make_progress

    progress = make_progress(config.train.steps)
    phases = Phases(progress)
    beside = watched(run.path, config.monitor, log=run.logs / "monitor.log")
    with beside, recorded(run, phases), stoppable():
        run.write_plan(asdict(plan))
        try:
            log_run(run.logs / "run.log", show=progress.message)
            progress.message(f"run directory {run.path}")
            for warning in plan.warnings:
                progress.message(f"warning: {warning}")

            from launch.cluster import train_run

            train_run(config, run, resume=resumed, progress=phases)
        finally:
            progress.close()
    print(f"done; `paceline export {run.path} --policy OUT` writes the policy")


def _plan(config: "Config") -> "Plan":
    """Find the model and derive the plan. Raises PreflightError."""
    _prepare()
    faults.require_processes(num_workers(config) if config.compute.backend == "ray" else 0)
    from launch.plan import derive
    from rollout.model import load_config
    from rollout.pretrained import resolve

    return derive(config, load_config(resolve(config.model)))


def _prepare() -> None:
    """What comes before the first heavy import."""
    faults.arm()
    from launch.logs import check_kernels, quiet_libraries

    check_kernels()
    quiet_libraries()


app.command()(monitor)
app.command()(launching.launch)
app.command()(doctor.doctor)
look.add_commands(app)
app.add_typer(bench.app, name="bench")
app.add_typer(drafter.app, name="drafter")
app.add_typer(gate.app, name="gate")


if __name__ == "__main__":
    main()
