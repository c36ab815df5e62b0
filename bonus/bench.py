# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14,<4", "websockets", "tornado", "fastapi", "uvicorn[standard]",
#     "python-socketio", "picows", "socketify", "matplotlib", "psutil", "rich",
# ]
# ///
"""Is the smallest chat also the fastest? One command to check: `uv run bonus/bench.py`.

Or, without uv:

    pip install "aiohttp>=3.14,<4" websockets tornado fastapi "uvicorn[standard]" \
        python-socketio picows socketify matplotlib psutil rich && python bonus/bench.py

The servers, all in bench_servers/ but chat.py, do the same job: put the speaker's name
in front of a text and send it to everyone, the speaker included. They take turns, each
as a process of its own on one core, while this process, on another core, is the crowd
that talks to them (bench_servers/crowd.py). Messages have 60 bytes, the users say them
in turn, and a message is on its way until *every* user has heard it, so that it is no
use to serve the speaker first. Every byte that a user hears is compared with what was
said.

chat.py has more to do than the others: it tells everyone about every login, refuses
names that are taken, and holds back who talks too much.

The whole takes about a quarter of an hour, `--quick` less than a minute. It is made for
Linux; on macOS nothing is pinned and there is no floor. `taskset -c 0,2 python
bonus/bench.py` chooses the cores. socketify needs libuv (Debian: libuv1), ws needs node
and npm; who cannot run is left out. The exit status is 1 if chat.py has lost, repeated
or reordered anything.
"""

import argparse
import asyncio
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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import matplotlib
import psutil  # type: ignore[import-untyped]
from bench_servers.crowd import (
    HOST,
    PLAIN,
    SOCKET_IO,
    Crowd,
    Dialect,
    Failed,
    Mark,
    rush,
)
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

HERE = Path(__file__).parent
SERVERS_DIR = HERE / "bench_servers"
PACE = 20  # messages a second in the scenarios that grow; 5,000 users hear 100,000
OPEN_FILES = 20_000  # for 10,000 users and some more
SPARE_FILES = 200
START_LIMIT = 10  # seconds
SPEECH_LIMIT = 2**18  # bytes a second that chat.py lets a user say, ...
SPEECH_OVERHEAD = 64  # ... with so many on top of each frame
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


def script(name: str, *options: str) -> tuple[str | Path, ...]:
    return (sys.executable, SERVERS_DIR / name, *options)


CHAT = (sys.executable, HERE.parent / "chat.py", "--host", HOST, "--port")
NODE = ("node", SERVERS_DIR / "ws_chat.js")
SERVERS = {
    "chat": Server("chat.py", CHAT, ("aiohttp",)),
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
    chat_only: bool = False  # as no other server has a list of users

    @property
    def title(self) -> str:
        if self.in_flight:
            return f"{self.users:,} users, {self.in_flight:,} in flight"
        if self.rate:
            return f"{self.users:,} users, {self.rate:,} messages/s"
        return f"{self.users:,} users log in" + " at once" * self.chat_only

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.in_flight:
            return ("deliveries",)
        if self.rate:
            return ("cpu", "p50", "p99")
        return ("list",) if self.chat_only else ("logins", "memory")


SCENARIOS = {
    "quiet": Scenario(100, in_flight=1),
    "lively": Scenario(100, in_flight=10),
    "busy": Scenario(1000, in_flight=1000),
    "grow-10": Scenario(10, rate=PACE),
    "grow-100": Scenario(100, rate=PACE),
    "grow-1000": Scenario(1000, rate=PACE),
    "grow-5000": Scenario(5000, rate=PACE),
    "idle": Scenario(10_000),
    "rush": Scenario(1000, chat_only=True),
}
QUICK = {  # fewer in flight when busy: it takes time to hear them all out
    name: SCENARIOS[name] for name in ("quiet", "lively")
} | {"busy": Scenario(200, in_flight=200)}
TITLES = {
    "deliveries": "deliveries a second",
    "cpu": "CPU time a delivery, µs",
    "p50": "p50 latency, ms",
    "p99": "p99 latency, ms",
    "logins": "logins a second",
    "memory": "memory a user, KiB",
    "list": "seconds until all have the right list",
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
def running(server: Server, cores: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Run `server`, its output thrown away; yields its port and process id."""
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    command = [*server.command, str(port)]
    null = subprocess.DEVNULL
    if cores:
        os.sched_setaffinity(0, {cores[0]})  # all threads of the server inherit it
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
    if cores:
        os.sched_setaffinity(0, {cores[1]})
    try:
        deadline = time.monotonic() + START_LIMIT
        while True:
            with suppress(ConnectionRefusedError):
                socket.create_connection((HOST, port)).close()
                break
            if process.poll() is not None:
                raise NotStarted(last_words(command))
            if time.monotonic() > deadline:
                raise NotStarted("does not listen")
            time.sleep(0.02)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def last_words(command: list[str | Path]) -> str:
    """Run `command`, which fails, once more, and return the last line it writes."""
    try:
        failed = subprocess.run(
            command, capture_output=True, check=False, text=True, timeout=START_LIMIT
        )
    except subprocess.TimeoutExpired:
        return "does not start every time"
    return (failed.stderr.strip().splitlines() or ["ends without a word"])[-1]


def measure(
    server: Server, scenario: Scenario, seconds: float, cores: tuple[int, int] | None
) -> tuple[dict[str, float], Counter[str]]:
    """Start `server`, play `scenario`, return what was measured and what went wrong."""
    with running(server, cores) as (port, pid):
        if scenario.chat_only:
            begin, end = asyncio.run(rush(port, pid, scenario.users))
            return {"list": end.time - begin.time} | busy(begin, end), Counter()
        with closing(Crowd(port, pid, server.dialect)) as crowd:
            return play(crowd, scenario, seconds), +crowd.faults


def play(crowd: Crowd, scenario: Scenario, seconds: float) -> dict[str, float]:
    """Have `crowd` log in and talk; return what was measured, by metric."""
    server = psutil.Process(crowd.server)
    empty = server.memory_info().rss
    begin, end = crowd.log_in(scenario.users)
    if not scenario.in_flight and not scenario.rate:
        memory = server.memory_info().rss - empty
        return {
            "logins": scenario.users / (end.time - begin.time),
            "memory": memory / scenario.users / 1024,
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
        "speech": said_by_one * (crowd.size + SPEECH_OVERHEAD) / seconds,
    }
    if scenario.rate:
        percentiles = statistics.quantiles(crowd.latencies(since=begin.time), n=100)
        measured |= {"p50": percentiles[49] * 1e3, "p99": percentiles[98] * 1e3}
    return measured


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
        for name, scenario in scenarios.items()
        for server in servers
        if server == "chat" or not scenario.chat_only
    ]
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # Refreshed all the time, the bar would take time from the crowd.
    with Progress(
        *columns, console=Console(stderr=True), auto_refresh=False
    ) as progress:
        bar = progress.add_task("", total=len(turns))
        for number, name, server in turns:
            now = f"round {number} of {rounds}, {name}, {SERVERS[server].title}"
            progress.update(bar, description=now, refresh=True)
            if server not in left_out:
                result = results[name].setdefault(server, Result())
                try:
                    measured = measure(SERVERS[server], scenarios[name], seconds, cores)
                    result.add(*measured)
                except NotStarted as error:
                    left_out[server] = str(error)
                    del results[name][server]
                except Failed as error:
                    result.faults[str(error)] += 1
                gc.collect()
            progress.update(bar, advance=1, refresh=True)
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
    text = short(result.median(metric))
    if spread:
        values = result.values[metric]
        text += f" ({short(min(values))}–{short(max(values))})"
    if chat is not None and metric in chat.values:
        ratio = result.median(metric) / chat.median(metric)
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


def details(by_server: dict[str, Result], metrics: tuple[str, ...]) -> str:
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


def notes(results: Results, scenarios: dict[str, Scenario]) -> Iterator[str]:
    """Yield what tells whether the crowd, rather than a server, was the limit."""
    yield "A crowd that is the limit is busy all the time, and its servers are not:"
    speech = [0.0]  # bytes a second
    for name, by_server in results.items():
        done = {SERVERS[key].title: of for key, of in by_server.items() if of.values}
        for of in done.values():
            speech += of.values.get("speech", [])
        if not scenarios[name].in_flight or not done:
            continue
        share, busiest = max((of.median("crowd busy"), who) for who, of in done.items())
        most = sorted((-of.median("deliveries"), who) for who, of in done.items())
        taken = ", ".join(f"{short(-median)} from {who}" for median, who in most[:3])
        yield f"{name}: busy {share:.0%} at most ({busiest}); took {taken} a second."
        waits = [
            title
            for title, of in done.items()
            if of.median("crowd busy") + of.median("server busy") < 0.9
        ]
        if waits:
            yield f"{name}: both sides waited, for other programs? {', '.join(waits)}"
    yield (
        f"Nobody said more than {max(speech) / 1024:.1f} KiB a second; "
        f"chat.py slows down who says more than {SPEECH_LIMIT // 1024}."
    )


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
    for ticks in ("xtick", "ytick"):
        matplotlib.rc(ticks, labelcolor=INK)
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
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="x", color=BAR, linewidth=0.5)
        axes.set_axisbelow(True)
        for key, median in medians.items():
            colour = ACCENT if key == "chat" else BAR
            bar = (keys.index(key), median - start, 0.64, start)
            if SERVERS[key].floor:
                axes.barh(*bar, color="none", edgecolor=BAR, hatch="/////", linewidth=0)
            else:
                axes.barh(*bar, color=colour)
            axes.annotate(
                short(median),
                (median, keys.index(key)),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=ACCENT if key == "chat" else INK,
            )
        better = "more" if metric in ("deliveries", "logins") else "less"
        title = f"{titles[name]}\n{TITLES[metric]}: {better} is better"
        axes.set_title(title, loc="left", fontsize=9, pad=8)
        axes.set_yticks(range(len(keys)), [SERVERS[key].title for key in keys])
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelsize=7)
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
    columns = [
        (name, metric)
        for name, scenario in scenarios.items()
        for metric in scenario.metrics
        if metric not in ("p50", "p99")
        and any(metric in result.values for result in results[name].values())
    ]
    print("".join(f"{what}: {value}\n" for what, value in conditions.items()))
    print(f"Medians and × ratios to chat.py\n\n{overview(results, columns)}")
    print("Median (least–most) × ratio to chat.py\n")
    for name, scenario in scenarios.items():
        print(f"{titles[name]}\n\n{details(results[name], scenario.metrics)}")
    print(*notes(results, scenarios), sep="\n")
    paced = [name for name, scenario in scenarios.items() if scenario.rate]
    panels = [c for c in columns if c[0] not in paced[:-1] and c[1] != "list"]
    if svg and panels:
        caption = f"log scales, medians; {conditions['date']}, {conditions['machine']}"
        draw(results, panels, titles, caption, svg)


def main() -> int:
    """Measure what the command line asks for, report it, return the exit status."""
    parser = argparse.ArgumentParser(description="Compare chat.py with other chats")
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of quiet, lively, busy")
    add("--rounds", type=int, help="3 if not given, 1 if --quick")
    add("--servers", metavar="A,B", help=f"of {', '.join(SERVERS)}; all if not given")
    add("--scenarios", metavar="X,Y", help=f"of {', '.join(SCENARIOS)}")
    add("--json", metavar="FILE", type=Path, help="all that was measured")
    add("--svg", metavar="FILE", type=Path, help="a picture of it")
    args = parser.parse_args()
    known = SCENARIOS | QUICK if args.quick else SCENARIOS
    servers = args.servers.split(",") if args.servers else list(SERVERS)
    names = (
        args.scenarios.split(",")
        if args.scenarios
        else [*(QUICK if args.quick else SCENARIOS)]
    )
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
    if args.json:
        record = {"conditions": conditions, "left out": left_out, "results": results}
        args.json.write_text(json.dumps(record, default=vars, indent=1) + "\n")
    chat = [by_server["chat"] for by_server in results.values() if "chat" in by_server]
    return int("chat" in left_out or any(result.faults for result in chat))


if __name__ == "__main__":
    sys.exit(main())
