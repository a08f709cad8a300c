"""Secrets in texts: found, so that a recipe that holds one is refused, and covered where told.

Access tokens come from the environment or the Hub's own store; in a recipe they would stand in
every file that a run leaves.
"""

from __future__ import annotations

import os
import re

HIDDEN = "[removed]"
_CREDENTIALS = re.compile(r"(:/{1,2})[^/@\s]+@")  # a path has lost one of the slashes
_SECRET_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|key|secret|signature|password)[^=&\s]*=)[^&\s\"']+"
)
_TOKEN = re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-|xox[a-z]-|AKIA)[A-Za-z0-9_-]{8,}")
_SECRET_NAME = re.compile(r"(?i)token|secret|passw|api_?key|credential")
# Covering a word too many does no harm, refusing a recipe for one would.
_SURELY_TOKEN = re.compile(
    r"\b(?:(?:hf_|ghp_|github_pat_|sk-|xox[a-z]-)(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}|hf_[A-Za-z]{30,}"
    r"|AKIA[A-Z0-9]{16})"
)
_SURELY_SECRET = re.compile(r"(?i)(?:token|secret|passw(?:or)?d|api_?key|credentials?)$")
_SURELY_PASSWORD = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


def without_secrets(text: str) -> str:
    """Replace access tokens, passwords in URLs, and the values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    text = _CREDENTIALS.sub(rf"\1{HIDDEN}@", text)
    return _TOKEN.sub(HIDDEN, _SECRET_QUERY.sub(rf"\1{HIDDEN}", text))


def secret_in(text: str) -> str | None:
    """Return what secret a text surely holds, in words; None: none."""
    if _SURELY_TOKEN.search(text):
        return "an access token"
    if _SURELY_PASSWORD.search(text) or _SECRET_QUERY.search(text):
        return "a password or token in a URL"
    for name, value in os.environ.items():
        # A path is named after the secret that lies there, and is none.
        secret = len(value) >= 8 and "/" not in value and _SURELY_SECRET.search(name)
        if secret and value in text:
            return f"the value of ${name}"
    return None
