"""Real database servers, started for the tests and gone with them."""

from tests.servers.process import MissingServerError
from tests.servers.run import Servers
from tests.servers.server import DRIVERS, Database, Server

__all__ = ["DRIVERS", "Database", "MissingServerError", "Server", "Servers"]
