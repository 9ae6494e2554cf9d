"""`python -m deploy.probe`: end with status 0 if the container's server accepts requests, else with 1 and the reason.

The image's HEALTHCHECK and exec probes run it. It reads the port and the API keys where the server reads them: in the
environment and in the file that ALLATTN_CONFIG names. It does not see flags that were given to the server.
"""

import os
import sys
from http.client import HTTPConnection, HTTPException

from server.config import load_settings

TIMEOUT_S = 5


def main() -> str | None:
    """Return None if the server accepts requests, else the reason why it does not."""
    settings = load_settings([], environ=os.environ)
    keys = settings.all_api_keys()
    headers = {"Authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}
    host = "127.0.0.1" if settings.host == "0.0.0.0" else "::1" if settings.host == "::" else settings.host
    connection = HTTPConnection(host, settings.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health/ready", headers=headers)
        response = connection.getresponse()
        return None if response.status == 200 else f"{response.status}: {response.read().decode()}"
    except (OSError, HTTPException) as error:
        return f"{host}:{settings.port}: {error}"
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
