"""Many replicas in simulation: which router, and how many replicas can one router feed?

    python benchmarks/cluster_simulation.py              # 1 to 1,000 replicas, three routers; some minutes

A replica is what was measured of one engine (`results/engine-load.json`: tokens per second of block diffusion with 1 to
128 requests in flight; seconds per prompt token from the time to a first token). Chats of several turns arrive in
bursts; a turn's prompt is all that was said before. A replica that still holds a chat's K/V runs the new part alone.
All arrivals pass one router, which takes a measured time for each; where it is busy all the time, more replicas
bring nothing. Writes `benchmarks/results/cluster_simulation.json` and `docs/images/cluster.png`.

- random: any replica;
- two choices: the less busy of two random ones (Ray Serve's default);
- prefix: the replica that has the chat's prefix, unless it has clearly more requests than the less busy of two.
"""

import heapq
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import PICTURES, RESULTS, options, setting, write

REPLICAS = (1, 4, 16, 64, 256, 1000)
ROUTERS = ("random", "two choices", "prefix")
SYSTEM, QUESTION, ANSWER, TURNS = (
    300,
    60,
    80,
    6,
)  # tokens of what all chats begin with, a turn's, an answer's; mean turns
THINK = 5.0  # seconds between an answer and the next question, mean
BURST, EVERY = 3.0, 20.0  # arrivals in a burst, in the mean rate; seconds from one to the next (a fifth of the time)
CLEARLY = 4  # requests more than another one: then its prefix does not count
KEPT = 64  # chats whose K/V a replica holds


@dataclass(frozen=True)
class Costs:
    """Of one replica, and of the router."""

    rows: int  # requests that run together
    together: np.ndarray  # tokens per second, of all requests together, by requests in flight
    prompt_token: float  # seconds
    router: float  # seconds per request


@dataclass
class Turn:
    """One request."""

    chat: int
    number: int  # of the chat's turns
    left: int  # turns after it
    arrived: float
    prompt: int
    answer: int
    run: int = 0  # prompt tokens that no K/V was there for


@dataclass
class Replica:
    """Requests that run share its speed; the others wait."""

    running: list[tuple[float, int, Turn]] = field(default_factory=list)  # ends when that much work is done
    waiting: deque[Turn] = field(default_factory=deque)
    chats: "OrderedDict[int, int]" = field(default_factory=OrderedDict)  # tokens held, the latest last
    done: float = 0.0  # answer tokens that each row has got since the beginning
    at: float = 0.0  # time of `done`
    event: int = 0  # the latest forecast; older ones are void
    prefix: bool = False  # what all chats begin with is there

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)


class Simulation:
    """One run: so many replicas behind one router."""

    def __init__(self, costs: Costs, replicas: int, router: str, rate: float, seconds: float) -> None:
        self.costs, self.router, self.rate, self.seconds = costs, router, rate, seconds
        self.rng = np.random.default_rng(0)
        self.replicas = [Replica() for _ in range(replicas)]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = self.chats = 0
        self.now = self.free = self.busy = 0.0  # the time; when the router is free; how long it was busy
        self.home: dict[int, int] = {}  # chat -> the replica that answered it
        self.latency: list[float] = []
        self.tokens = self.prompts = self.reused = 0

    def run(self) -> dict[str, float]:
        """So many seconds; what ends in the first third of them is not counted."""
        self._at(0.0, self._chat)
        while self.events and self.events[0][0] < self.seconds:
            self.now, _, what = heapq.heappop(self.events)
            what()
        span = self.seconds * 2 / 3
        return {
            "requests_per_second": len(self.latency) / span,
            "tokens_per_second": self.tokens / span,
            "p50": float(np.quantile(self.latency, 0.5)),
            "p99": float(np.quantile(self.latency, 0.99)),
            "prefix_hit_rate": self.reused / self.prompts,
            "router_busy": self.busy / self.seconds,
        }

    def _at(self, when: float, what: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what))

    def _chat(self) -> None:
        """A chat begins, and the next one will; in bursts more of them do."""
        turns = int(self.rng.geometric(1 / TURNS))
        self.chats += 1
        self._ask(Turn(self.chats, 0, turns - 1, self.now, SYSTEM + self._length(QUESTION), self._length(ANSWER)))
        quiet = (1 - BURST / 5) / (4 / 5)
        rate = self.rate / TURNS * (BURST if self.now % EVERY < EVERY / 5 else quiet)
        self._at(self.now + self.rng.exponential(1 / rate), self._chat)

    def _length(self, mean: int) -> int:
        return 1 + int(self.rng.gamma(3.0, mean / 3.0))

    def _ask(self, turn: Turn) -> None:
        """Through the router, one after the other."""
        self.free = max(self.free, self.now) + self.costs.router
        self._at(self.free, lambda: self._routed(turn))

    def _routed(self, turn: Turn) -> None:
        self.busy += self.costs.router
        index = self._choose(turn)
        replica = self.replicas[index]
        self.home[turn.chat] = index
        replica.waiting.append(turn)
        self._advance(replica)
        self._go_on(replica)

    def _choose(self, turn: Turn) -> int:
        count = len(self.replicas)
        a = int(self.rng.integers(count))
        if self.router == "random":
            return a
        b = int(self.rng.integers(count))
        least = a if self.replicas[a].load <= self.replicas[b].load else b
        home = self.home.get(turn.chat)
        if self.router == "prefix" and home is not None:
            if self.replicas[home].load <= self.replicas[least].load + CLEARLY:
                return home
        return least

    def _speed(self, running: int) -> float:
        """Tokens per second of each of so many requests."""
        return float(self.costs.together[running]) / running

    def _advance(self, replica: Replica) -> None:
        """What has been done since the last event."""
        if replica.running:
            replica.done += (self.now - replica.at) * self._speed(len(replica.running))
        replica.at = self.now

    def _go_on(self, replica: Replica) -> None:
        """Rows for those who wait, and a new forecast of the next end."""
        while replica.waiting and len(replica.running) < self.costs.rows:
            turn = replica.waiting.popleft()
            held = max(replica.chats.get(turn.chat, 0), SYSTEM if replica.prefix else 0)
            replica.prefix = True
            turn.run = turn.prompt - min(held, turn.prompt - 1)
            # a prompt takes as long as so many answer tokens of a request alone
            work = turn.answer + turn.run * self.costs.prompt_token * float(self.costs.together[1])
            self.number += 1
            heapq.heappush(replica.running, (replica.done + work, self.number, turn))
        replica.event += 1
        if replica.running:
            left = max(0.0, replica.running[0][0] - replica.done)
            event = replica.event
            self._at(self.now + left / self._speed(len(replica.running)), lambda: self._end(replica, event))

    def _end(self, replica: Replica, event: int) -> None:
        if event != replica.event:
            return
        self._advance(replica)
        _, _, turn = heapq.heappop(replica.running)
        replica.chats[turn.chat] = turn.prompt + turn.answer
        replica.chats.move_to_end(turn.chat)
        if len(replica.chats) > KEPT:
            replica.chats.popitem(last=False)
        if self.now > self.seconds / 3:
            self.latency.append(self.now - turn.arrived)
            self.tokens += turn.answer
            self.prompts += turn.prompt
            self.reused += turn.prompt - turn.run
        if turn.left:
            self._at(self.now + self.rng.exponential(THINK), lambda: self._next(turn))
        self._go_on(replica)

    def _next(self, turn: Turn) -> None:
        prompt = turn.prompt + turn.answer + self._length(QUESTION)
        self._ask(Turn(turn.chat, turn.number + 1, turn.left - 1, self.now, prompt, self._length(ANSWER)))


def measured_costs(router: float) -> Costs:
    """Of the bundled block-diffusion model on two cores, between the measured loads by interpolation."""
    rows = json.loads((RESULTS / "engine-load.json").read_text())["rows"]
    chosen = [row for row in rows if row["mode"] == "diffusion" and row["sub_block_size"] == 32]
    loads = [row["concurrency"] for row in chosen]
    speeds = [row["tokens_per_second"] for row in chosen]
    width = 32
    together = np.concatenate([[1.0], np.interp(np.arange(1, width + 1), loads, speeds)])
    return Costs(width, together, chosen[0]["ttft"] / 45, router)  # a question of the bundled task has 45 tokens or so


def simulate(costs: Costs, slower: float, load: float, seconds: float) -> list[dict[str, Any]]:
    """All numbers of replicas, all routers; replicas that reuse nothing would need `load` of the time for the arrivals.

    A replica's costs are `slower` times the measured ones: a larger model.
    """
    large = Costs(costs.rows, costs.together / slower, costs.prompt_token * slower, costs.router)
    prompt = SYSTEM + QUESTION + (TURNS - 1) * (QUESTION + ANSWER)  # about the mean, none of it reused
    work = (ANSWER + prompt * large.prompt_token * large.together[1]) / large.together[large.rows]
    rows = []
    for replicas in REPLICAS:
        for router in ROUTERS:
            began = time.perf_counter()
            rate = load * replicas / work
            long = max(seconds * (1 if slower == 1 else 3), 3000 / rate)
            if rate * costs.router > 2:  # the router is the limit: its queue only grows
                long = seconds / 3
            run = Simulation(large, replicas, router, rate, long)
            row = {"slower": slower, "replicas": replicas, "router": router, "offered": rate, **run.run()}
            rows.append(row)
            print(
                f"x{slower:g} {replicas:5} {router:12} {row['requests_per_second']:9.1f}/s p50 {row['p50']:7.3f} "
                f"p99 {row['p99']:7.3f} hits {row['prefix_hit_rate']:.2f} router {row['router_busy']:.2f} "
                f"({time.perf_counter() - began:.1f} s)", flush=True,
            )  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], router_seconds: float) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    slower = sorted({row["slower"] for row in rows})
    figure, panels = plt.subplots(len(slower), 3, figsize=(13, 3.6 * len(slower)), squeeze=False, layout="constrained")
    for line, factor in zip(panels, slower, strict=True):
        for router, colour in zip(ROUTERS, ("#999999", "#0b6fb8", "#d9541e"), strict=True):
            own = [row for row in rows if row["slower"] == factor and row["router"] == router]
            x = [row["replicas"] for row in own]
            line[0].plot(x, [row["requests_per_second"] for row in own], "o-", color=colour, label=router)
            line[1].plot(x, [row["p50"] for row in own], "o-", color=colour)
            line[1].plot(x, [row["p99"] for row in own], "o--", color=colour, fillstyle="none")
            flowing = [row for row in own if row["router_busy"] < 0.95]  # else its queue grows: no steady state
            hits = [100 * row["prefix_hit_rate"] for row in flowing]
            line[2].plot([row["replicas"] for row in flowing], hits, "o-", color=colour)
        line[0].axhline(1 / router_seconds, color="black", lw=1, ls=":")
        line[0].text(1, 0.6 / router_seconds, "one router process", fontsize=9)
        model = "the bundled model" if factor == 1 else f"a model {factor:g} times as slow"
        titles = (f"requests per second, {model}", "latency in seconds: p50, p99 (dashed)", "prompt tokens reused, %")
        for panel, title in zip(line, titles, strict=True):
            panel.set(xscale="log", title=title, xlabel="replicas")
            panel.title.set_fontsize(10)
            panel.grid(alpha=0.3)
        line[0].set_yscale("log")
        line[1].set_yscale("log")
        line[2].set(ylim=(0, 100), xlim=line[0].get_xlim())
        line[0].legend(fontsize=9, loc="lower right")
    figure.savefig(PICTURES / "cluster.png", dpi=110)


if __name__ == "__main__":
    args = options(__doc__, router_milliseconds=1.0, slower=50.0, load=1.2, seconds=60.0)
    costs = measured_costs(args.router_milliseconds / 1000)
    rows = [row for factor in (1.0, args.slower) for row in simulate(costs, factor, args.load, args.seconds)]
    limits = {
        f"x{factor:g}": next(
            (
                row["replicas"]
                for row in rows
                if (row["slower"], row["router"]) == (factor, "two choices") and row["router_busy"] > 0.9
            ),
            None,
        )
        for factor in (1.0, args.slower)
    }
    inputs = {
        "rows": costs.rows, "tokens_per_second_by_requests": costs.together[1:].tolist(),
        "seconds_per_prompt_token": costs.prompt_token, "seconds_per_routed_request": costs.router,
        "system": SYSTEM, "question": QUESTION, "answer": ANSWER, "turns": TURNS, "think": THINK, "kept": KEPT,
        "clearly": CLEARLY,
    }  # fmt: skip
    report = {"setting": setting(args), "inputs": inputs, "router_is_the_limit_from": limits, "rows": rows}
    write("cluster_simulation", report)
    draw(rows, costs.router)
