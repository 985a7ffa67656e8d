"""The slow and obvious aggregator: it keeps every trade and looks at all of them again for each row.

Written from the definitions alone, in plain Python, to hold the compiled kernel against. Prices in
tests are multiples of 1/4 and sizes whole, so that sums are exact in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

NS = 1_000_000_000


@dataclass
class Trade:
    contract: str
    ts: int
    price: float
    size: float
    side: int
    bid: float = math.nan
    ask: float = math.nan
    bid_sz: float = 0.0
    ask_sz: float = 0.0


@dataclass
class Clock:
    ts: int
    watched_from: int | None = None


@dataclass
class Gap:
    start: int
    end: int
    symbols: tuple[str, ...] = ()


@dataclass
class Oracle:
    """One feed, its contracts {symbol: (root, expiry)}, market hours as [(open, close)] in ns."""

    contracts: dict[str, tuple[str, int]]
    sessions: list[tuple[int, int]]
    max_lateness: int = 120 * NS
    quiet: int = 300
    big: float = 25.0
    seed: float = 0.0
    trades: list[Trade] = field(default_factory=list)
    by_second: dict[tuple[str, int], list[Trade]] = field(default_factory=dict)
    counted: dict[tuple[str, int, int], list[Trade]] = field(default_factory=dict)
    late: list[Trade] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    outside: int = 0
    watermark: int = -1
    closed: int = -1
    watched: int = -1
    first_watched: int = -1
    front: dict[str, str | None] = field(default_factory=dict)
    judged: set[str] = field(default_factory=set)
    front_of: dict[tuple[str, int], str | None] = field(default_factory=dict)  # (root, end second)
    revision: dict[tuple[str, int], int] = field(default_factory=dict)  # rows of candles_1m that exist
    revision_1s: dict[tuple[str, int], int] = field(default_factory=dict)
    warm: dict[str, int] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    prices: dict[str, list[float]] = field(default_factory=dict)

    def take(self, event: Trade | Clock | Gap) -> None:
        if isinstance(event, Gap):
            self._gap(event)
        elif isinstance(event, Clock):
            since = event.watched_from if self.watched >= 0 else event.watched_from or event.ts
            if since is not None and since > self.watched:
                self._watch(since)
            self._advance(event.ts)
        else:
            if self.watched < 0:
                self._watch(event.ts)
            self._advance(event.ts)
            self._trade(event)

    # -- time --------------------------------------------------------------------------------

    def _watch(self, since: int) -> None:
        # What nobody watched is missing: the rest of the second, or all since the old end.
        self.gaps.append(Gap(since // NS * NS if self.closed < 0 else self.watermark, since))
        if self.closed < 0:
            self.closed, self.watermark = since // NS, since
            self.first_watched = since
        else:
            for c in self.contracts:
                self.warm[c] = 1 << 60
            self._advance(since)
        self.watched = since
        for c in self.contracts:
            self.warm[c] = self._market_second(-(-since // NS), 60)

    def _market_second(self, start: int, need: int) -> int:
        second = start
        while need:
            need -= self._open(second * NS)
            second += 1
        return second

    def _open(self, ts: int) -> bool:
        return any(a <= ts < b for a, b in self.sessions)

    def _advance(self, ts: int) -> None:
        while self.closed < ts // NS:
            for root in {root for root, _ in self.contracts.values()}:
                self._close(root, self.closed + 1)
            self.closed += 1
        self.watermark = max(self.watermark, ts)

    def _in(self, contract: str, a: int, b: int) -> list[Trade]:
        """Trades of seconds [a, b), second by second, in order of arrival within each."""
        return [t for second in range(a, b) for t in self.by_second.get((contract, second), ())]

    def _close(self, root: str, end: int) -> None:
        mine = [c for c, (r, _) in self.contracts.items() if r == root]
        if self.front.get(root) is None:
            traded = [c for c in mine if self._in(c, end - 1, end)]
            if traded:
                self.front[root] = min(traded, key=lambda c: (-self._volume(c, end - 1, end), self.contracts[c][1]))
        front = self.front.get(root)
        self.front_of[root, end] = front
        if front is not None and end >= self.warm[front] and self._in(front, end - 60, end):
            self.revision[root, end] = 0
        for c in mine:
            if self._in(c, end - 1, end):
                self.revision_1s[c, end - 1] = 0
        if end % 60 == 0:
            self._judge(root, mine, end)

    def _volume(self, contract: str, a: int, b: int) -> float:
        return sum(t.size for t in self._in(contract, a, b))

    def _judge(self, root: str, mine: list[str], end: int) -> None:
        held = self.front.get(root)
        volume = {c: self._volume(c, end - 300, end) for c in mine}
        free = root not in self.judged or held is None
        able = [c for c in mine if free or self.contracts[c][1] >= self.contracts[held][1]]
        best = min(able, key=lambda c: (-volume[c], c != held, self.contracts[c][1]))
        if volume[best] > 0:
            self.front[root] = best
            self.judged.add(root)

    # -- trades ------------------------------------------------------------------------------

    def _trade(self, t: Trade) -> None:
        if not self._open(t.ts):
            self.outside += 1
            return
        root, second = self.contracts[t.contract][0], t.ts // NS
        is_late = second < self.closed
        if is_late and (self.watermark - t.ts > self.max_lateness or (root, second + 1) not in self.front_of):
            self.late.append(t)
            return
        t = Trade(**{**t.__dict__, "side": t.side or self._classify(t)})
        if not is_late:
            self.prices.setdefault(t.contract, []).append(t.price)
        self.trades.append(t)
        self.by_second.setdefault((t.contract, second), []).append(t)
        newest = self.newest.get(t.contract)
        if newest is None or second > newest:
            if newest is not None and second - newest - 1 > self.quiet:
                warm = self._market_second(newest + 1 + self.quiet, 60)
                self.warm[t.contract] = max(self.warm[t.contract], warm)
            self.newest[t.contract] = second
        if is_late:
            self._correct(t, root, second)

    def _classify(self, t: Trade) -> int:
        if t.bid < t.ask:
            if t.price >= t.ask or t.price <= t.bid:
                return 1 if t.price >= t.ask else -1
            if t.ask - t.price != t.price - t.bid:
                return 1 if t.ask - t.price < t.price - t.bid else -1
        different = [p for p in self.prices.get(t.contract, []) if p != t.price]
        if not different:
            return 0
        return 1 if t.price > different[-1] else -1

    def _correct(self, t: Trade, root: str, second: int) -> None:
        self.revision_1s[t.contract, second] = self.revision_1s.get((t.contract, second), -1) + 1
        counts = self.front_of[root, second + 1] == t.contract and t.side != 0
        for end in range(second + 1, self.closed + 1):
            front = self.front_of[root, end]
            holds = front == t.contract and end <= second + 60
            if counts and end > second + 1 and (front, end - 1) in self.revision_1s:
                self.revision_1s[front, end - 1] += 1
            exists = (root, end) in self.revision
            if (holds and (exists or end >= self.warm[t.contract])) or (counts and exists):
                self.revision[root, end] = self.revision.get((root, end), -1) + 1

    # -- gaps --------------------------------------------------------------------------------

    def _touches(self, gap: Gap, contract: str, a: int, b: int) -> bool:
        return (not gap.symbols or contract in gap.symbols) and gap.start < b * NS and gap.end > a * NS

    def _whole(self, contract: str, a: int, b: int) -> bool:
        return not any(self._touches(g, contract, a, b) for g in self.gaps)

    def _gap(self, gap: Gap) -> None:
        for (root, end), revision in self.revision.items():
            front = self.front_of[root, end]
            if self._touches(gap, front, end - 60, end) and self._whole(front, end - 60, end):
                self.revision[root, end] = revision + 1
        for (contract, second), revision in self.revision_1s.items():
            if self._touches(gap, contract, second, second + 1) and self._whole(contract, second, second + 1):
                self.revision_1s[contract, second] = revision + 1
        self.gaps.append(gap)

    # -- rows --------------------------------------------------------------------------------

    def _cvd(self, root: str, end: int, session: bool = False) -> float:
        opened = max((a for a, _ in self.sessions if a <= (end - 1) * NS), default=0)
        total = 0.0 if session else self.seed
        for t in self._counted(root):
            if t.ts // NS < end and (not session or t.ts >= opened):
                total += t.side * t.size
        return total

    def _counted(self, root: str) -> list[Trade]:
        """Trades of whichever contract was in front in their second."""
        if (root, len(self.trades), self.closed) not in self.counted:
            mine = [t for t in self.trades if self.front_of.get((root, t.ts // NS + 1)) == t.contract]
            self.counted = {**self.counted, (root, len(self.trades), self.closed): mine}
        return self.counted[root, len(self.trades), self.closed]

    def _row(self, contract: str, root: str, a: int, b: int, cvd: float, session: float) -> dict[str, float]:
        ts = self._in(contract, a, b)
        buy = sum(t.size for t in ts if t.side > 0)
        sell = sum(t.size for t in ts if t.side < 0)
        run, path = 0.0, [0.0]
        for t in ts:
            run += t.side * t.size
            path.append(run)
        first = min(ts, key=lambda t: t.ts)
        last = max(enumerate(ts), key=lambda it: (it[1].ts, it[0]))[1]
        depth_bid, depth_ask = sum(t.bid_sz for t in ts), sum(t.ask_sz for t in ts)
        volume = sum(t.size for t in ts)
        spreads = [t.ask - t.bid for t in ts if t.bid < t.ask]
        pct = (last.price - first.price) / first.price * 10_000.0 if first.price else math.nan
        ratio = (buy - sell) / (buy + sell) if buy + sell else 0.0
        quiet = abs(pct) < 0.5 or abs(ratio) < 0.1
        big = [t.size for t in ts if t.size >= self.big]
        value = sum(t.price * t.size for t in ts)
        return {
            "open": first.price, "high": max(t.price for t in ts), "low": min(t.price for t in ts),
            "close": last.price, "volume": volume, "trades": len(ts), "ask_volume": buy, "bid_volume": sell,
            "unknown_volume": volume - buy - sell, "cvd_open": cvd - run, "cvd_high": cvd - run + max(path),
            "cvd_low": cvd - run + min(path), "cvd_close": cvd, "session_cvd_close": session, "vd": run,
            "vd_ratio": ratio,
            "book_imbalance": (depth_bid - depth_ask) / (depth_bid + depth_ask) if depth_bid + depth_ask else math.nan,
            "price_pct": pct, "divergence": 0 if quiet else 1 if pct > 0 > ratio else -1 if pct < 0 < ratio else 0,
            "max_trade_size": max(t.size for t in ts), "big_trades": len(big), "big_volume": sum(big),
            "sum_bid_depth": depth_bid, "sum_ask_depth": depth_ask, "sum_price_volume": value,
            "vwap": value / volume, "avg_spread": sum(spreads) / len(spreads) if spreads else math.nan,
            "complete": int(self._whole(contract, a, b)),
        }  # fmt: skip

    def candles_1m(self) -> dict[tuple[str, int], dict[str, float]]:
        """{(ticker, window end second): columns} as they finally stand."""
        rows = {}
        for (root, end), revision in self.revision.items():
            front = self.front_of[root, end]
            row = self._row(front, root, end - 60, end, self._cvd(root, end), self._cvd(root, end, session=True))
            rows[root, end] = {**row, "symbol": front, "revision": revision}
        return rows

    def candles_1s(self) -> dict[tuple[str, int], dict[str, float]]:
        """{(symbol, second): columns} as they finally stand."""
        rows = {}
        for (contract, second), revision in self.revision_1s.items():
            root = self.contracts[contract][0]
            front = self.front_of[root, second + 1] == contract
            cvd = self._cvd(root, second + 1) if front else math.nan
            session = self._cvd(root, second + 1, session=True) if front else math.nan
            row = self._row(contract, root, second, second + 1, cvd, session)
            rows[contract, second] = {**row, "revision": revision}
        return rows
