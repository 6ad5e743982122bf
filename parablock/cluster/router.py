"""The way of a request to a replica, through Ray Serve's interface for request routers.

Ray's own router for prefixes (`ray.serve.llm`) asks an actor twice for every request, blocking, and is there only
beside vLLM or SGLang.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from parablock.cluster.passing import Asked
from parablock.cluster.prefixes import Prefixes


class PrefixRouter(RequestRouter):
    """A request goes to the replica that has the K/V of its beginning, unless that one is clearly busier."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray with `request_router_kwargs`."""
        self._prefixes = Prefixes(kwargs["slack"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica of choice, then the others, should it be full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # there is nothing else to try at once
        asked = _asked(pending_request)
        went = asked.went if asked else []
        replicas = {r.replica_id.unique_id: r for r in candidate_replicas if r.replica_id.unique_id not in went}
        if not replicas:
            return []  # Ray asks again, until there is another one
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        chosen = replicas.pop(self._prefixes.choose(asked.beginning if asked else (), loads))
        return [[chosen], list(replicas.values())] if replicas else [[chosen]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember it."""
        asked = _asked(pending_request)
        if asked is not None:
            asked.went.append(replica_id.unique_id)
        self._prefixes.sent(asked.beginning if asked else (), replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas have come or gone."""
        super().update_replicas(replicas)
        self._prefixes.keep([replica.replica_id.unique_id for replica in replicas])


def _asked(pending_request: PendingRequest | None) -> Asked | None:
    found = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return found if isinstance(found, Asked) else None
