"""The page and the manual: nothing from elsewhere, every element that the script asks for, a real browser's view."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparse_engine.serve.app import PAGE
from sparse_engine.serve.asked import ImageRequest
from tests.serving import Client

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "input", "br"}


class Elements(HTMLParser):
    """The ids and links of a page, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.unlabelled: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]
        if tag in ("input", "select") and "label" not in self.open:
            self.unlabelled.append(given.get("id") or tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_are_whole_and_load_nothing_from_elsewhere(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    found = Elements(answer.body.decode())
    assert not found.open
    assert not found.unlabelled
    assert len(set(found.ids)) == len(found.ids)
    for link in found.links:
        assert link.startswith("/")
        assert client.get(link).status == 200, link
    assert b"<style" not in answer.body  # the policy forbids what is inline
    assert not re.search(rb"\son\w+=", answer.body)


def test_the_script_asks_for_what_is_there(client: Client) -> None:
    ids = set(Elements((PAGE / "page.html").read_text()).ids)
    script = (PAGE / "page.js").read_text()
    asked = set(re.findall(r'at\("([\w-]+)"\)', script)) | set(
        re.findall(r'"(\w+)"', re.search(r"\[([^\]]+)\]\.includes\(name\)", script)[1])  # type: ignore[index]
    )
    assert asked <= ids
    model = client.get("/v1/models").json()["data"][0]
    assert set(re.findall(r"model\.(\w+)", script)) <= model.keys()
    sent = set(re.findall(r"body\.(\w+)", script)) | {"model", "n", "steps", "sampler"}
    assert sent <= ImageRequest.model_fields.keys()
    assert "innerHTML" not in script
    assert client.get("/page/app.py").status == 404


def test_the_manual_names_every_field_and_route(client: Client) -> None:
    text = client.get("/docs").body.decode()
    for name in ImageRequest.model_fields:
        assert f"<code>{name}</code>" in text
    for path in ("/v1/images/generations", "/v1/models", "/health/live", "/health/ready", "/metrics"):
        assert path in text
    assert "safety checker" in text
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["properties"].keys() == ImageRequest.model_fields.keys()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws(client: Client, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{client.port}/?n=3&steps=4&labels=2&seed=5&draw"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [str(BROWSER), *options, "--virtual-time-budget=20000", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count('src="data:image/png;base64,') == 3, done.stdout + done.stderr
    assert done.stdout.count("label 2, seed 5, image ") >= 3
    assert re.search(r"3 images in [\d.]+ s: [\d.]+ images/s", done.stdout)
    assert "layers: " in done.stdout
