"""Settings of the proxy."""

from __future__ import annotations

from jaxdeploy.config.fields import positive, seconds
from jaxdeploy.settings import secret, setting, settings

PROXY_PORT = 8000
"""Default port of a proxy, as in LMDeploy."""


@settings
class ProxyConfig:
    """How a proxy chooses among the servers (nodes) behind it, and when it gives one up.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    nodes: list[str] | None = setting(None, "addresses of servers to begin with; others are added while it runs")
    node_api_key: str | None = secret(
        "the key that --nodes ask for; servers that register bring their own; default: JAXDEPLOY_NODE_API_KEY"
    )
    operator_keys: list[str] | None = secret(
        "keys for /nodes, /metrics and abort_all; default: JAXDEPLOY_OPERATOR_KEYS, else these routes are closed if "
        "there are other keys, and open if there are none"
    )
    routing_strategy: str = setting(
        "least_loaded",
        "least_loaded: fewest requests that run; latency: the same, weighed by how fast replies begin; prefix: where a "
        "prompt that begins alike went, unless that node is much busier; random. LMDeploy's min_expected_latency is "
        "least_loaded, its min_observed_latency is latency",
        choices=("least_loaded", "latency", "prefix", "random"),
        reads={"min_expected_latency": "least_loaded", "min_observed_latency": "latency"},
    )
    heartbeat_interval: float = seconds(2.0, "seconds between two looks at a node")
    heartbeat_timeout: float = seconds(20.0, "seconds after which a node that gives no sign of life is given up")
    read_timeout: float = seconds(600.0, "seconds that a node which is well may be silent in the middle of a reply")
    max_attempts: int = positive(
        "nodes that may die or fail with one request before it is answered with an error", 2, "2 is one retry"
    )
