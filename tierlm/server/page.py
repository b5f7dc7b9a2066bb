"""The page at ``/``: one file that shows ``/live`` and has a box to chat."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi.responses import HTMLResponse


def page() -> HTMLResponse:
    """The page. It may run its own script and styles only, and talk to this server only."""
    text = resources.files("tierlm.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        f"script-src {_hash(text, 'script')}",
        f"style-src {_hash(text, 'style')}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return HTMLResponse(text, headers=headers)


def _hash(text: str, element: str) -> str:
    """What allows the one inline ``element`` of the page, and no other."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
