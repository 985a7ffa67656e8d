"""The errors of Tapeline, and what happens next after each.

TapelineError                 exit 1
├── ConfigError               exit 78: the settings are wrong; a supervisor must not restart
│   ├── AuthError             a vendor or a server refused the credentials
│   ├── StoreUnusable         the store of the settings cannot be read as it is
│   └── VersionError          data written by a newer Tapeline than this one
├── SourceError               a tape cannot be read (truncated, another schema, garbage)
├── Unavailable               wait and try again: a server did not answer
│   ├── BusUnavailable        Redis
│   └── StoreUnavailable      a database
├── RowRejected               the store refuses this row for good: dead letter
├── Fenced                    another process took over this work: stop, write nothing
└── BusBehind                 the bus has forgotten what was published: resume from its cursor

Each message is one line: what, where, what to do. No message holds a secret.
"""

from __future__ import annotations

EX_CONFIG = 78


class TapelineError(Exception):
    """Base of all errors a user can meet; `exit_code` is the process's exit code."""

    exit_code = 1


class ConfigError(TapelineError):
    """The settings (or something they name) are wrong; restarting cannot help."""

    exit_code = EX_CONFIG


class AuthError(ConfigError):
    """Credentials were refused."""


class StoreUnusable(ConfigError):
    """What the settings name as the store is none, or lacks what is read from it."""


class VersionError(ConfigError):
    """Data written by a newer program than this one."""


class SourceError(TapelineError):
    """A tape cannot be read."""


class Unavailable(TapelineError):
    """A dependency does not answer now; retry with backoff."""


class BusUnavailable(Unavailable):
    """Redis does not answer."""


class StoreUnavailable(Unavailable):
    """A store does not answer."""


class RowRejected(TapelineError):
    """The store refuses one row for good; it belongs in the dead letters."""


class Fenced(TapelineError):
    """Another process owns this work now; whoever gets this must stop writing."""


class BusBehind(TapelineError):
    """The bus holds less than was published; publish again from its cursor."""
