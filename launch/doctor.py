"""`paceline doctor`: whether this machine, or every node of a cluster, can run what a recipe asks for."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from configs.errors import PreflightError

if TYPE_CHECKING:
    from configs.schema import Config
    from launch.doctor_checks import Finding

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A recipe: its model and sizes too.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    nodes: Annotated[
        Literal["this", "all"], typer.Option(help="all: every node of the Ray cluster that RAY_ADDRESS names.")
    ] = "this",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check machines, model, sandbox and security before a run. Exits with 3 when a check fails."""
    from configs.load import load
    from launch.logs import check_kernels, quiet_libraries

    parsed = load(Path(config), overrides or []) if config is not None else None
    check_kernels()
    quiet_libraries()
    found = list(findings(parsed, every_node=nodes == "all"))
    if as_json:
        passed = all(finding.level != "fail" for finding in found)
        print(json.dumps({"passed": passed, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        show(found)
    failed = [finding for finding in found if finding.level == "fail"]
    if failed:
        names = ", ".join(dict.fromkeys(finding.check for finding in failed))
        raise PreflightError(f"{len(failed)} of {len(found)} checks failed: {names}; the remedies stand beside them")


def findings(config: "Config | None", *, every_node: bool) -> "Iterator[Finding]":
    """Every check, in the order in which a user would want to hear of them."""
    from launch import doctor_checks as checks

    run_dir = config.run.dir if config is not None and config.run.dir else "runs"
    if every_node:
        from launch import doctor_cluster

        doctor_cluster.connect()
        nodes, offsets, answers = doctor_cluster.ask()
        yield from answers
        if not nodes:
            return
    else:
        from launch.doctor_node import gather

        nodes, offsets = [gather()], {}
    yield from checks.versions(nodes)
    yield from checks.drivers(nodes)
    yield from checks.shared_memory(nodes)
    yield from checks.open_files(nodes)
    yield from checks.bytecode(nodes)
    yield from checks.clocks(offsets)
    yield from checks.security(nodes, address=os.environ.get("RAY_ADDRESS", ""))
    yield checks.reachable()
    if config is not None and config.monitor.port:
        yield checks.port("monitor.port", config.monitor.port)
    if every_node and len(nodes) > 1:
        yield from doctor_cluster.pairs(nodes)
    else:
        from launch.doctor_pairs import local_pairs

        yield from local_pairs(len(nodes[0].gpus))
    yield _sandbox(config)
    if config is not None:
        yield from _of_config(config, run_dir)


def show(found: "list[Finding]") -> None:
    """A table on a terminal; elsewhere a line a finding."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for finding in found:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.level}  {finding.check}: {finding.said}{remedy}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "check", "found", "remedy"):
        table.add_column(name, overflow="fold")
    for finding in found:
        level = Text(finding.level, style=COLOURS[finding.level])
        table.add_row(level, finding.check, Text(finding.said), Text(finding.remedy))  # brackets are no markup here
    console.print(table)


def _sandbox(config: "Config | None") -> "Finding":
    """One confined call for real; without a recipe that runs programs it is no more than good to know."""
    from dataclasses import replace

    from launch.doctor_checks import Finding, attempt
    from rl.cell import check_sandbox

    kind = config.reward.sandbox if config is not None else "auto"
    if kind == "none":
        remedy = "set reward.sandbox=auto"
        return Finding("sandbox", "warn", "reward.sandbox=none: model-written programs run unconfined", remedy)
    found = attempt("sandbox", lambda: ": ".join(check_sandbox(kind)))
    needed = config is not None and "code" in config.reward.functions
    return replace(found, level="warn") if found.level == "fail" and not needed else found


def _of_config(config: "Config", run_dir: str) -> "Iterator[Finding]":
    """The recipe's model, what sparse attention reads beside it, and room for its checkpoints."""
    from launch import doctor_checks as checks

    found, folder = checks.model(config)
    yield from found
    if folder is None:
        return
    import shutil

    from launch.doctor_node import existing
    from launch.shares import count_parameters
    from rollout.model import load_config, require_groups, resolve_compute
    from rollout.selectors import require_sparse

    sizes: list[tuple[int, str]] = []

    def device() -> str:
        kind, dtype = resolve_compute(config.compute)
        model_config = load_config(folder)
        sizes.append((count_parameters(model_config), dtype))
        require_groups(model_config, device=kind, dtype=dtype)
        return f"{sizes[0][0]:,} parameters, {kind} in {dtype}"

    def sparse() -> str:
        require_sparse(config.sparse, load_config(folder))
        return f"sparse.mode={config.sparse.mode} has all that it reads"

    yield checks.attempt("device", device)
    if config.sparse.mode != "off":
        yield checks.attempt("sparse attention", sparse)
    for parameters, dtype in sizes:
        free, keep = shutil.disk_usage(existing(Path(run_dir))).free, config.checkpoint.keep
        yield checks.disk(free, parameters=parameters, dtype=dtype, keep=keep, run_dir=run_dir)
