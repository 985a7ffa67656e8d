"""The page in a real browser: it draws and moves, says what is wrong, is put right, and outlives its servers."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import psutil
import pytest

from shared.acks import signal_acks
from shared.bus import Bus
from shared.frames import NS, TICK, TRADE, Frame, Rows, ns_of
from shared.instruments import partition_of
from shared.messages import Gap, encode
from shared.stores import read_rows
from tests.browser.conftest import PHONE, Seen, answers
from tests.e2e.test_up import START_SECONDS
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = pytest.mark.heavy
PARTITIONS = 8
SHOWN = ("open", "high", "low", "close", "volume", "ask_volume", "bid_volume", "cvd_close", "revision", "complete")


# -- what the market says beside what it says by itself -----------------------------------------


def newest_trades(bus: Bus, root: str = "ES") -> Rows:
    """The newest trades of a root's front future that went over the bus, oldest first."""
    partition = partition_of(root, PARTITIONS)
    entries = bus.client.xrevrange(bus.keys.stream(partition, "ticks"), count=400)
    bodies = [fields[b"body"] for _, fields in entries if fields[b"kind"] == b"trade"]
    rows = np.frombuffer(b"".join(reversed(bodies)), TICK)
    rows = rows[(rows["kind"] == TRADE) & (rows["price"] > 1000)]  # its options cost less
    contracts, counts = np.unique(rows["instrument"], return_counts=True)
    return rows[rows["instrument"] == contracts[counts.argmax()]]  # the ticker's rows are of the front alone


def say(bus: Bus, kind: str, body: bytes, at_ns: int, root: str = "ES") -> None:
    frame = Frame(kind, 1, at_ns, at_ns, "by-hand", body)
    bus.call("xadd", bus.keys.stream(partition_of(root, PARTITIONS), "ticks"),
             dict(zip(*[iter(frame.fields(1))] * 2, strict=True)))  # fmt: skip


def trade(like: Rows, **changed: Any) -> bytes:
    row = like.copy()
    for name, value in changed.items():
        row[name] = value
    return row.tobytes()


# -- it draws, and moves ----------------------------------------------------------------------


def test_the_market_draws_and_moves(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="rolling")
    assert seen.value("t.rows") > 100, "ten minutes of market before it began"
    first = seen.value("t.last.at")
    seen.wait("t.last.at >= arg + 3 && !t.last.forming", first)
    assert seen.value("t.state.connection") == "live"
    assert seen.page.get_by_test_id("connection").get_attribute("data-state") == "ok"
    shown = seen.page.locator("#legend")
    seen.wait("document.querySelector('#legend .number[data-field=close]').textContent.trim() !== ''")
    assert int(shown.get_attribute("data-at") or 0) > first
    seen.shot("rolling-dark")
    # As drawn, so stored: the last minute of it, bar by bar.
    agrees(seen, seconds=60)


def agrees(seen: Seen, symbol: str = "ES", seconds: int = 0) -> int:
    """The page's rolling rows (of its last `seconds`) are the store's, none missing and none else; how many."""

    def told() -> bool:
        """Whether the store has got as far: with each row, and with each correction."""
        revisions = {ns_of(row["time"]) // NS: row["revision"] for row in rows}
        newest = shown[-1]["at"]
        return newest in revisions and all(revisions.get(b["at"], b["revision"]) >= b["revision"] for b in shown)

    shown = seen.value("t.market.bars.list.filter(b => !b.forming)")
    since = (shown[-1]["at"] - seconds if seconds else shown[0]["at"]) * NS
    rows: list[dict[str, Any]] = []

    def read() -> bool:
        rows[:] = read_rows(seen.stack.store, "candles_1m", {"ticker": symbol})
        return told()

    until(read, 20, "the store to have what is shown")
    wanted = {ns_of(row["time"]) // NS: row for row in rows if since <= ns_of(row["time"]) <= shown[-1]["at"] * NS}
    held = {bar["at"]: bar for bar in shown if bar["at"] * NS >= since}
    assert sorted(held) == sorted(wanted)
    for at, row in wanted.items():
        if held[at]["revision"] < row["revision"]:
            continue  # corrected since it was read from the page
        got = {name: held[at][name] for name in SHOWN if name in held[at]}
        assert got == {name: type(got[name])(row[name]) if got[name] is not None else row[name] for name in got}
    return len(wanted)


def test_symbol_and_timeframe_by_keyboard(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="1m")
    keys = seen.page.keyboard
    keys.press("/")
    keys.type("NQ")
    seen.page.locator("#symbols [role=option][data-name=NQ]").wait_for()
    keys.press("Enter")
    seen.wait("t.state.symbol.name === 'NQ' && t.rows > 0")
    seen.page.locator("#chart").focus()
    names = seen.value("t.state.meta.timeframes")
    keys.press(str(names.index("15s") + 1))
    seen.wait("t.state.timeframe === '15s' && t.rows > 10")
    assert seen.page.locator("button[data-timeframe='15s']").get_attribute("aria-pressed") == "true"
    assert "symbol=NQ&timeframe=15s" in seen.page.url
    seen.page.go_back()
    seen.wait("t.state.timeframe === '1m' && t.state.symbol.name === 'NQ' && t.rows > 0")
    keys.press("t")
    seen.page.locator("#table tr[data-at]").first.wait_for()
    cells = seen.page.locator("#table tr[data-at]").first.inner_text()
    assert any(c.isdigit() for c in cells)
    seen.shot("table")
    keys.press("?")
    seen.page.locator("#help[open]").wait_for()
    keys.press("Escape")


def test_a_late_trade_corrects_its_candle_in_place(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="rolling")
    seen.value("t.market.addEventListener('change', e => (window.said ??= []).push("
               "...e.detail.filter(c => c.what === 'corrected').map(c => c.bar.at)))")  # fmt: skip
    shown = seen.value("t.last.at")
    with seen.stack.bus() as bus:
        like = newest_trades(bus)[-1:]
        high = float(like["price"][0]) + 4
        at = (shown - 15) * NS
        say(bus, "trade", trade(like, ts_event_ns=at, price=high, size=3.0), at)
    seen.wait("(window.said ?? []).includes(arg)", shown - 5)
    bar = seen.value("t.market.bars.byTime.get(arg)", shown - 5)
    assert bar["revision"] > 0
    assert bar["high"] >= high - 1e-9
    seen.shot("corrected")
    agrees(seen, seconds=90)


def test_a_gap_is_hatched(seen: Seen) -> None:
    seen.open(symbol="CL", timeframe="rolling")
    with seen.stack.bus() as bus:
        end = int(newest_trades(bus)["ts_event_ns"][-1]) - 30 * NS
        gap = Gap("synthetic", end - 20 * NS, end, "said so by a test", ())
        say(bus, "gap", encode([gap]), end, "CL")
    seen.wait(
        "t.market.bars.list.filter(b => b.complete === false && Math.abs(b.at - arg) < 60).length >= 20", end // NS
    )
    seen.page.locator("#chart").focus()
    seen.value("t.chart.goTo(arg)", end // NS)
    seen.shot("gap")
    assert warned(seen), "a hatched band in the colour of warnings"
    until(lambda: read_rows(seen.stack.store, "gaps", {}), 10, "the gap in the store")


def warned(seen: Seen) -> bool:
    """Whether a canvas has pixels near the colour of warnings."""
    return bool(seen.value(
        "(() => { const p = document.createElement('canvas').getContext('2d'); p.fillStyle = t.theme.colour('--warn');"
        " p.fillRect(0, 0, 1, 1); const [r, g, b] = p.getImageData(0, 0, 1, 1).data;"
        " return [...document.querySelectorAll('#chart canvas')].some(c => { if (!c.width || !c.height) return false;"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 0 && Math.abs(d[i] - r) < 40"
        " && Math.abs(d[i + 1] - g) < 40 && Math.abs(d[i + 2] - b) < 40) return true; return false; }); })()"
    ))  # fmt: skip


def test_a_big_trade_is_marked(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="15s")
    before = seen.value("[...t.market.big.values()].reduce((n, b) => n + b.volume, 0)")
    with seen.stack.bus() as bus:
        like = newest_trades(bus)[-1:]
        at = int(like["ts_event_ns"][0])
        say(bus, "trade", trade(like, size=500.0, side=1), at)
    seen.wait("[...t.market.big.values()].reduce((n, b) => n + b.volume, 0) >= arg + 500", before)
    seen.wait("t.marks > 0 && t.view.marks.layers.get('big').length > 0")
    seen.shot("big-trade")


# -- options ----------------------------------------------------------------------------------


def test_a_signal_has_its_why_its_place_and_is_acknowledged(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="1m")
    page = seen.page
    signal_ = page.locator("li.signal[data-status=emitted][data-underlying=ES]").first
    signal_.wait_for()
    key = signal_.get_attribute("data-key")
    assert key
    signal_ = page.locator(f"li.signal[data-key='{key}']")
    signal_.get_by_test_id("signal-toggle").click()
    why = signal_.get_by_test_id("signal-why")
    why.wait_for()
    assert "earlier windows of this option" in why.inner_text()
    assert signal_.get_by_test_id("signal-toggle").get_attribute("aria-expanded") == "true"
    # The chart has gone there, and marks it.
    seen.wait("t.market.bars.list.length > 0 && t.market.bars.list[0].at < Date.now() / 1000 - 86400 && t.marks > 0")
    seen.shot("signal")
    page.get_by_test_id("signals-by").fill("ada")
    signal_.get_by_test_id("signal-ack").click()
    seen.wait("document.querySelector(`li.signal[data-key='${arg}']`).dataset.acked === 'true'", key)
    with seen.stack.bus() as bus:
        assert [ack.by for ack in signal_acks(bus)] == ["ada"]
    page.reload()
    seen.wait("document.querySelector(`li.signal[data-key='${arg}']`)?.dataset.acked === 'true'", key)


def test_pressure_and_pipeline(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="1m")
    page = seen.page
    seen.wait("Number(document.querySelector('[data-testid=heatmap-canvas]')?.dataset.cells) > 0")
    page.get_by_test_id("heatmap-view").click()
    page.get_by_test_id("heatmap-table").wait_for()
    assert page.get_by_test_id("heatmap-table").locator("td[data-strike]").count() > 0
    page.get_by_test_id("heatmap-view").click()
    strip = page.get_by_test_id("pipeline-strip")
    seen.wait("['ok', 'warn'].includes(document.querySelector('[data-testid=pipeline-strip]').dataset.state)")
    page.get_by_test_id("pipeline-toggle").click()
    workers = page.get_by_test_id("pipeline-workers").inner_text()
    for service in ("aggregate", "pressure", "signals", "sink-sqlite", "web"):
        assert service in workers
    seen.shot("pressure-pipeline")
    assert strip.is_visible()


# -- what is wrong is said, and passes ---------------------------------------------------------


def process(seen: Seen, what: str) -> psutil.Process:
    def find() -> psutil.Process | None:
        for one in below(seen.stack.folder):
            line = " ".join(one.cmdline())
            if f"run {what}" in line or (what == "redis" and one.name().startswith("redis-server")):
                return one
        return None

    found = until(find, START_SECONDS, f"a living {what}")
    assert found is not None
    return found


def test_stale_is_said_and_unsaid(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="rolling")
    feed = process(seen, "ingest-synthetic")
    feed.send_signal(signal.SIGSTOP)
    try:
        seen.wait("document.querySelector('#connection').dataset.state === 'bad'", timeout=30)
        assert "stale" in seen.page.locator("#connection-text").inner_text()
        seen.shot("stale")
    finally:
        feed.send_signal(signal.SIGCONT)
    seen.wait("document.querySelector('#connection').dataset.state === 'ok'", timeout=30)


def test_restarts_of_web_and_redis_leave_no_trace(seen: Seen) -> None:
    seen.open(symbol="ES", timeframe="rolling")
    seen.torn = True
    web = process(seen, "web")
    os.kill(web.pid, signal.SIGKILL)
    seen.wait("t.live.state === 'reconnecting'")
    seen.shot("reconnecting")
    until(lambda: answers(seen.stack.url), START_SECONDS, "the server to be back")
    on = seen.value("t.last.at")
    seen.wait("t.live.state === 'live' && t.last.at > arg + 2", on, 40)
    agrees(seen)
    before = seen.value("t.last.at")
    process(seen, "redis").kill()
    seen.wait("t.last.at > arg + 4", before, 40)
    seen.wait("document.querySelector('#connection').dataset.state === 'ok'", timeout=30)
    assert agrees(seen) > 60
    assert not seen.value("t.market.detached")
    for notice in ("signals-notice", "heatmap-notice"):
        seen.wait("document.querySelector(`[data-testid=${arg}]`)?.hidden ?? true", notice)


# -- looks ------------------------------------------------------------------------------------


TOO_WIDE = (
    "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    ".map(e => e.outerHTML.slice(0, 90)).slice(0, 5)"
)


@pytest.mark.parametrize("seen", [pytest.param(None, id="desk"), pytest.param(PHONE, id="phone")], indirect=True)
def test_looks(seen: Seen) -> None:
    size = "phone" if (seen.page.viewport_size or {})["width"] == PHONE["width"] else "desk"
    for theme in ("dark", "light"):
        seen.open(symbol="ES", timeframe="15s", theme=theme)
        assert seen.page.locator("html").get_attribute("data-theme") == theme
        wide = seen.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{size} scrolls {wide} px to the side: {seen.value(TOO_WIDE)}"
        seen.wait("Number(document.querySelector('[data-testid=heatmap-canvas]')?.dataset.cells) > 0")
        seen.shot(f"{size}-{theme}")
        seen.page.screenshot(path=seen.shots / f"{size}-{theme}-whole.png", full_page=True)
    assert nameless(seen) == []


CONTROLS = frozenset((
    "button", "link", "textbox", "combobox", "listbox", "checkbox", "radio", "slider", "spinbutton", "searchbox",
    "switch", "option", "application", "img", "image", "dialog", "radiogroup", "table", "grid", "region",
))  # fmt: skip


def nameless(seen: Seen) -> list[str]:
    """Controls that a screen reader has no name for."""
    cdp = seen.page.context.new_cdp_session(seen.page)
    nodes = cdp.send("Accessibility.getFullAXTree")["nodes"]
    assert sum(n.get("role", {}).get("value") == "button" for n in nodes) > 10
    assert seen.page.get_by_test_id("heatmap-canvas").get_attribute("aria-label"), "the map says what it is"
    roles = {n["nodeId"]: n.get("role", {}).get("value", "").lower() for n in nodes}
    return [
        cdp.send("DOM.getOuterHTML", {"backendNodeId": n["backendDOMNodeId"]})["outerHTML"][:200]
        for n in nodes
        if not n.get("ignored") and roles[n["nodeId"]] in CONTROLS
        and not str(n.get("name", {}).get("value", "")).strip()
        and roles.get(n.get("parentId", "")) != "link"  # a picture in a link has the link's name
    ]  # fmt: skip
