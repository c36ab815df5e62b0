# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "websockets", "tornado", "fastapi", "uvicorn[standard]",
#     "python-socketio", "picows", "socketify", "redis[hiredis]", "matplotlib", "psutil",
# ]
# ///
"""Is the smallest chat also the fastest? One command to check: `uv run bonus/bench.py`.

The servers, all in bench_servers/ but chat.py and cluster.py, do the same job: put the
speaker's name in front of a text and send it to everyone, the speaker included. They take
turns, each on one core, while this process, on another core, is the crowd that talks to
them (bench_servers/crowd.py). Messages have 60 bytes, the users say them in turn, and a
message is on its way until *every* user has heard it, so that it is no use to serve the
speaker first. Every byte that a user hears is compared with what was said.

chat.py has more to do than the others: it tells everyone about every login, refuses names
that are taken, and holds back who talks too much. That limit is not lifted for it: the end
of the report says how far from it everyone was. cluster.py is chat.py in two processes,
half of the users at each, and shares the server's core with its Redis.

It is made for Linux; on macOS nothing is pinned and there is no floor. `taskset -c 0,2
python bonus/bench.py` chooses the cores. socketify needs libuv (Debian: libuv1), ws needs
node and npm, cluster.py needs redis-server; who cannot run is left out. The exit status is
1 if chat.py has lost, repeated or reordered anything.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import matplotlib
import psutil  # type: ignore[import-untyped]
from bench_servers.crowd import (
    HOST,
    MESSAGE_SIZE,
    PLAIN,
    SOCKET_IO,
    Crowd,
    Dialect,
    Failed,
    Mark,
)
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SERVERS_DIR = HERE / "bench_servers"
OPEN_FILES = 20_000  # for 10,000 users and some more
SPARE_FILES = 200
START_LIMIT = 10  # seconds
SPEECH_LIMIT = 2**15  # bytes a second that chat.py lets a user say, ...
SPEECH_BURST = 2**17  # ... after so many at once, ...
SPEECH_OVERHEAD = 64  # ... with so many on top of each message
PANELS_A_ROW = 3
ACCENT, INK, BAR = "#4477ee", "#7c858f", "#98a0aa80"  # read on white and on black


class NotStarted(Failed):
    """A server does not even start."""


@dataclass(frozen=True)
class Server:
    title: str
    command: tuple[str | Path, ...]  # the port comes last
    packages: tuple[str, ...] = ()  # whose versions matter
    dialect: Dialect = PLAIN
    floor: bool = False  # not a chat, but what no chat can be faster than
    processes: int = 1  # if more, as one room over a Redis of their own


def script(name: str, *options: str) -> tuple[str | Path, ...]:
    return (sys.executable, SERVERS_DIR / name, *options)


CHAT = (sys.executable, HERE.parent / "chat.py", "--host", HOST, "--port")
CLUSTER = (sys.executable, HERE / "cluster.py", "--host", HOST)
REDIS = ("redis-server", "--save", "", "--appendonly", "yes", "--port")
NODE = ("node", SERVERS_DIR / "ws_chat.js")
SERVERS = {
    "chat": Server("chat.py", CHAT, ("aiohttp",)),
    "cluster": Server("cluster.py, Redis", CLUSTER, ("redis",), processes=2),
    "aiohttp": Server("aiohttp, send_str", script("aiohttp_chat.py"), ("aiohttp",)),
    "websockets": Server("websockets", script("websockets_chat.py"), ("websockets",)),
    "tornado": Server("Tornado", script("tornado_chat.py"), ("tornado",)),
    "fastapi": Server("FastAPI", script("fastapi_chat.py"), ("fastapi", "uvicorn")),
    "socketio": Server(
        "python-socketio", script("socketio_chat.py"), ("python-socketio",), SOCKET_IO
    ),
    "picows": Server("picows (Cython)", script("picows_chat.py"), ("picows", "uvloop")),
    "socketify": Server("socketify (C++)", script("socketify_chat.py"), ("socketify",)),
    "ws": Server("ws (Node.js)", NODE),
    "floor": Server("floor, a write a pass", script("floor.py"), floor=True),
    "floor-each": Server(
        "floor, a write a message", script("floor.py", "--each"), floor=True
    ),
}


@dataclass(frozen=True)
class Scenario:
    users: int
    in_flight: int = 0  # messages that are on their way all the time, or ...
    rate: int = 0  # ... that are said a second; without both, nobody says anything

    @property
    def title(self) -> str:
        if self.in_flight:
            return f"{self.users:,} users, {self.in_flight:,} in flight"
        if self.rate:
            return f"{self.users:,} users, {self.rate:,} messages/s"
        return f"{self.users:,} users log in"

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.in_flight:
            return ("deliveries", "cpu", "redis")
        return ("cpu", "redis", "p50", "p99") if self.rate else ("logins", "memory")


SCENARIOS = {
    "quiet": Scenario(100, in_flight=1),
    "lively": Scenario(100, in_flight=10),
    "busy": Scenario(1000, in_flight=1000),
    "paced": Scenario(100, rate=20),
    "crowded": Scenario(5000, rate=20),  # that is 100,000 deliveries a second
    "idle": Scenario(10_000),
}
QUICK = {  # fewer in flight when busy: it takes time to hear them all out
    name: SCENARIOS[name] for name in ("quiet", "lively")
} | {"busy": Scenario(200, in_flight=200)}
OVERVIEW = (  # scenario and metric
    ("quiet", "deliveries"),
    ("lively", "deliveries"),
    ("busy", "deliveries"),
    ("crowded", "cpu"),
    ("idle", "logins"),
    ("idle", "memory"),
)
TITLES = {
    "deliveries": "deliveries a second",
    "cpu": "CPU time a delivery, µs",
    "redis": "of it Redis, µs",
    "p50": "p50 latency, ms",
    "p99": "p99 latency, ms",
    "logins": "logins a second",
    "memory": "memory a user, KiB",
}


@dataclass
class Result:
    """What one server did in one scenario, over the rounds."""

    values: dict[str, list[float]] = field(default_factory=dict)  # by metric
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, measured: dict[str, float], faults: Counter[str]) -> None:
        for metric, value in measured.items():
            self.values.setdefault(metric, []).append(value)
        self.faults += faults

    def median(self, metric: str) -> float:
        return statistics.median(self.values[metric])


Results = dict[str, dict[str, Result]]  # by scenario, then by server
Column = tuple[str, str]  # scenario and metric


# Measuring


def two_cores() -> tuple[int, int] | None:
    """Return one for the servers and one for the crowd, where the system allows."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    # The first and the last are rarely two threads of one core.
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[-1]) if len(cores) > 1 else None


@contextmanager
def started(
    command: tuple[str | Path, ...], cores: tuple[int, int] | None
) -> Iterator[tuple[int, int]]:
    """Run `command`, which takes a port as its last word; yields that and the process id."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        words = stack.enter_context(Path(folder, "words").open("w+"))
        with socket.create_server((HOST, 0)) as unused:
            port = unused.getsockname()[1]
        if cores:
            os.sched_setaffinity(0, {cores[0]})  # all threads of the server inherit it
        process = subprocess.Popen(
            [*command, str(port)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        if cores:
            os.sched_setaffinity(0, {cores[1]})
        deadline = time.monotonic() + START_LIMIT
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(ConnectionRefusedError):
                socket.create_connection((HOST, port)).close()
                break
            time.sleep(0.02)
        else:
            lines = Path(folder, "words").read_text().strip().splitlines()
            raise NotStarted((lines or ["does not listen"])[-1])
        yield port, process.pid


def measure(
    server: Server, scenario: Scenario, seconds: float, cores: tuple[int, int] | None
) -> tuple[dict[str, float], Counter[str]]:
    """Start `server`, play `scenario`, return what was measured and what went wrong."""
    with ExitStack() as stack:
        command, redis = server.command, []
        if server.processes > 1:
            redis_port, redis_pid = stack.enter_context(started(REDIS, cores))
            command += ("--redis", f"redis://{HOST}:{redis_port}", "--port")
            redis = [redis_pid]
        processes = [
            stack.enter_context(started(command, cores))
            for _ in range(server.processes)
        ]
        ports, pids = zip(*processes, strict=True)
        crowd = Crowd([*ports], [*pids, *redis], server.dialect)
        stack.enter_context(closing(crowd))
        measured = play(crowd, scenario, seconds)
        if not redis:
            measured.pop("redis", None)
        return measured, +crowd.faults


def play(crowd: Crowd, scenario: Scenario, seconds: float) -> dict[str, float]:
    """Have `crowd` log in and talk; return what was measured, by metric."""
    empty = memory(crowd.pids)
    begin, end = crowd.log_in(scenario.users)
    if not scenario.in_flight and not scenario.rate:
        return {
            "logins": scenario.users / (end.time - begin.time),
            "memory": (memory(crowd.pids) - empty) / scenario.users / 1024,
        } | busy(begin, end)
    if scenario.rate:
        crowd.arrivals = defaultdict(list)
    begin, end = crowd.talk(seconds, scenario.in_flight, scenario.rate)
    deliveries = end.deliveries - begin.deliveries
    if not deliveries:  # what was lost keeps the rest from being said
        return {}
    said_by_one = math.ceil((end.said - begin.said) / scenario.users)
    measured = busy(begin, end) | {
        "deliveries": deliveries / (end.time - begin.time),
        "cpu": (end.server_cpu - begin.server_cpu) / deliveries * 1e6,
        "redis": (end.redis_cpu - begin.redis_cpu) / deliveries * 1e6,
        "speech": said_by_one * (MESSAGE_SIZE + SPEECH_OVERHEAD) / seconds,
    }
    if scenario.rate:
        percentiles = statistics.quantiles(crowd.latencies(since=begin.time), n=100)
        measured |= {"p50": percentiles[49] * 1e3, "p99": percentiles[98] * 1e3}
    return measured


def memory(pids: list[int]) -> int:
    """Return the bytes that the processes hold."""
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def busy(begin: Mark, end: Mark) -> dict[str, float]:
    seconds = end.time - begin.time
    return {
        "server busy": (end.server_cpu - begin.server_cpu) / seconds,
        "crowd busy": (end.crowd_cpu - begin.crowd_cpu) / seconds,
    }


def run(
    servers: list[str],
    scenarios: dict[str, Scenario],
    rounds: int,
    seconds: float,
    cores: tuple[int, int] | None,
) -> tuple[Results, dict[str, str]]:
    """Measure all in turn; return the results, and who did not even start, and why."""
    results: Results = {name: {} for name in scenarios}
    left_out: dict[str, str] = {}
    turns = [
        (number, name, server)
        for number in range(1, rounds + 1)
        for name in scenarios
        for server in servers
    ]
    for turn, (number, name, server) in enumerate(turns):
        if server in left_out:
            continue
        title = SERVERS[server].title
        print(f"{turn / len(turns):4.0%} {number} {name}, {title}", file=sys.stderr)
        result = results[name].setdefault(server, Result())
        try:
            result.add(*measure(SERVERS[server], scenarios[name], seconds, cores))
        except (NotStarted, FileNotFoundError) as error:
            left_out[server] = str(error)
            del results[name][server]
        except Failed as error:
            result.faults[str(error)] += 1
        gc.collect()
    return results, left_out


def prepare(servers: list[str], folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of all that `servers` need, and who cannot run, and why.

    Installs ws into `folder`.
    """
    versions = {"Python": platform.python_version()}
    left_out: dict[str, str] = {}
    for key in servers:
        for package in SERVERS[key].packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                left_out[key] = f"{package} is not installed"
    if "ws" in servers:
        install = ["npm", "install", "--prefix", folder, "ws"]
        try:
            node = subprocess.check_output(["node", "--version"], text=True)
            subprocess.check_output(install, stderr=subprocess.STDOUT, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            left_out["ws"] = str(error)
        else:
            modules = Path(folder, "node_modules")
            package = json.loads((modules / "ws" / "package.json").read_text())
            versions |= {"Node.js": node.strip(" v\n"), "ws": package["version"]}
            os.environ["NODE_PATH"] = str(modules)
    return versions, left_out


# Reporting


def short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def cell(by_server: dict[str, Result], key: str, metric: str, spread: bool) -> str:
    """Say the median, from where to where the rounds went, and the ratio to chat.py."""
    result, chat = by_server.get(key), by_server.get("chat")
    if result is None or metric not in result.values:
        return "–"
    median, values = result.median(metric), result.values[metric]
    text = short(median)
    if spread and len(values) > 1:
        text += f" ({short(min(values))}–{short(max(values))})"
    if key != "chat" and chat and metric in chat.values:
        ratio = median / chat.median(metric)
        text += f" ×{ratio:.0f}" if ratio >= 10 else f" ×{ratio:.2g}"
    return text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (map(str.ljust, row, widths) for row in (head, ruler, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def overview(results: Results, columns: list[Column]) -> str:
    """Lay out the medians and their ratios to chat.py in one table."""
    head = ["server", *(f"{name}: {TITLES[metric]}" for name, metric in columns)]
    rows = [
        [server.title, *(cell(results[name], key, m, False) for name, m in columns)]
        for key, server in SERVERS.items()
        if any(key in by_server for by_server in results.values())
    ]
    return markdown(head, rows)


def details(by_server: dict[str, Result], metrics: list[str]) -> str:
    """Lay out one scenario: medians, spread, ratios, who was busy, what went wrong."""
    shares = ("server busy", "crowd busy")
    head = ["server", *(TITLES[metric] for metric in metrics), *shares, "gone wrong"]
    rows = []
    for key, result in by_server.items():
        row = [SERVERS[key].title]
        row += [cell(by_server, key, metric, True) for metric in metrics]
        row += [f"{result.median(s):.0%}" if result.values else "–" for s in shares]
        faults = (f"{what}: {count:,}" for what, count in result.faults.items())
        rows.append([*row, ", ".join(faults) or "nothing"])
    return markdown(head, rows)


def draw(
    results: Results,
    panels: list[Column],
    titles: dict[str, str],
    caption: str,
    file: Path,
) -> None:
    """Draw the medians as bars, chat.py in colour, the floors hatched, into an SVG."""
    keys = [key for key in SERVERS if any(key in results[name] for name, _ in panels)]
    rows = math.ceil(len(panels) / PANELS_A_ROW)
    matplotlib.rc("svg", fonttype="none", hashsalt="")
    matplotlib.rc("font", size=9)
    matplotlib.rc("text", color=INK)
    matplotlib.rc("hatch", linewidth=0.5)
    size = (10.5, rows * (0.22 * len(keys) + 0.9))
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(rows, PANELS_A_ROW, sharey=True, squeeze=False)
    for axes, (name, metric) in zip(grid.flat, panels, strict=False):
        medians = {
            key: result.median(metric)
            for key, result in results[name].items()
            if metric in result.values
        }
        start, end = min(medians.values()) / 2, max(medians.values())
        axes.set_xscale("log")
        axes.set_xlim(start, end * (end / start) ** 0.3)  # room for the last figure
        bars = axes.barh(
            [keys.index(key) for key in medians],
            [median - start for median in medians.values()],
            height=0.64,
            left=start,
            color=[ACCENT if key == "chat" else BAR for key in medians],
            hatch=["/////" if SERVERS[key].floor else "" for key in medians],
        )
        axes.bar_label(bars, [*map(short, medians.values())], padding=4)
        better = "more" if metric in ("deliveries", "logins") else "less"
        title = f"{titles[name]}\n{TITLES[metric]}: {better} is better"
        axes.set_title(title, loc="left", fontsize=9, pad=8)
        axes.set_yticks(range(len(keys)), [SERVERS[key].title for key in keys])
        axes.tick_params(length=0, labelcolor=INK)
        axes.xaxis.set_ticks([], minor=True)
        axes.xaxis.set_ticks([])
        axes.spines[:].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    grid[0, 0].invert_yaxis()
    figure.supxlabel(caption, fontsize=7.5)
    figure.savefig(file, transparent=True, metadata={"Date": None})


def machine() -> str:
    """Name the machine: its processor, cores and system."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text()
        model = (re.findall(r"model name\s*: (.*)", cpus) or [model])[0]
    release = platform.release().partition("-")[0]
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {release}"


def report(
    results: Results,
    scenarios: dict[str, Scenario],
    conditions: dict[str, str],
    svg: Path | None,
) -> None:
    """Print the results as Markdown, and draw them into the file `svg`."""
    titles = {name: f"{name}: {scenario.title}" for name, scenario in scenarios.items()}
    measured = {
        (name, metric)
        for name, by_server in results.items()
        for result in by_server.values()
        for metric in result.values
    }
    columns = [column for column in OVERVIEW if column in measured]
    print("".join(f"{what}: {value}\n" for what, value in conditions.items()))
    print(f"Medians and × ratios to chat.py\n\n{overview(results, columns)}")
    print(
        "Median (least–most) × ratio to chat.py. A crowd that is busy all the time is"
    )
    print("the limit, rather than its server.\n")
    for name, scenario in scenarios.items():
        metrics = [metric for metric in scenario.metrics if (name, metric) in measured]
        print(f"{titles[name]}\n\n{details(results[name], metrics)}")
    speech = max(
        value
        for by_server in results.values()
        for result in by_server.values()
        for value in result.values.get("speech", [0])
    )
    print(
        f"Nobody said more than {speech / 1024:.1f} KiB a second; chat.py slows down who "
        f"says more than {SPEECH_LIMIT // 1024}, after {SPEECH_BURST // 1024} KiB at once."
    )
    if svg and columns:
        caption = f"log scales, medians; {conditions['date']}, {conditions['machine']}"
        draw(results, columns, titles, caption, svg)


def main() -> int:
    """Measure what the command line asks for, report it, return the exit status."""
    parser = argparse.ArgumentParser(description="Compare chat.py with other chats")
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of quiet, lively, busy")
    add("--rounds", type=int, help="3 if not given, 1 if --quick")
    add("--servers", metavar="A,B", help=f"of {', '.join(SERVERS)}; all if not given")
    add("--scenarios", metavar="X,Y", help=f"of {', '.join(SCENARIOS)}; likewise")
    add("--svg", metavar="FILE", type=Path, help="a picture of it")
    args = parser.parse_args()
    known = QUICK if args.quick else SCENARIOS
    servers = args.servers.split(",") if args.servers else [*SERVERS]
    names = args.scenarios.split(",") if args.scenarios else [*known]
    for unknown in {*servers, *names} - {*SERVERS, *known}:
        parser.error(f"there is no {unknown}; see --help")
    rounds = args.rounds or (1 if args.quick else 3)
    seconds = 0.4 if args.quick else 1.5

    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = OPEN_FILES if allowed == resource.RLIM_INFINITY else allowed
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, allowed))
    scenarios = {n: known[n] for n in names if known[n].users + SPARE_FILES <= files}
    gc.disable()  # its pauses would be measured, too
    cores = two_cores()
    with tempfile.TemporaryDirectory() as folder:
        versions, left_out = prepare(servers, folder)
        present = [key for key in servers if key not in left_out]
        results, not_started = run(present, scenarios, rounds, seconds, cores)
    left_out |= not_started
    conditions = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "cores": "server {}, crowd {}".format(*cores) if cores else "not pinned",
        "versions": ", ".join(map(" ".join, versions.items())),
        "rounds": f"{rounds}, measuring for {seconds} s each",
    }
    report(results, scenarios, conditions, args.svg)
    for key, why in left_out.items():
        print(f"{SERVERS[key].title} is left out: {why}")
    for name in set(names) - set(scenarios):
        print(f"{name} is left out: only {files:,} open files are allowed (ulimit -Hn)")
    chat = [by_server["chat"] for by_server in results.values() if "chat" in by_server]
    return int("chat" in left_out or any(result.faults for result in chat))


if __name__ == "__main__":
    sys.exit(main())
