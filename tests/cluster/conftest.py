"""A real cluster of Ray on this machine: every node is processes of its own."""

import contextlib
import hashlib

import psutil
import pytest


class Nodes:
    """Nodes that come and go; the head has no CPU to give, so that workers are on the others."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = []
        self.stopped = []

    @property
    def address(self):
        return self.cluster.address

    def have(self, *cpus):
        """Nodes with so many CPUs each, and no others."""
        while self.nodes:
            self.kill()
        for count in cpus:
            self.nodes.append(self.cluster.add_node(num_cpus=count, object_store_memory=150 << 20))
        self.cluster.wait_for_nodes()

    def stop(self):
        """From now on the workers of the last of them do nothing any more, and do not say so."""
        raylet = self.nodes[-1].all_processes["raylet"][0].process.pid
        ours = [one for one in psutil.Process(raylet).children(recursive=True) if one.cmdline()[0].startswith("ray::")]
        for one in ours:
            one.suspend()
        self.stopped += ours

    def kill(self):
        """The last of them, at once."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        while self.stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.stopped.pop().kill()


@pytest.fixture(scope="session")
def nodes():
    """See `Nodes`."""
    made = Nodes()
    yield made
    made.cluster.shutdown()


@pytest.fixture
def digest():
    """A function: name → SHA-256 of every file of a folder."""

    def read(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return read
