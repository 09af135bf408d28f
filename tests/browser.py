"""A browser without a window: Debian's Chromium, driven through Selenium."""

from __future__ import annotations

import os
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tests.helpers import wait_until
from tests.servers import MissingServerError
from tests.servers.process import ServerProcess, find_program

try:
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service
except ImportError:
    raise MissingServerError("Selenium (extra test)") from None

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selenium.webdriver.remote.webelement import WebElement

__all__ = ("Visitor", "visitor")

OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # refused to root
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--disable-gpu",
    "--disable-breakpad",  # its process would outlive the browser
    "--disable-extensions",
    "--remote-debugging-pipe",  # it ends when its driver does, for whatever reason
    "--no-proxy-server",
    "--window-size=1000,1200",
    "--lang=en",
)

ARRIVED = "return !window.isLeft && document.readyState === 'complete'"

TIMEOUT = 60.0
"""Seconds for a page to load, on a machine busy with other tests."""


class Driver(Service):
    """chromedriver, which ends when the tests do, however they end."""

    def command_line_args(self) -> list[str]:
        program = find_program("chromedriver", "chromium-driver")
        return ["--pdeathsig=KILL", "--", program, *super().command_line_args()]


class Visitor:
    """Somebody with a browser, who finds what is on a page by CSS selectors.

    :param chrome: the browser.
    """

    def __init__(self, chrome: webdriver.Chrome) -> None:
        self._chrome = chrome

    @property
    def address(self) -> str:
        """The address of the page."""
        return self._chrome.current_url

    @property
    def title(self) -> str:
        """The title of the page."""
        return self._chrome.title

    def open(self, address: str) -> None:
        """Go to a page."""
        self._chrome.get(address)

    def reload(self) -> None:
        """Ask for the page once more."""
        self._chrome.refresh()

    def find(self, selector: str) -> WebElement:
        """Return the only element that there is."""
        [element] = self._chrome.find_elements("css selector", selector)
        return element

    def texts(self, selector: str) -> list[str]:
        """Return what stands in all elements."""
        return [element.text for element in self._chrome.find_elements("css selector", selector)]

    def follow(self, link: str) -> None:
        """Click a link, by its text."""
        self._leave(self._chrome.find_element("link text", link))

    def send(self, **fields: str) -> None:
        """Type into the fields of the form, by their ids, and press its button."""
        for field, typed in fields.items():
            self.find(f"#{field}").send_keys(typed)
        self._leave(self.find("button"))

    def _leave(self, element: WebElement) -> None:
        """Click what leads to another page, and wait for that: a click may return before."""
        self._chrome.execute_script("window.isLeft = true")
        element.click()
        wait_until(self._has_arrived, TIMEOUT, "another page")

    def _has_arrived(self) -> bool:
        try:
            return bool(self._chrome.execute_script(ARRIVED))
        except WebDriverException:  # in the midst of the change, by several names
            return False


@contextmanager
def visitor() -> Iterator[Visitor]:
    """Run a browser.

    :raises MissingServerError: when it is not installed.
    """
    find_program("chromedriver", "chromium-driver")  # else it is missed in the midst of a start
    options = webdriver.ChromeOptions()
    options.binary_location = find_program("chromium", "chromium")
    for option in OPTIONS:
        options.add_argument(option)
    with TemporaryDirectory(prefix="sessionmgr-", ignore_cleanup_errors=True) as folder:
        driver = Driver(find_program("setpriv", "util-linux"), env={**os.environ, "TMPDIR": folder})
        chrome = webdriver.Chrome(options, driver)
        ServerProcess.pids.add(driver.process.pid)  # is not left behind: see leftover_processes
        try:
            chrome.set_page_load_timeout(TIMEOUT)
            yield Visitor(chrome)
        finally:
            chrome.quit()
            ServerProcess.pids.discard(driver.process.pid)
