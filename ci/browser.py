"""Drives Debian's headless Chromium over its pipe: enough of the DevTools protocol to test a page.

chromium-headless-shell reads commands from descriptor 3 and writes answers to 4, JSON closed by a zero byte
(--remote-debugging-pipe): no port, no driver, no further package.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

PROGRAM = "chromium-headless-shell"


class Browser:
    """One page. `errors` collects what its console says of errors and what it throws; `requests` what it asks for."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="kvq_browser_")
        to_read, self.write_to = os.pipe()
        self.read_from, to_write = os.pipe()

        def descriptors():  # 3 and 4, in the child alone
            reading, writing = os.dup(to_read), os.dup(to_write)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        # As root Chromium has no sandbox; it opens nothing but our own file.
        self.process = subprocess.Popen(
            [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
             "--disable-dev-shm-usage", "--user-data-dir=" + self.profile], preexec_fn=descriptors, close_fds=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count, self.session = b"", 0, None
        self.errors, self.requests, self.events = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, timeout=60, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_to, data):]
        end = time.monotonic() + timeout
        while True:
            answer = self.receive(end, method)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, end, what):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_from], [], [], max(0, end - time.monotonic()))
            part = os.read(self.read_from, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError(f"{PROGRAM} did not answer: {what}")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(message)
        method, of = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(of["exceptionDetails"].get("text", "") + str(
                of["exceptionDetails"].get("exception", {}).get("description", "")))
        elif method == "Log.entryAdded" and of["entry"]["level"] == "error":
            self.errors.append(of["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and of["type"] in ("error", "assert"):
            self.errors.append(str(of["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(of["request"]["url"])
        elif method:
            self.events.append(method)
        return message

    def open(self, path):
        self.events.clear()
        self.call("Page.navigate", url="file://" + os.path.realpath(path))
        end = time.monotonic() + 60
        while "Page.loadEventFired" not in self.events:
            self.receive(end, "loading " + path)

    def run(self, script):
        """The value of an expression in the page, promises waited for."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"].get("exception", {}).get("description")))
        return result["result"].get("value")

    def look(self, width=1280, height=900, dark=False, media=""):
        """How the page is seen: its size in pixels, the colour scheme, and screen or print."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", media=media,
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def key(self, name, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      text=text if kind == "keyDown" else "")

    def screenshot(self, path, whole=False):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def pdf(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, paperWidth=8.27,
                                                  paperHeight=11.69)["data"]))
