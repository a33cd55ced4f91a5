"""One question to an HTTP server: does it answer?"""

import base64
import http.client
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit, urlunsplit


def answers(url: str, *, seconds: float = 5.0) -> bool:
    """Whether a GET of `url` is answered with success, or with "who are you?" (401, 403), which a live server says too.

    `USER:PASSWORD@` in the URL is sent as basic authentication. Proxies from the environment are used, but never to
    reach 127.0.0.1.
    """
    try:
        parts = urlsplit(url)
        userinfo, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
        if userinfo:
            request.add_header("Authorization", f"Basic {base64.b64encode(unquote(userinfo).encode()).decode()}")
        direct = [urllib.request.ProxyHandler({})] if parts.hostname == "127.0.0.1" else []
        with urllib.request.build_opener(*direct).open(request, timeout=seconds):
            return True
    except urllib.error.HTTPError as error:
        with error:
            return error.code in {401, 403}
    except (OSError, http.client.HTTPException, ValueError):
        return False
