"""GET /docs: without the internet, and behind a key."""

from __future__ import annotations

import re

import pytest

from server.guard import PUBLIC_PATHS
from tests.server.conftest import Server, running

ASSETS = sorted(path for path in PUBLIC_PATHS if path.startswith("/docs/"))


async def test_the_page_and_its_files_need_no_key_and_the_description_does() -> None:
    async with running(api_keys=["k"]) as server:
        for path in ("/docs", *ASSETS):
            assert (await server.http.get(path)).status_code == 200, path
        assert (await server.http.get("/openapi.json")).status_code == 401
        assert (await server.http.get("/docs/other.js")).status_code == 401


async def test_the_page_names_only_files_of_this_server(server: Server) -> None:
    page = await server.http.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(named) == ASSETS
    assert not re.search(r"https?://", page.text)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';"), "the browser keeps to it, whatever is loaded"


@pytest.mark.parametrize(
    ("path", "media_type", "least_bytes"),
    [
        ("/docs/docs.js", "text/javascript", 500),
        ("/docs/swagger-ui-bundle.js", "text/javascript", 10**6),
        ("/docs/swagger-ui.css", "text/css", 10**5),
        ("/docs/favicon.png", "image/png", 100),
    ],
)
async def test_its_files_are_whole(
    server: Server, path: str, media_type: str, least_bytes: int
) -> None:
    reply = await server.http.get(path)
    assert reply.headers["content-type"].partition(";")[0] == media_type
    assert len(reply.content) >= least_bytes


@pytest.mark.parametrize("name", ["other.js", "..%2f..%2fguard.py", "docs.html"])
async def test_no_other_file_is_served(server: Server, name: str) -> None:
    reply = await server.http.get(f"/docs/{name}")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "unknown_url"


async def test_a_prefix_is_text_in_the_page() -> None:
    async with running(root_path='/"><script>') as server:
        page = (await server.http.get("/docs")).text
        assert "<script>" not in page.partition("<script src=")[0]
