"""What a plug-in of the signals stage is: code of your own that reads completed windows and publishes signals.

A plug-in is an installed package's entry point of the group `tapeline.signals`:

    [project.entry-points."tapeline.signals"]
    call-skew = "my_package:CallSkew"

and is switched on by its name: `[signals] plugins = ["call-skew"]`. What it names is a class, which is instantiated
without arguments, or an object or module that is used as it is; it has one of the methods below, or both.

    class CallSkew:
        def on_pressure_metrics(self, rows, rollup):
            if rollup.put_call_ratio is not None and rollup.put_call_ratio < 0.2 and rollup.complete:
                yield Signal(
                    underlying=rollup.underlying, time_window_ns=rollup.time_window_ns,
                    window_sec=rollup.window_sec, signal_type="call_skew", direction="BUY", score=0.7, grade="HIGH",
                )

The rules:

- A method is called for each window of an underlying that is complete, again when a late trade or a gap revises it,
  and again after a crash: at least once. So what it returns must depend on its arguments alone: no clock, no memory,
  no random numbers. Workers share the object between threads.
- What it returns for a window is all it has to say of it. A call for a revised window compares that with what was
  published: what is new or has changed is published with the next `revision`, what is missing as `withdrawn`.
- `underlying`, `time_window_ns` and `window_sec` must be those of the window; `expiration_ns`, `strike` and
  `option_type` may be left out, and say with the source which signal it is: of two alike the last counts. Numbers
  are finite, `score` is 0..1, `direction` BUY or SELL, `status` emitted, monitor or rejected, `grade` one of
  EXTREME, VERY_HIGH, HIGH, MODERATE and LOW, or empty, for that of the score. `source` becomes the plug-in's name;
  `revision` and `timestamp_out_ns` are the stage's.
- A signal that breaks a rule is left out, and an exception costs what that call would have returned. Both are logged
  (each kind once) and counted (`plugin_errors`), and stop nothing. An earlier signal of that window then stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from shared.messages import Pressure, PressureRollup, Signal

GROUP = "tapeline.signals"


@runtime_checkable
class PressureHook(Protocol):
    """A plug-in that reads windows."""

    def on_pressure_metrics(self, rows: Sequence[Pressure], rollup: PressureRollup) -> Iterable[Signal] | None:
        """`rows`: all of the window, in the order (expiration, strike, option type). None: nothing to say."""
        ...


@runtime_checkable
class SignalHook(Protocol):
    """A plug-in that reads signals."""

    def on_signal(self, signal: Signal) -> Iterable[Signal] | None:
        """Called with each of the stage's own signals that stands when a window is judged or revised.

        These are `emitted`, `monitor` or `rejected`, and have no `timestamp_out_ns` yet. Once one is withdrawn it is
        not asked for any more, so what was said of it is withdrawn too.
        """
        ...


Plugin = PressureHook | SignalHook
