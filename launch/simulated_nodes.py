"""Simulated Ray nodes: a script, given the CPUs of each, the head first; prints the address, ends with stdin."""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    head, *others = map(int, sys.argv[1:])
    store = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=store | {"num_cpus": head, "include_dashboard": False})
    for num_cpus in others:
        cluster.add_node(num_cpus=num_cpus, **store)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
