"""A small Ray cluster in a process of its own, for the tests: it ends with that process."""

import os
import time

from parablock.cluster.joining import ENVIRONMENT


def main() -> None:
    os.environ.update(ENVIRONMENT)
    import ray

    context = ray.init(
        "local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", _node_ip_address="127.0.0.1",
    )  # fmt: skip
    print(f"address {context.address_info['gcs_address']}", flush=True)
    while True:
        time.sleep(3600)
