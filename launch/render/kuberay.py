"""A KubeRay RayJob: the manifest, and the ConfigMap that brings it the recipe.

The fields are those of KubeRay 1.6 and later: https://docs.ray.io/en/master/kuberay/references/api.html
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from configs.errors import ConfigError
from launch.render.documents import documents
from launch.render.plan import LaunchPlan
from launch.render.shell import assignments, body, recipe_file

MOUNT = PurePosixPath("/paceline")  # where the storage is, in every pod
SCRIPTS = "/etc/paceline"
USER = 1000  # the user of Ray's own images
RETRIES = 3  # a new cluster each, which goes on from the newest checkpoint
START_S = 3600  # for nodes to be found and the image to be pulled
KEEP_S = 600  # after the end, for its logs
SHM_SHARE = 0.3  # of a pod's memory, which /dev/shm is part of; Ray's object store takes as much


@dataclass(frozen=True, slots=True)
class KubeRay:
    """What Kubernetes is asked for beyond the plan."""

    storage: str  # a persistent volume claim; with more than one node, one that many nodes may write
    namespace: str = "default"


def render(plan: LaunchPlan, kube: KubeRay) -> str:
    """The two manifests for `kubectl apply`. Raises ConfigError where something they need was not said."""
    if not plan.image or not kube.storage or not plan.memory_gb:
        raise ConfigError(
            "--on kuberay needs --image (with paceline and Ray), --storage (a persistent volume claim for the run "
            "directory) and --memory-gb (of a node)"
        )
    if not plan.run_dir.is_relative_to(MOUNT):
        raise ConfigError(f"run.dir={plan.run_dir} is not under {MOUNT}, where --storage {kube.storage} is mounted")
    labels = {"app.kubernetes.io/name": "paceline", "app.kubernetes.io/instance": plan.name}
    script = "\n".join(["#!/usr/bin/env bash", "set -euo pipefail", assignments(plan), recipe_file(plan)])
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{plan.name}-recipe", "namespace": kube.namespace, "labels": labels},
        "data": {"run.sh": f"{script}\n{body('train.sh')}"},
    }
    cluster: dict[str, Any] = {
        "rayVersion": plan.ray_version,
        "authOptions": {"mode": "token"},  # the operator makes the token, a Secret, and gives it to every pod
        # one of the nodes: it computes as the others do
        "headGroupSpec": {
            "rayStartParams": {},
            "template": {"metadata": {"labels": labels}, "spec": _pod(plan, kube, "ray-head", scripts=True)},
        },
    }
    if plan.nodes > 1:
        others = plan.nodes - 1
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": others,
                "minReplicas": others,
                "maxReplicas": others,
                "rayStartParams": {},
                "template": {"metadata": {"labels": labels}, "spec": _pod(plan, kube, "ray-worker", scripts=False)},
            }
        ]
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": plan.name, "namespace": kube.namespace, "labels": labels},
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": f"bash {SCRIPTS}/run.sh",
            "runtimeEnvYAML": documents({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}),
            "backoffLimit": RETRIES,
            "preRunningDeadlineSeconds": START_S,
            **({"activeDeadlineSeconds": plan.time_s} if plan.time_s else {}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_S,
            "submitterPodTemplate": {"spec": _submitter(plan)},
            "rayClusterSpec": cluster,
        },
    }
    return documents(
        config_map,
        job,
        comments=[
            f"Submit with: kubectl apply -f FILE; needs the claim {kube.storage} in namespace {kube.namespace}"
            + (", writable by many nodes" if plan.nodes > 1 else ""),
            "Needs KubeRay 1.6 or later (preRunningDeadlineSeconds; authOptions came with 1.5.1).",
        ],
    )


def _pod(plan: LaunchPlan, kube: KubeRay, name: str, *, scripts: bool) -> dict[str, Any]:
    """One node of the cluster. Pod security: passes the standard that Kubernetes calls restricted."""
    assert plan.memory_gb is not None
    resources: dict[str, Any] = {"cpu": str(plan.cpus_per_node), "memory": f"{plan.memory_gb}Gi"}
    if plan.gpus_per_node:
        resources["nvidia.com/gpu"] = str(plan.gpus_per_node)
    volumes: dict[str, Any] = {
        "shm": {"emptyDir": {"medium": "Memory", "sizeLimit": f"{max(int(plan.memory_gb * SHM_SHARE), 1)}Gi"}},
        "storage": {"persistentVolumeClaim": {"claimName": kube.storage}},
    }
    mounts = {"shm": "/dev/shm", "storage": str(MOUNT)}
    if scripts:
        volumes["scripts"] = {"configMap": {"name": f"{plan.name}-recipe"}}
        mounts["scripts"] = SCRIPTS
    return {
        "automountServiceAccountToken": False,
        "securityContext": _POD_SECURITY | {"fsGroup": USER},
        "containers": [
            {
                "name": name,
                "image": plan.image,
                "env": [{"name": key, "value": value} for key, value in plan.env],
                "securityContext": _CONTAINER_SECURITY,
                # asked for and limited alike: a node that is overcommitted kills the pod that trains
                "resources": {"requests": resources, "limits": resources},
                "volumeMounts": [{"name": key, "mountPath": path} for key, path in mounts.items()],
            }
        ],
        "volumes": [{"name": key} | source for key, source in volumes.items()],
    }


def _submitter(plan: LaunchPlan) -> dict[str, Any]:
    """The pod that hands the job to the head and shows its log."""
    small = {"cpu": "500m", "memory": "1Gi"}
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _POD_SECURITY,
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": plan.image,
                "securityContext": _CONTAINER_SECURITY,
                "resources": {"requests": small, "limits": small},
            }
        ],
    }


_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": USER, "seccompProfile": {"type": "RuntimeDefault"}}
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "privileged": False, "capabilities": {"drop": ["ALL"]}}
