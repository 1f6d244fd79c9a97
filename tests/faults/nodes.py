"""Simulated Ray nodes: a head without CPUs, and three of one CPU each: a script that prints the head's address and ends
with stdin."""

import sys

from ray.cluster_utils import Cluster

OF_WORKERS = 3


def main() -> None:
    store = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=store | {"num_cpus": 0, "include_dashboard": False})
    for _ in range(OF_WORKERS):
        cluster.add_node(num_cpus=1, **store)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
