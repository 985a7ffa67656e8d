"""Loads the plug-ins that the settings name, calls them, and checks what they say (rules: `shared.plugins`)."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from services.signals.core import OWN, Said
from services.signals.score import GRADES, LOW, grade
from shared.errors import ConfigError
from shared.messages import Pressure, PressureRollup, Signal, encode
from shared.plugins import GROUP, PressureHook, SignalHook

log = logging.getLogger(__name__)

STATUSES = ("emitted", "monitor", "rejected")
_GRADES = ("", LOW, *(name for _, name in GRADES))
_TOO_LARGE = 1 << 62


class Plugins:
    """Calls each plug-in for a window and its signals; nothing that one does stops the stage."""

    def __init__(self, loaded: dict[str, object]) -> None:
        self._loaded = loaded
        self._told: set[tuple[str, str, str]] = set()

    def __call__(self, rows: Sequence[Pressure], rollup: PressureRollup, signals: Sequence[Signal]) -> Said:
        """All that the plug-ins say of a window, checked; the last of two signals with one key counts."""
        said: list[Signal] = []
        failed: set[str] = set()
        errors = 0
        for name, plugin in self._loaded.items():
            calls: list[tuple[str, Callable[[], Iterable[Any] | None]]] = []
            if isinstance(plugin, PressureHook):
                calls.append(("on_pressure_metrics", partial(plugin.on_pressure_metrics, rows, rollup)))
            if isinstance(plugin, SignalHook):
                calls += [("on_signal", partial(plugin.on_signal, signal)) for signal in signals]
            for where, call in calls:
                try:
                    answers = list(call() or ())
                except (Exception, SystemExit) as error:
                    answers = []
                    errors += 1
                    failed.add(name)
                    self._tell(name, where, type(error).__name__, f"raised {error!r}")
                for answer in answers:
                    try:
                        said.append(checked(answer, name, rollup))
                    except ValueError as error:
                        errors += 1
                        failed.add(name)
                        self._tell(name, where, str(error), f"returned what is no signal of this window: {error}")
        return Said(said, frozenset(failed), errors)

    def _tell(self, name: str, where: str, kind: str, what: str) -> None:
        if (name, where, kind) not in self._told:
            self._told.add((name, where, kind))
            log.warning(
                "plug-in '%s': %s %s; further such faults are only counted", name, where, " ".join(what.split())
            )


def load(names: Sequence[str]) -> Plugins | None:
    """The plug-ins of these names; None for none.

    Raises ConfigError for one that is not installed, cannot be imported, or has no method to call.
    """
    installed: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if installed.setdefault(entry.name, entry).value != entry.value and entry.name in names:
            raise ConfigError(
                f"signals.plugins names '{entry.name}', which two installed packages have "
                f"({installed[entry.name].value}, {entry.value}); remove one"
            )
    for name in names:
        if name not in installed:
            there = ", ".join(sorted(installed)) or "none"
            raise ConfigError(f"signals.plugins names '{name}', which no installed package has; there are: {there}")
        if name == OWN:
            raise ConfigError(f"signals.plugins: '{OWN}' is the source of the stage's own signals; rename the plug-in")
    return Plugins({name: _object(installed[name]) for name in names}) if names else None


def _object(entry: EntryPoint) -> object:
    try:
        made = entry.load()
        plugin = made() if inspect.isclass(made) else made
    except Exception as error:
        why = " ".join(repr(error).split())
        raise ConfigError(
            f"the plug-in '{entry.name}' ({entry.value}) of signals.plugins cannot be loaded: {why}"
        ) from None
    if not isinstance(plugin, PressureHook | SignalHook):
        raise ConfigError(
            f"the plug-in '{entry.name}' ({entry.value}) of signals.plugins has neither on_pressure_metrics nor "
            "on_signal; give it one"
        )
    return plugin


def checked(answer: object, name: str, rollup: PressureRollup) -> Signal:
    """The signal as it may be published, `source` set. Raises ValueError saying what is wrong with it."""
    if not isinstance(answer, Signal):
        raise ValueError(f"a {type(answer).__name__} instead of a Signal")
    try:  # a message is not checked when it is made, so its fields may be of any type
        plain = msgspec.to_builtins(answer, enc_hook=_plain)
        signal = msgspec.convert(plain, Signal)
        encode([signal])
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    window = (rollup.underlying, rollup.time_window_ns, rollup.window_sec)
    rules = (
        ((signal.underlying, signal.time_window_ns, signal.window_sec) == window, "another underlying or window"),
        (all(map(_sound, _numbers(plain))), "a number that is not finite, or too large"),
        (0.0 <= signal.score <= 1.0, "a score outside 0..1"),
        (0 <= signal.expiration_ns < _TOO_LARGE, "an impossible expiration_ns"),
        (signal.baseline_size >= 0, "a negative baseline_size"),
        (bool(signal.signal_type), "no signal_type"),
        (signal.direction in ("BUY", "SELL"), "a direction that is not BUY or SELL"),
        (signal.option_type in ("", "C", "P"), "an option_type that is not C, P or empty"),
        (signal.status in STATUSES, f"a status that is not {', '.join(STATUSES)}"),
        (signal.grade in _GRADES, f"a grade that is not {', '.join(_GRADES[1:])} or empty"),
    )
    for fine, fault in rules:
        if not fine:
            raise ValueError(fault)
    return msgspec.structs.replace(
        signal, source=name, revision=0, timestamp_out_ns=0, grade=signal.grade or grade(signal.score),
        types=signal.types or (signal.signal_type,),
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} where a number or a text belongs")


def _sound(number: float) -> bool:
    return math.isfinite(number) if isinstance(number, float) else abs(number) < _TOO_LARGE


def _numbers(plain: Any) -> list[float]:
    """Every number of a message of builtins."""
    if isinstance(plain, dict):
        return [number for value in plain.values() for number in _numbers(value)]
    return [plain] if isinstance(plain, int | float) else []
