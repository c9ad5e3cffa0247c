"""GET /docs: /openapi.json in a browser, without the internet, and behind a key.

The page is fixed files and public; what it shows is behind the key, which the page asks for.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

router = APIRouter(include_in_schema=False)

_OURS = Path(str(files("server") / "static"))
_SWAGGER_UI = Path(str(files("fastapi_offline") / "static"))
_ASSETS = {
    "docs.js": _OURS,
    "favicon.png": _SWAGGER_UI,
    "swagger-ui-bundle.js": _SWAGGER_UI,
    "swagger-ui.css": _SWAGGER_UI,
}
# The browser itself keeps the page from asking other servers for anything.
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


@router.get("/docs")
def docs(request: Request) -> Response:
    root = escape(request.scope.get("root_path", ""))
    page = (_OURS / "docs.html").read_text("utf-8").replace("ROOT", root)
    headers = {"content-security-policy": _POLICY}
    return Response(page, headers=headers, media_type="text/html")


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    if name not in _ASSETS:
        raise HTTPException(404)
    return FileResponse(_ASSETS[name] / name)
