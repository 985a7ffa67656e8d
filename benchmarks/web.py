"""The live API: 200 WebSocket clients, each with the rolling rows of 20 symbols, for a minute, and one that stalls.

A writer commits the rows of all symbols at the same moment of each second (of a market's many clocks the worst case),
rows of the second and fixed candles beside them; a sink stores them; the web process tells them. Delivery is counted
from the entry's time on the bus (its id, in ms) to the client's having it, in a process of all clients.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from websockets.client import ClientProtocol
from websockets.uri import parse_uri

from benchmarks.pipeline import PARTITIONS, workers
from services.web.places import place_of_text
from shared.bus import Bus
from shared.frames import CANDLE, FIXED, NS, Frame, Rows
from shared.instruments import partition_of
from shared.redis_server import EmbeddedRedis

SYMBOLS = [f"{letter}{n}" for letter in "ABCD" for n in range(5)]
HISTORY = 60
WARM_SECONDS = 10


def run(clients: int = 200, seconds: int = 60) -> dict[str, Any]:
    """Delivery in ms, the web process's memory in MiB and its share of a core, what became of the stalled client."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = EmbeddedRedis(folder)
        server.start()
        bus = Bus(server.url)
        bus.deploy(PARTITIONS)
        bus.identity()
        port = _free_port()
        settings = {
            "TAPELINE_PARTITIONS": str(PARTITIONS), "TAPELINE_STORE": f"sqlite:///{folder / 'bench.db'}",
            "TAPELINE_WEB_PORT": str(port), "TAPELINE_WEB_REQUESTS_PER_SECOND": "100000",
        }  # fmt: skip
        stop = threading.Event()
        market = threading.Thread(target=_market, args=(bus.clone(), stop))
        try:
            with workers(folder, server.url, [["sink-sqlite"], ["web"]], **settings) as running:
                _until_up(port)
                market.start()
                time.sleep(WARM_SECONDS)
                return _measure(port, running[1], clients, seconds)
        finally:
            stop.set()
            market.join()
            bus.close()
            server.stop()


def _measure(port: int, web: subprocess.Popen[bytes], clients: int, seconds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    process = context.Process(target=_clients, args=(port, clients, seconds, found))
    process.start()
    stalled = Stalled(port)
    subscribed = found.get(timeout=120)
    began, cpu, rss = time.monotonic(), _cpu(web.pid), [_rss(web.pid)]
    for _ in range(seconds):
        time.sleep(1)
        rss.append(_rss(web.pid))
    share = (_cpu(web.pid) - cpu) / (time.monotonic() - began)
    ms, missing = found.get(timeout=120)
    process.join()
    p50, p99 = np.percentile(ms, [50, 99])
    settled = rss[len(rss) // 3]  # once the buffers are as large as they get
    return {
        "clients": clients, "symbols": len(SYMBOLS), "seconds": seconds, "messages": len(ms), "rows_missing": missing,
        "p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1), "max_ms": round(float(np.max(ms)), 1),
        "all_subscribed_seconds": round(subscribed, 2), "web_core_share": round(share, 2),
        "rss_mib": {"at first": rss[0], "after a third": settled, "at last": rss[-1], "most": max(rss)},
        "stalled_client": stalled.end(),
    }  # fmt: skip


class Stalled:
    """A client that asks for far more than it ever reads."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect(("127.0.0.1", port))
        self._socket.settimeout(10)
        self._protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/api/v1/ws"))
        self._protocol.send_request(self._protocol.connect())
        self._flush()
        while self._protocol.state.name == "CONNECTING":
            self._protocol.receive_data(self._socket.recv(4096))
        for n in range(150):
            ask = _subscribe(f"{n}", SYMBOLS[n % len(SYMBOLS)]) | {"history": 1000}
            self._protocol.send_text(json.dumps(ask).encode())
        self._flush()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            self._socket.sendall(data)

    def end(self) -> str:
        """Read on: what the server has done with it."""
        try:
            while data := self._socket.recv(1 << 16):
                self._protocol.receive_data(data)
                self._protocol.events_received()
        except TimeoutError:
            return "still connected"
        except ConnectionError:
            pass
        finally:
            self._socket.close()
        told = self._protocol.close_rcvd
        return f"dropped, {told.code}: {told.reason}" if told else "cut off"


def _subscribe(sub: str, symbol: str) -> dict[str, Any]:
    return {
        "op": "subscribe", "sub": sub, "channel": "candles", "symbol": symbol, "timeframe": "rolling",
        "history": HISTORY,
    }  # fmt: skip


# -- the clients, in a process of their own --------------------------------------------------


def _clients(port: int, clients: int, seconds: int, found: Any) -> None:
    gc.disable()  # what is kept until the end would be looked through again and again
    found_of = asyncio.run(_follow(port, clients, seconds, found))
    late, missing = [], 0
    for at, text in found_of:
        message = json.loads(text)
        for cursor in place_of_text(message["id"], "candles").cursors.values():
            late.append(at * 1000 - int(cursor.stream_id.split("-")[0]))
        missing += message.get("skipped", 0)
    expected = clients * len(SYMBOLS) * seconds
    found.put((late, missing + max(0, expected - len(found_of) - 2 * clients * len(SYMBOLS))))


async def _follow(port: int, clients: int, seconds: int, found: Any) -> list[tuple[float, str]]:
    told: list[tuple[float, str]] = []
    started = asyncio.Event()
    began = time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        waiting = clients * len(SYMBOLS)

        async def one() -> None:
            nonlocal waiting
            async with session.ws_connect(f"http://127.0.0.1:{port}/api/v1/ws", max_msg_size=0) as socket:
                for symbol in SYMBOLS:
                    await socket.send_json(_subscribe(symbol, symbol))
                async for message in socket:
                    now = time.time()
                    if message.data.startswith('{"op":"snapshot"'):
                        waiting -= 1
                        if not waiting:
                            started.set()
                    elif started.is_set() and message.data.startswith('{"op":"rows"'):
                        told.append((now, message.data))

        tasks = [asyncio.create_task(one()) for _ in range(clients)]
        await started.wait()
        found.put(time.monotonic() - began)
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return told


# -- the market ------------------------------------------------------------------------------


def _market(bus: Bus, stop: threading.Event) -> None:
    """Every second the rows of all symbols, until stopped."""
    held: dict[int, list[tuple[str, str]]] = {}
    for symbol in SYMBOLS:
        held.setdefault(partition_of(symbol, PARTITIONS), []).append((symbol, f"{symbol}Z6"))
    seqs = dict.fromkeys(held, 0)
    for partition in held:
        bus.attach(partition, "bench", "bench")
    random = np.random.default_rng(1)
    second = int(time.time()) + 1
    while not stop.wait(max(0.0, second - time.time())):
        for partition, names in held.items():
            frames = [_frame(CANDLE, kind, names, second, random) for kind in ("candle_1m", "candle_1s")]
            if second % 15 == 0:
                frames.append(_frame(FIXED, "candle", names, second, random))
            seq = seqs[partition] + 1
            if bus.publish(partition, "bench", "bench", seq, frames, b"", "candles"):
                seqs[partition] += len(frames)
        second += 1
    bus.close()


def _frame(dtype: np.dtype[Any], kind: str, names: list[tuple[str, str]], second: int, random: Any) -> Frame:
    rows: Rows = np.zeros(len(names), dtype)
    for name in dtype.names or ():
        rows[name] = np.round(random.uniform(1, 5000, len(names)), 2) if dtype[name].kind == "f" else 1
    rows["low"], rows["high"] = rows["open"], rows["open"]
    rows["time_ns"], rows["name"], rows["revision"] = second * NS, np.arange(len(names)), 0
    rows["timestamp_out_ns"] = time.time_ns()
    if dtype is FIXED:
        rows["timeframe_sec"] = 15
    return Frame(kind, len(rows), second * NS, second * NS, "bench", rows.tobytes(), names=names)


# -- the machine -----------------------------------------------------------------------------


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _until_up(port: int) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)


def _rss(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
