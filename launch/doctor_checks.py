"""What doctor finds: each check is a function of plain facts that says pass, warn or fail, with a remedy."""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.errors import PacelineError
from launch.doctor_node import PACKAGES, NodeFacts

if TYPE_CHECKING:
    from configs.schema import Config

GIB = 1 << 30
SHM_SHARE = 0.3  # of memory: what Ray's object store takes; with less it moves to disk
SHM_LEAST = GIB
FILES_LEAST, FILES_GOOD = 4096, 65536
CONNECT_S = 5.0
SKEW_WARN_S, SKEW_FAIL_S = 0.5, 10.0
ADAM_BYTES = 12  # a parameter in a checkpoint: float32 weight and two moments


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    level: Literal["pass", "warn", "fail"]
    said: str
    remedy: str = ""


def versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """What every node must have, and have alike; drivers may differ, at a risk."""
    rows: dict[str, dict[str, str | None]] = {"python": {node.name: node.python for node in nodes}}
    rows |= {package: {node.name: node.packages[package] for node in nodes} for package in PACKAGES}
    for name, by_node in rows.items():
        found = set(by_node.values())
        if None in found:
            missing = [node for node, version in by_node.items() if version is None]
            remedy = f"pip install {name} in the environment that runs paceline there"
            yield Finding("versions", "fail", f"{name} is missing on {', '.join(missing)}", remedy)
        elif len(found) > 1:
            yield Finding(
                "versions", "fail", f"{name} differs: {_by_node(by_node)}", "install one version on all nodes"
            )
    if all(len(set(by_node.values())) == 1 and None not in by_node.values() for by_node in rows.values()):
        alike = f"{len(nodes)} nodes alike: " if len(nodes) > 1 else ""
        said = ", ".join(f"{name} {next(iter(by_node.values()))}" for name, by_node in rows.items())
        yield Finding("versions", "pass", alike + said)


def drivers(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """GPUs and their drivers."""
    by_node = {node.name: node.driver for node in nodes}
    kinds = {node.name: ", ".join(sorted(set(node.gpus))) or None for node in nodes}
    if len(set(kinds.values())) > 1:
        yield Finding("gpus", "warn", f"nodes differ: {_by_node(kinds)}", "every step waits for the slowest GPU")
    if len(set(by_node.values())) > 1:
        yield Finding("drivers", "warn", f"drivers differ: {_by_node(by_node)}", "install one driver on all nodes")
    elif None in by_node.values():
        yield Finding("drivers", "pass", "no NVIDIA GPU: this will compute on CPUs")
    else:
        count = sum(len(node.gpus) for node in nodes)
        yield Finding("drivers", "pass", f"{count} GPUs ({next(iter(kinds.values()))}), driver {nodes[0].driver}")


def shared_memory(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """/dev/shm, where Ray keeps its objects and NCCL its buffers."""
    for node in nodes:
        said = f"{node.name}: /dev/shm has {_gib(node.shm_free)} free of {_gib(node.shm_total)}"
        remedy = "mount a larger one: docker --shm-size, or an emptyDir with medium Memory in Kubernetes"
        if node.shm_free < SHM_LEAST:
            yield Finding("shared memory", "fail", said, remedy)
        elif node.shm_total < SHM_SHARE * node.memory:
            yield Finding("shared memory", "warn", f"{said}, under {SHM_SHARE:.0%} of memory", remedy)
        else:
            yield Finding("shared memory", "pass", said)


def open_files(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """File descriptors: every worker of a cluster keeps connections to the others."""
    for node in nodes:
        soft, hard = node.open_files
        said = f"{node.name}: at most {soft} open files (hard limit {hard})"
        remedy = f"ulimit -n {FILES_GOOD}, or LimitNOFILE= of the service that starts it"
        level: Literal["pass", "warn", "fail"] = "pass" if soft >= FILES_GOOD else "warn"
        yield Finding("open files", "fail" if hard < FILES_LEAST else level, said, "" if soft >= FILES_GOOD else remedy)


def bytecode(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """What Python keeps of packages it has compiled: without it imports take 2.5 times the processor's time."""
    for node in nodes:
        if node.uncompiled:
            said = f"{node.name}: every process compiles {', '.join(node.uncompiled)} anew; a run starts many"
            remedy = "unset PYTHONDONTWRITEBYTECODE, and give PYTHONPYCACHEPREFIX a folder that can be written"
            yield Finding("bytecode", "warn", said, remedy)
        else:
            yield Finding("bytecode", "pass", f"{node.name}: compiled packages are kept")


def disk(free: int, *, parameters: int, dtype: str, keep: int, run_dir: str) -> Finding:
    """Room for the checkpoints kept and the one being written beside them."""
    size = parameters * (ADAM_BYTES + (2 if dtype == "bfloat16" else 0))
    needed = size * (keep + 1)
    said = f"{_gib(free)} free for {run_dir}; {keep + 1} checkpoints of {_gib(size)} need {_gib(needed)}"
    if free < needed:
        return Finding("disk", "fail", said, "free some, set another run.dir, or lower checkpoint.keep")
    if free < 2 * needed:
        return Finding("disk", "warn", f"{said}; samples, logs and exports come on top", "free some")
    return Finding("disk", "pass", said)


def clocks(offsets_s: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """By how much each node's clock is off, at least: within what asking took nothing can be said.

    offsets_s: for each node its clock's reading less this machine's, after and before the question.
    """
    for name, (low, high) in offsets_s.items():
        off = max(low, -high, 0.0)
        level: Literal["pass", "warn", "fail"] = "pass"
        if off > SKEW_WARN_S:
            level = "fail" if off > SKEW_FAIL_S else "warn"
        said = f"{name}: off by {off:.1f} s or more" if off else f"{name}: within the {high - low:.2f} s of asking"
        yield Finding("clock", level, said, "" if level == "pass" else "run chrony or ntpd on every node")


def reachable() -> Finding:
    """Whether a port that the system gives out can be reached at this machine's own name, as ranks reach each other."""
    name = socket.gethostname()
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        try:
            with socket.create_connection((name, port), timeout=CONNECT_S):
                return Finding("ports", "pass", f"{name} reaches a port of its own")
        except OSError as error:
            remedy = f"let {name} resolve to this machine's address (/etc/hosts), and its firewall pass its own traffic"
            return Finding("ports", "fail", f"{name}:{port} cannot be reached from itself: {error}", remedy)


def port(key: str, number: int) -> Finding:
    """Whether a port that the recipe names can be had, on loopback."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            remedy = f"end what holds it (ss -ltnp 'sport = {number}'), or set another {key}"
            return Finding("ports", "fail", f"{key}={number} cannot be had ({error.strerror})", remedy)
    return Finding("ports", "pass", f"{key}={number} is free")


def security(nodes: Sequence[NodeFacts], *, address: str) -> Iterator[Finding]:
    """Who else could reach what runs. address: RAY_ADDRESS, "" for a cluster of our own."""
    if not address:
        yield Finding("ray token", "pass", "the run starts a Ray of its own, with a token that nobody else has")
    else:
        for node in nodes:
            if node.ray_auth == "token":
                yield Finding("ray token", "pass", f"{node.name}: Ray asks for its token")
            else:
                remedy = "start Ray with RAY_AUTH_MODE=token, or through paceline launch"
                said = f"{node.name}: RAY_AUTH_MODE={node.ray_auth!r}: whoever reaches Ray runs what they like"
                yield Finding("ray token", "fail", said, remedy)
    for node in nodes:
        open_ports = [one for one in node.listening if not (node.ray_auth == "token" and _is_ray(one))]
        if open_ports:
            shown = "; ".join(open_ports[:5]) + (f"; {len(open_ports) - 5} more" if len(open_ports) > 5 else "")
            remedy = "bind them to 127.0.0.1, or make sure that a firewall stands before them"
            yield Finding("listening", "warn", f"{node.name}: other machines may reach {shown}", remedy)
        else:
            yield Finding("listening", "pass", f"{node.name}: nothing of this user but what asks for a token")


def model(config: "Config") -> tuple[list[Finding], Path | None]:
    """The model's files, its code, its tokenizer and its chat template; and where it lies."""
    from rollout.pretrained import load_tokenizer, resolve

    folder: list[Path] = []

    def files() -> str:
        folder.append(resolve(config.model))
        return f"{config.model}: weights whole in {folder[0]}"

    found = [attempt("model", files)]
    if not folder:
        return found, None
    found.append(attempt("tokenizer", lambda: _templated(load_tokenizer(folder[0]))))
    found.append(_remote_code(folder[0]))
    return found, folder[0]


def attempt(check: str, body: Callable[[], str]) -> Finding:
    """What the body says, or the user error it raises, whose message ends with its remedy."""
    try:
        return Finding(check, "pass", body())
    except PacelineError as error:
        said, _, remedy = str(error).rpartition("; ")
        return Finding(check, "fail", said or remedy, remedy if said else "")


def _templated(tokenizer: object) -> str:
    said = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return f"the chat template makes {len(said['input_ids'])} tokens of a short question"


def _remote_code(folder: Path) -> Finding:
    import json

    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if named:
        said = "the model brings Python of its own, which is never run (trust_remote_code is off everywhere)"
        return Finding("remote code", "warn", said, "use an architecture that transformers has")
    return Finding("remote code", "pass", "trust_remote_code is off, and the model asks for none")


def _is_ray(listening: str) -> bool:
    return listening.startswith(("raylet", "gcs_server", "ray::", "ray "))


def _by_node(values: Mapping[str, str | None]) -> str:
    return ", ".join(f"{node} {value or 'none'}" for node, value in values.items())


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):,.1f} MiB"
