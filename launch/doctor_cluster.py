"""The nodes of a Ray cluster: their facts, their clocks, and every pair of them."""

import os
import socket
import time
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.errors import PreflightError
from launch.doctor_checks import Finding
from launch.doctor_node import NodeFacts, gather
from launch.doctor_pairs import DEADLINE_S, REMEDY, all_reduce, judged, rounds
from launch.joined import join

ANSWER_S = 120.0  # for a worker process to start on every node


def connect() -> None:
    """Join the cluster of RAY_ADDRESS. Raises PreflightError."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise PreflightError("--nodes all asks a Ray cluster, and RAY_ADDRESS names none; set it, or leave --nodes out")
    join(address)


def ask() -> tuple[list[NodeFacts], dict[str, tuple[float, float]], list[Finding]]:
    """Facts of every node, offsets of their clocks as doctor_checks.clocks reads them, and a line for who is silent."""
    remote = ray.remote(num_cpus=0)(gather)
    facts: list[NodeFacts] = []
    offsets: dict[str, tuple[float, float]] = {}
    silent: list[Finding] = []
    nodes = _nodes()
    refs = {name: remote.options(scheduling_strategy=_on(node)).remote() for name, node in nodes.items()}
    for name, ref in refs.items():
        try:
            found = ray.get(ref, timeout=ANSWER_S)
            offset = _offset(nodes[name])
        except Exception as error:  # whatever ails a node, the others are still worth asking
            said = f"{name} does not answer: {_first_line(error)}"
            silent.append(Finding("nodes", "fail", said, "see its raylet's log, and start its Ray again"))
            continue
        facts.append(replace(found, name=name))
        offsets[name] = offset
    if not silent:
        silent = [Finding("nodes", "pass", f"{len(facts)} answer: {', '.join(fact.name for fact in facts)}")]
    return facts, offsets, silent


def pairs(facts: list[NodeFacts]) -> list[Finding]:
    """An all-reduce between every two nodes, as many at once as share nobody."""
    gpus = {fact.name: len(fact.gpus) for fact in facts}
    findings = []
    for together in rounds(sorted(gpus)):
        running = {pair: _start(*pair, on_gpus=all(gpus[name] for name in pair)) for pair in together}
        findings += [_result(pair, refs, on_gpus=all(gpus[name] for name in pair)) for pair, refs in running.items()]
    return findings


def _start(one: str, other: str, *, on_gpus: bool) -> list[Any]:
    """The two ranks of a pair, under way."""
    nodes = _nodes()
    meet = ray.remote(num_cpus=0)(_address).options(scheduling_strategy=_on(nodes[one])).remote()
    device = "cuda:0" if on_gpus else "cpu"  # Ray shows a task the GPU it was given as the first
    # a process each: a group that hangs must not outlive its pair
    task = ray.remote(num_cpus=0, num_gpus=1 if on_gpus else 0, max_calls=1, max_retries=0)(all_reduce)
    return [
        task.options(scheduling_strategy=_on(nodes[name])).remote(rank, meet, device, DEADLINE_S)
        for rank, name in enumerate((one, other))
    ]


def _result(pair: tuple[str, str], refs: list[Any], *, on_gpus: bool) -> Finding:
    name = " and ".join(pair)
    try:
        times = ray.get(refs, timeout=DEADLINE_S + ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        for ref in refs:
            ray.cancel(ref, force=True)
        busy = " (all its GPUs may be taken)" if on_gpus else ""
        return Finding("all-reduce", "fail", f"{name}: no answer within {DEADLINE_S + ANSWER_S:.0f} s{busy}", REMEDY)
    except Exception as error:  # torch's and Ray's alike: the report carries it
        for ref in refs:
            ray.cancel(ref, force=True)
        return Finding("all-reduce", "fail", f"{name}: {_first_line(error)}", REMEDY)
    return judged(name, max(times), "nccl" if on_gpus else "gloo")


def _nodes() -> dict[str, dict[str, Any]]:
    """Ray's live nodes by host name; where several share a host, with part of Ray's own id."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in alive]
    return {
        host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:6]}": node
        for host, node in zip(hosts, alive, strict=True)
    }


def _on(node: dict[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _address() -> tuple[str, int]:
    """This node's address and a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _offset(node: dict[str, Any]) -> tuple[float, float]:
    """A node's clock less this one's, after and before it was asked."""
    clock = ray.remote(num_cpus=0)(_clock)
    before = time.time()
    reading = ray.get(clock.options(scheduling_strategy=_on(node)).remote(), timeout=ANSWER_S)
    return reading - time.time(), reading - before


def _clock() -> float:
    return time.time()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
