"""All arrays of a partition behind one argument.

Calling compiled code costs about 0.15 µs for each array handed over, which dominates at frames of a
few ticks. So the arrays' addresses travel in one int64 table (address, rows) and are opened inside.
Whoever holds the table keeps the arrays alive (`core.PartitionState` does).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from services.aggregate.layout import (
    BAR,
    CACHE,
    CHUNK,
    CLOSED,
    CONTRACT,
    ENTITY,
    FEATURE_STATE,
    FEED,
    GAP,
    MINUTE,
    MINUTES,
    PARAMS,
    ROOT,
    SUMMARY,
    TIMEFRAME,
)  # fmt: skip
from shared.compiled import jit, jit_inline
from shared.frames import CANDLE, FIXED, Rows

WINDOW = 60


class Arrays(NamedTuple):
    """C contracts, G of them with rings, K roots, R ring seconds (a power of two), E entities, S slots.

    F timeframes have features. See `layout` for the dtypes.
    """

    feeds: Rows  # FEED
    contracts: Rows  # CONTRACT (C)
    ring: Rows  # SUMMARY (G, R): second s is in column s mod R
    minutes: Rows  # MINUTE (C, MINUTES)
    roots: Rows  # ROOT (K)
    closes: Rows  # CLOSED (K, R): the window ending at second s is in column s mod R
    sessions: Rows  # int64 (n, 2)
    gaps: Rows  # GAP
    table_key: Rows  # int64, open addressing: instrument id or 0
    table_value: Rows  # int64: contract index, -1 unknown, -2 not candled
    params: Rows  # PARAMS (1)
    out_1m: Rows  # CANDLE
    out_1s: Rows  # CANDLE
    counters: Rows  # int64, see layout.COUNTERS
    ring_dirty: Rows  # int8 (G, R / CHUNK)
    close_dirty: Rows  # int8 (K, R / CHUNK)
    cache: Rows  # CACHE (K)
    suffix: Rows  # SUMMARY (K, WINDOW)
    prefix: Rows  # SUMMARY (K)
    scratch: Rows  # SUMMARY (2)
    timeframes: Rows  # TIMEFRAME
    entities: Rows  # ENTITY (E)
    bars: Rows  # BAR (E, S): slot i of a timeframe is in column `at` + i
    features: Rows  # float64 (E, F, 2, FEATURE_STATE): behind the newest candle; behind those that may change
    out_fixed: Rows  # FIXED
    row: Rows  # FIXED (1): a row that is not emitted
    features_now: Rows  # float64 (1, FEATURE_STATE)
    contract_dirty: Rows  # int8 (C)
    entity_dirty: Rows  # int8 (E)
    bar_dirty: Rows  # int8 (E, S)
    feature_dirty: Rows  # int8 (E, F)


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


def table_of(arrays: Arrays) -> Rows:
    """The address table of these arrays, and R, S and F behind it: int64."""
    for name, array in zip(Arrays._fields, arrays, strict=True):
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise ValueError(f"{name} must be writeable and contiguous")
    pairs = [(a.ctypes.data, a.shape[0]) for a in arrays]
    sizes = [arrays.ring.shape[1], arrays.bars.shape[1], arrays.features.shape[1]]
    return np.array([number for pair in pairs for number in pair] + sizes, np.int64)


# One function for each array, so that code which needs a few of them is not handed all (a compiled function with
# `Arrays` as argument takes a quarter of a second longer to compile).


feeds: Any = jit(lambda t: carray(_pointer(t[0]), (t[1],), FEED))
contracts: Any = jit(lambda t: carray(_pointer(t[2]), (t[3],), CONTRACT))
ring: Any = jit(lambda t: carray(_pointer(t[4]), (t[5], t[62]), SUMMARY))
minutes: Any = jit(lambda t: carray(_pointer(t[6]), (t[7], MINUTES), MINUTE))
roots: Any = jit(lambda t: carray(_pointer(t[8]), (t[9],), ROOT))
closes: Any = jit(lambda t: carray(_pointer(t[10]), (t[11], t[62]), CLOSED))
sessions: Any = jit(lambda t: carray(_pointer(t[12]), (t[13], 2), np.int64))
gaps: Any = jit(lambda t: carray(_pointer(t[14]), (t[15],), GAP))
table_key: Any = jit(lambda t: carray(_pointer(t[16]), (t[17],), np.int64))
table_value: Any = jit(lambda t: carray(_pointer(t[18]), (t[19],), np.int64))
params: Any = jit(lambda t: carray(_pointer(t[20]), (t[21],), PARAMS))
out_1m: Any = jit(lambda t: carray(_pointer(t[22]), (t[23],), CANDLE))
out_1s: Any = jit(lambda t: carray(_pointer(t[24]), (t[25],), CANDLE))
counters: Any = jit(lambda t: carray(_pointer(t[26]), (t[27],), np.int64))
ring_dirty: Any = jit(lambda t: carray(_pointer(t[28]), (t[29], t[62] // CHUNK), np.int8))
close_dirty: Any = jit(lambda t: carray(_pointer(t[30]), (t[31], t[62] // CHUNK), np.int8))
cache: Any = jit(lambda t: carray(_pointer(t[32]), (t[33],), CACHE))
suffix: Any = jit(lambda t: carray(_pointer(t[34]), (t[35], WINDOW), SUMMARY))
prefix: Any = jit(lambda t: carray(_pointer(t[36]), (t[37],), SUMMARY))
scratch: Any = jit(lambda t: carray(_pointer(t[38]), (t[39],), SUMMARY))
timeframes: Any = jit(lambda t: carray(_pointer(t[40]), (t[41],), TIMEFRAME))
entities: Any = jit(lambda t: carray(_pointer(t[42]), (t[43],), ENTITY))
bars: Any = jit(lambda t: carray(_pointer(t[44]), (t[45], t[63]), BAR))
features: Any = jit(lambda t: carray(_pointer(t[46]), (t[47], t[64], 2, FEATURE_STATE), np.float64))
out_fixed: Any = jit(lambda t: carray(_pointer(t[48]), (t[49],), FIXED))
row: Any = jit(lambda t: carray(_pointer(t[50]), (t[51],), FIXED))
features_now: Any = jit(lambda t: carray(_pointer(t[52]), (t[53], FEATURE_STATE), np.float64))
contract_dirty: Any = jit(lambda t: carray(_pointer(t[54]), (t[55],), np.int8))
entity_dirty: Any = jit(lambda t: carray(_pointer(t[56]), (t[57],), np.int8))
bar_dirty: Any = jit(lambda t: carray(_pointer(t[58]), (t[59], t[63]), np.int8))
feature_dirty: Any = jit(lambda t: carray(_pointer(t[60]), (t[61], t[64]), np.int8))


@jit_inline
def open_arrays(t: Rows) -> Arrays:
    """The arrays behind an address table (compiled code only).

    Written out, and compiled into its callers: else they look up every address and stride again, and the trade
    loop runs at a quarter of its speed.
    """
    return Arrays(
        carray(_pointer(t[0]), (t[1],), FEED),
        carray(_pointer(t[2]), (t[3],), CONTRACT),
        carray(_pointer(t[4]), (t[5], t[62]), SUMMARY),
        carray(_pointer(t[6]), (t[7], MINUTES), MINUTE),
        carray(_pointer(t[8]), (t[9],), ROOT),
        carray(_pointer(t[10]), (t[11], t[62]), CLOSED),
        carray(_pointer(t[12]), (t[13], 2), np.int64),
        carray(_pointer(t[14]), (t[15],), GAP),
        carray(_pointer(t[16]), (t[17],), np.int64),
        carray(_pointer(t[18]), (t[19],), np.int64),
        carray(_pointer(t[20]), (t[21],), PARAMS),
        carray(_pointer(t[22]), (t[23],), CANDLE),
        carray(_pointer(t[24]), (t[25],), CANDLE),
        carray(_pointer(t[26]), (t[27],), np.int64),
        carray(_pointer(t[28]), (t[29], t[62] // CHUNK), np.int8),
        carray(_pointer(t[30]), (t[31], t[62] // CHUNK), np.int8),
        carray(_pointer(t[32]), (t[33],), CACHE),
        carray(_pointer(t[34]), (t[35], WINDOW), SUMMARY),
        carray(_pointer(t[36]), (t[37],), SUMMARY),
        carray(_pointer(t[38]), (t[39],), SUMMARY),
        carray(_pointer(t[40]), (t[41],), TIMEFRAME),
        carray(_pointer(t[42]), (t[43],), ENTITY),
        carray(_pointer(t[44]), (t[45], t[63]), BAR),
        carray(_pointer(t[46]), (t[47], t[64], 2, FEATURE_STATE), np.float64),
        carray(_pointer(t[48]), (t[49],), FIXED),
        carray(_pointer(t[50]), (t[51],), FIXED),
        carray(_pointer(t[52]), (t[53], FEATURE_STATE), np.float64),
        carray(_pointer(t[54]), (t[55],), np.int8),
        carray(_pointer(t[56]), (t[57],), np.int8),
        carray(_pointer(t[58]), (t[59], t[63]), np.int8),
        carray(_pointer(t[60]), (t[61], t[64]), np.int8),
    )
