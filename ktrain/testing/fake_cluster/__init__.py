"""A Kubernetes API server in the process, for tests of launchers and of those who use them.

Start with `FakeCluster`; docs/reference/fake-cluster.md says what it emulates and what it does not.
"""

from ktrain.testing.fake_cluster.access import Access, Rule
from ktrain.testing.fake_cluster.cluster import FakeCluster, Pace
from ktrain.testing.fake_cluster.faults import Fault
from ktrain.testing.fake_cluster.logs import FileLogs, LogLine, LogSource, PodLogs
from ktrain.testing.fake_cluster.offer import Offer

__all__ = ["Access", "FakeCluster", "Fault", "FileLogs", "LogLine", "LogSource", "Offer", "Pace", "PodLogs", "Rule"]
