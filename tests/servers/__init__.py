"""Real database servers, started for the tests and gone with them."""

from tests.servers.process import MissingServerError
from tests.servers.run import Servers
from tests.servers.server import ASYNC_DRIVERS, DRIVERS, TWINS, Database, Server

__all__ = [
    "ASYNC_DRIVERS",
    "DRIVERS",
    "TWINS",
    "Database",
    "MissingServerError",
    "Server",
    "Servers",
]
