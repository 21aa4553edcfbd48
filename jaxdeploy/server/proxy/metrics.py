"""What Prometheus reads of a proxy: its nodes, what they were asked, and how often one had to stand in for another."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from jaxdeploy.server.metrics import SECONDS
from jaxdeploy.server.proxy.nodes import Nodes

NAME = "jaxdeploy_proxy"


class ProxyMetrics:
    """The counters of one proxy, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._up = Gauge(f"{NAME}:nodes_up", "Nodes that get requests", registry=registry)
        self._down = Gauge(f"{NAME}:nodes_down", "Nodes that get none", registry=registry)
        self._running = Gauge(f"{NAME}:requests_running", "Requests that are with a node", ["node"], registry=registry)
        self._sent = Counter(
            f"{NAME}:requests", "Requests that a node answered, by its status", ["node", "status"], registry=registry
        )
        self._moved = Counter(
            f"{NAME}:retries",
            "Requests that this node did not answer, by why",
            ["node", "reason"],
            registry=registry,
        )
        self._broken = Counter(
            f"{NAME}:broken_replies", "Replies that ended with an error on the way", ["node"], registry=registry
        )
        self._latency = Histogram(
            f"{NAME}:latency_seconds", "Until a reply began", ["node"], buckets=SECONDS, registry=registry
        )
        ProcessCollector(registry=registry)

    def note_status(self, node: str, status: int) -> None:
        """A node answered so."""
        self._sent.labels(node, str(status)).inc()

    def note_begun(self, node: str, seconds: float) -> None:
        """A reply began after so long."""
        self._latency.labels(node).observe(seconds)

    def note_moved(self, node: str, reason: str) -> None:
        """A request is to go elsewhere."""
        self._moved.labels(node, reason).inc()

    def note_broken(self, node: str) -> None:
        """A reply could not be finished."""
        self._broken.labels(node).inc()

    def forget(self, node: str) -> None:
        """A node was removed: drop its counters."""
        for counted in (self._sent, self._moved, self._broken, self._latency):
            counted.remove_by_labels({"node": node})

    def text(self, nodes: Nodes) -> str:
        """Everything, in Prometheus' text format."""
        self._up.set(len(nodes.up))
        self._down.set(len(list(nodes)) - len(nodes.up))
        self._running.clear()
        for node in nodes:
            self._running.labels(node.url).set(node.in_flight)
        return generate_latest(self._registry).decode()
